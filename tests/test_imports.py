"""The import table of the design, held by parsing every file: data flows one way, and nothing upstream is imported."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "train", "tools")

# file or folder (the longest match counts) → what of ours it may import
ALLOWED: dict[str, tuple[str, ...]] = {
    "pipeline/__init__.py": (),
    "pipeline/errors.py": (),
    "pipeline/cores.py": (),
    "pipeline/storage.py": ("pipeline.errors", "pipeline.s3_ranges"),
    "pipeline/s3_ranges.py": (),
    "pipeline/schema.py": (),
    "pipeline/ingest": (
        "pipeline.errors",
        "pipeline.cores",
        "pipeline.storage",
        "pipeline.schema",
        "pipeline.ingest",
    ),
    "pipeline/ingest/plan.py": ("pipeline.schema", "pipeline.ingest.config"),
    "pipeline/ingest/sandbox.py": ("pipeline.errors",),
    "pipeline/ingest/cut.py": ("pipeline.schema",),
    "pipeline/loading": (
        "pipeline.errors",
        "pipeline.cores",
        "pipeline.storage",
        "pipeline.schema",
        "pipeline.loading",
    ),
    "pipeline/loading/order.py": ("pipeline.errors", "pipeline.loading.philox", "pipeline.loading.shares"),
    "pipeline/loading/shares.py": ("pipeline.loading.philox",),
    "pipeline/loading/passes.py": (),
    "pipeline/loading/mp4.py": (),
    "pipeline/loading/keys.py": (),
    "pipeline/loading/where.py": ("pipeline.errors",),
    "pipeline/loading/draws.py": ("pipeline.errors", "pipeline.loading.philox"),
    "pipeline/loading/masks.py": ("pipeline.errors", "pipeline.loading.philox"),
    "model": ("model",),
    "model/config.py": (),
    "model/linear.py": (),
    "model/patches.py": (),
    "model/motion.py": ("model.config",),
    "model/hog.py": ("model.config", "model.patches"),
    "model/positions.py": ("model.config",),
    "train": ("pipeline.errors", "pipeline.storage", "pipeline.loading", "model", "train"),
    "tools": ("pipeline", "model", "train", "tools"),
}
TORCH_FREE = (
    "pipeline/errors.py",
    "pipeline/cores.py",
    "pipeline/storage.py",
    "pipeline/s3_ranges.py",
    "pipeline/schema.py",
    "pipeline/ingest",
)


def _files() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> list[str]:
    """Every module a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out from reelmae"
            module = node.module or ""
            inside = ROOT / module.removeprefix("reelmae").lstrip(".").replace(".", "/")
            if module.split(".")[0] == "reelmae" and inside.is_dir():  # `from package import module`
                names += [f"{module}.{alias.name}" for alias in node.names]
            else:
                names += [module]
    return names


def _rule(relative: str) -> tuple[str, ...]:
    matches = [k for k in ALLOWED if relative == k or relative.startswith(k.rstrip("/") + "/")]
    assert matches, f"{relative}: not in the import table"
    return ALLOWED[max(matches, key=len)]


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_imports_only_what_the_design_allows(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    allowed = _rule(relative)
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in PACKAGES, f"{relative}: bare import of {name}; write reelmae.{name}"
        if top != "reelmae":
            continue
        ours = name.removeprefix("reelmae.")
        assert any(ours == a or ours.startswith(a + ".") for a in allowed), f"{relative} may not import {name}"


def test_ingest_never_imports_torch() -> None:
    for path in _files():
        relative = path.relative_to(ROOT).as_posix()
        if any(relative == p or relative.startswith(p + "/") for p in TORCH_FREE):
            assert not {n.split(".")[0] for n in _imports(path)} & {"torch", "torchvision", "timm"}, relative


def test_only_tools_know_argv() -> None:
    for path in _files():
        relative = path.relative_to(ROOT).as_posix()
        if not relative.startswith("tools/"):
            assert not {n.split(".")[0] for n in _imports(path)} & {"tyro", "argparse", "click"}, relative


def test_only_the_sandbox_starts_processes_in_ingest() -> None:
    for path in _files():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("pipeline/ingest/") and relative != "pipeline/ingest/sandbox.py":
            assert not {n.split(".")[0] for n in _imports(path)} & {"subprocess", "multiprocessing"}, relative


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"reelmae." + p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in _files()}
    assert set(listed) == found
    for name in listed:
        assert (ROOT / name.removeprefix("reelmae.").replace(".", "/") / "__init__.py").exists(), name


def test_every_third_party_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {d.split(";")[0].split(">")[0].split("[")[0].strip().lower() for group in groups for d in group}
    distribution = {
        "ffmpeg": "ffmpeg-python", "imageio_ffmpeg": "imageio-ffmpeg", "PIL": "pillow", "nvidia": "nvidia-dali-cuda130"
    }  # fmt: skip
    for path in _files():
        for name in _imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "reelmae":
                continue
            assert distribution.get(top, top).lower().replace("_", "-") in declared, f"{path}: {top}"


def test_every_dependency_has_its_reason_in_contributing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| dependency |") :]
    for dependency in (d for group in groups for d in group):
        name = dependency.split(";")[0].split(">")[0].split("[")[0].strip()
        assert name == "reelmae" or name in table, f"{name}: say in CONTRIBUTING.md why it is here"


def test_every_dependency_is_used() -> None:
    """The extras' tools run by their own commands or serve tests; everything else must be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module = {
        "ffmpeg-python": "ffmpeg",
        "imageio-ffmpeg": "imageio_ffmpeg",
        "pillow": "PIL",
        "nvidia-dali-cuda130": "nvidia",
    }
    module |= {"torchvision": "timm", "s3fs": "fsspec", "tensorboard": "torch"}  # imported by these, for us
    imported = {name.split(".")[0] for path in _files() for name in _imports(path)}
    for dependency in project["dependencies"]:
        name = dependency.split(";")[0].split(">")[0].strip()
        assert module.get(name, name) in imported, name

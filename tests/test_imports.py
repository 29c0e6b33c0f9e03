"""The import table of the design, held by parsing every file: data flows one way, and nothing upstream is imported."""

from __future__ import annotations

import ast
import graphlib
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "train", "tools")

PUBLIC = (
    "pipeline/storage",
    "pipeline/ingest",
    "pipeline/loading",
    "pipeline/dataset",
    "model",
    "train",
)  # packages with public names
BASE = ("pipeline.errors", "pipeline.schema", "pipeline.storage")

# file or folder (the longest match counts) → what of ours it may import
ALLOWED: dict[str, tuple[str, ...]] = {
    "pipeline/__init__.py": (),
    "pipeline/errors.py": (),
    "pipeline/cores.py": (),
    "pipeline/schema.py": (),
    "pipeline/devices.py": ("pipeline.errors",),
    "pipeline/lazy.py": (),
    **{f"{package}/__init__.py": ("pipeline.lazy", package.replace("/", ".")) for package in PUBLIC},
    "pipeline/storage": ("pipeline.errors", "pipeline.storage"),
    "pipeline/runners": ("pipeline.errors", "pipeline.cores", "pipeline.storage.scratch", "pipeline.runners"),
    # sharding, from the top down: job → run → clips → shards → plan → settings
    "pipeline/ingest": (*BASE, "pipeline.runners", "pipeline.ingest"),
    "pipeline/ingest/run": (
        *BASE,
        "pipeline.runners",
        *(
            f"pipeline.ingest.{name}"
            for name in ("run", "clips", "shards", "plan", "tars", "config", "ffmpeg", "sandbox")
        ),
    ),
    "pipeline/ingest/clips": (
        "pipeline.errors",
        "pipeline.schema",
        *(f"pipeline.ingest.{name}" for name in ("clips", "shards", "config", "encoders", "ffmpeg", "sandbox")),
    ),
    "pipeline/ingest/clips/cut.py": (),
    "pipeline/ingest/shards": (*BASE, *(f"pipeline.ingest.{name}" for name in ("shards", "plan", "tars"))),
    "pipeline/ingest/tars/child.py": (),
    "pipeline/ingest/tars/webdataset_child.py": ("pipeline.errors", "pipeline.ingest.sandbox"),
    "pipeline/ingest/plan": (
        *BASE,
        *(f"pipeline.ingest.{name}" for name in ("plan", "tars", "config", "encoders", "ffmpeg")),
    ),
    "pipeline/ingest/plan/deal.py": ("pipeline.schema",),
    "pipeline/ingest/config.py": (),
    "pipeline/ingest/encoders.py": ("pipeline.errors", "pipeline.ingest.config", "pipeline.ingest.sandbox"),
    "pipeline/ingest/ffmpeg.py": ("pipeline.errors", "pipeline.ingest.sandbox"),
    "pipeline/ingest/sandbox.py": ("pipeline.errors",),
    # loading, from the top down: loader → decode → fetch → index → order
    "pipeline/loading": ("pipeline.errors", "pipeline.cores", "pipeline.devices", "pipeline.loading"),
    "pipeline/loading/order": ("pipeline.errors", "pipeline.loading.order"),
    "pipeline/loading/order/shares.py": ("pipeline.loading.order.philox",),
    "pipeline/loading/order/draws.py": ("pipeline.errors", "pipeline.loading.order.philox"),
    "pipeline/loading/order/masks.py": ("pipeline.errors", "pipeline.loading.order.philox"),
    "pipeline/loading/order/philox.py": (),
    "pipeline/loading/index": (*BASE, "pipeline.cores", "pipeline.loading.order", "pipeline.loading.index"),
    "pipeline/loading/index/keys.py": (),
    "pipeline/loading/index/where.py": ("pipeline.errors",),
    "pipeline/loading/fetch": (
        "pipeline.errors",
        "pipeline.storage",
        "pipeline.loading.fetch",
        "pipeline.loading.tasks",
    ),
    "pipeline/loading/fetch/readers.py": (),
    "pipeline/loading/fetch/blocks.py": (
        "pipeline.storage.store",
        "pipeline.loading.fetch.pieces",
        "pipeline.loading.tasks",
    ),
    "pipeline/loading/decode": (
        *("pipeline.errors", "pipeline.cores", "pipeline.storage"),
        *(f"pipeline.loading.{name}" for name in ("order", "fetch", "decode", "tasks")),
    ),
    "pipeline/loading/decode/mp4.py": (),
    "pipeline/loading/decode/passes.py": ("pipeline.loading.tasks",),
    "pipeline/dataset": (*BASE, "pipeline.cores", "pipeline.runners", "pipeline.ingest", "pipeline.dataset"),
    "model": ("model",),
    "model/weights": ("pipeline.errors", "model"),
    "model/config.py": (),
    "model/linear.py": (),
    "model/patches.py": (),
    "model/motion.py": ("model.config",),
    "model/hog.py": ("model.config", "model.patches"),
    "model/positions.py": ("model.config",),
    "train": (
        *(f"pipeline.{name}" for name in ("errors", "storage", "devices", "runners", "loading")),
        *("model", "train"),
    ),
    "train/recipe.py": ("pipeline.errors",),
    "tools": ("pipeline", "model", "train", "tools"),
}
TORCH_FREE = (
    "pipeline/errors.py",
    "pipeline/cores.py",
    "pipeline/schema.py",
    "pipeline/storage",
    "pipeline/runners",
    "pipeline/ingest",
    "pipeline/dataset",
    "tools/cli.py",
    "tools/commands",
    "tools/bench/config.py",
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


def _row(relative: str) -> str:
    matches = [k for k in ALLOWED if relative == k or relative.startswith(k.rstrip("/") + "/")]
    assert matches, f"{relative}: not in the import table"
    return max(matches, key=len)


def _is_of(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_imports_only_what_the_design_allows(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    allowed = ALLOWED[_row(relative)]
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in PACKAGES, f"{relative}: bare import of {name}; write reelmae.{name}"
        if top != "reelmae":
            continue
        ours = name.removeprefix("reelmae.")
        assert any(_is_of(ours, a) for a in allowed), f"{relative} may not import {name}"


def test_the_table_allows_nothing_that_nobody_does() -> None:
    """So that it shows how the parts lie over each other."""
    imported: dict[str, set[str]] = {row: set() for row in ALLOWED}
    for path in _files():
        row = _row(path.relative_to(ROOT).as_posix())
        imported[row] |= {n.removeprefix("reelmae.") for n in _imports(path) if n.startswith("reelmae.")}
    for row, allowed in ALLOWED.items():
        assert [a for a in allowed if not any(_is_of(name, a) for name in imported[row])] == [], row


def test_no_circle_of_imports_anywhere() -> None:
    """Imports within functions and for type checking count too: a circle that is hidden is still one."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in _files()}

    def module_of(name: str) -> str:
        while name and name not in modules:  # the name may be that of something in a module
            name = name.rpartition(".")[0]
        return name

    graph = {
        module: {module_of(n.removeprefix("reelmae.")) for n in _imports(path) if n.startswith("reelmae.")}
        - {module, ""}
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


def test_no_module_hides_one_of_the_standard_library() -> None:
    """`python tools/cli.py` puts that folder first on the path: an `inspect.py` in it would be imported by others."""
    for path in _files():
        assert path.stem not in sys.stdlib_module_names - {"__init__"}, path


def test_no_public_name_of_a_package_is_also_a_module_in_it() -> None:
    """Once such a module is imported, the package's attribute is the module, and the function cannot be had any more."""
    for init in (p for p in _files() if p.name == "__init__.py"):
        beside = {p.stem for p in init.parent.glob("*.py")} | {p.name for p in init.parent.iterdir() if p.is_dir()}
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                assert not set(ast.literal_eval(node.value)) & beside, init


def test_ingest_never_imports_torch() -> None:
    for path in _files():
        relative = path.relative_to(ROOT).as_posix()
        if any(relative == p or relative.startswith(p + "/") for p in TORCH_FREE):
            assert not {n.split(".")[0] for n in _imports(path)} & {"torch", "torchvision", "timm"}, relative


def test_only_the_child_of_the_job_imports_webdataset() -> None:
    """Its import brings torch along, which the child forbids."""
    for path in _files():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("pipeline/") and relative != "pipeline/ingest/tars/child.py":
            assert "webdataset" not in {n.split(".")[0] for n in _imports(path)}, relative


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
        "ffmpeg": "ffmpeg-python",
        "imageio_ffmpeg": "imageio-ffmpeg",
        "PIL": "pillow",
        "nvidia": "nvidia-dali-cuda130",
        "scenedetect": "scenedetect-headless",
    }
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

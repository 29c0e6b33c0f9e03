"""The names that a user imports: there, documented, and cheap until they are used. The README's own loop, as written."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "reelmae.pipeline.loading": "ClipIndex Selection mix ClipLoader ClipSweep LoaderConfig SamplePolicy MaskPolicy "
    "DecoderMaskPolicy ClipBatch",
    "reelmae.pipeline.storage": "Access Store parse_options",
    "reelmae.pipeline.ingest": "shard ShardConfig",
    "reelmae.pipeline.dataset": "verify repair facts",
    "reelmae.model": "MaskedAutoencoder Classifier load_model ViTConfig MAEConfig MotionConfig ClassifierConfig mae_config "
    "slowfast_config videomae_config motion_config",
    "reelmae.train": "pretrain load_recipe",
}


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PUBLIC)
def test_each_public_name_is_there_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    names = PUBLIC[package].split()
    assert sorted(module.__all__) == sorted(names)
    assert set(names) <= set(dir(module))
    for name in names:
        thing = getattr(module, name)
        assert not isinstance(thing, type(module)), f"{package}.{name} is a module"
        assert thing.__doc__, name


@pytest.mark.parametrize("package", PUBLIC)
def test_a_function_is_not_hidden_by_a_module_that_was_imported_first(package: str, tmp_path: Path) -> None:
    """The import of a submodule sets the package's attribute of that name."""
    submodules = [
        p for p in (ROOT / package.removeprefix("reelmae.").replace(".", "/")).glob("*.py") if p.stem[0] != "_"
    ]
    imports = "".join(f"import {package}.{p.stem}\n" for p in submodules)
    names = ", ".join(PUBLIC[package].split())
    run(
        f"{imports}from {package} import {names}\nimport types\nassert not any(isinstance(x, types.ModuleType) for x in [{names}])",
        tmp_path,
    )


@pytest.mark.parametrize("package", PUBLIC)
def test_importing_a_package_imports_nothing_heavy(package: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'av', 'pydantic', 'fsspec', 'nvidia'}"
    code = f"import sys, {package}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    run(code, tmp_path)


def test_configs_need_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from reelmae.model import mae_config
from reelmae.pipeline.ingest import ShardConfig
from reelmae.pipeline.loading import LoaderConfig
LoaderConfig(), ShardConfig(), mae_config("B")
assert "torch" not in sys.modules
"""
    run(code, tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    import reelmae.model

    with pytest.raises(AttributeError, match="no attribute 'Maskd'; it has Classifier, "):
        reelmae.model.Maskd  # noqa: B018


def test_the_loop_of_the_readme_runs_as_written(tiny_run: Path) -> None:
    """On a dataset in the folder `shards`, as in the README's journey."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.split("\n## I want to pretrain\n")[1], re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 15
    losses = run(
        f"losses = []\n{blocks[0].replace('loss.backward()', 'loss.backward(); losses.append(loss.item())')}print(len(losses), losses[-1])",
        tiny_run,
    )
    steps, last = losses.split()
    assert int(steps) == 10
    assert 0 < float(last) < 10

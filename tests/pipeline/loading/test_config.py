"""A setting of the loader is declared once: recipes, benchmarks and ClipLoader read the same classes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from reelmae.pipeline.loading import config
from reelmae.pipeline.loading.config import LoaderConfig, LoaderOptions, LoadOptions
from reelmae.pipeline.loading.order.draws import SampleOptions, SamplePolicy


def test_the_command_line_reads_the_settings_without_torch() -> None:
    program = "import sys, reelmae.pipeline.loading.config; print({'torch', 'av', 'pyarrow'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"


def test_each_class_adds_fields_and_keeps_the_defaults() -> None:
    options, whole = LoaderOptions(), LoaderConfig()
    assert set(LoadOptions.model_fields) < set(LoaderOptions.model_fields) < set(LoaderConfig.model_fields)
    for name in LoadOptions.model_fields:
        assert getattr(LoadOptions(), name) == getattr(options, name) == getattr(whole, name)
    same = set(LoaderOptions.model_fields) - {"sample"}
    assert {name: getattr(options, name) for name in same} == {name: getattr(whole, name) for name in same}
    assert SamplePolicy(**vars(options.sample)) == whole.sample


@pytest.mark.parametrize("made", [LoadOptions, LoaderOptions, LoaderConfig, SampleOptions, SamplePolicy])
def test_a_name_that_is_no_setting_is_refused(made: type) -> None:
    with pytest.raises((TypeError, ValueError), match="videos"):
        made(videos=3)


def test_the_size_of_a_sample_is_no_option_of_a_recipe() -> None:
    assert LoaderOptions(sample={"stride": 2}).sample == SampleOptions(stride=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frames"):
        LoaderOptions(sample={"frames": 8})  # type: ignore[arg-type]


def test_every_setting_says_what_it_is() -> None:
    """By a string under the field, which is the command line's help text too."""
    for node in ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), ast.unparse(field)

"""The parser of recipes takes any config class: pydantic models and dataclasses, nested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from reelmae.pipeline.errors import ConfigError
from reelmae.train.recipe import list_keys, load


@dataclass(frozen=True)
class Crop:
    """A section that is a dataclass, with a check of its own."""

    scale: tuple[float, float] = (0.5, 1.0)
    share: Annotated[float | None, Field(gt=0)] = None

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"crop.scale={self.scale}: low <= high")


class Head(BaseModel):
    """A section that is a model, with a section within."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    kind: Literal["linear", "attentive"] = "linear"
    crop: Crop | None = None


class ProbeConfig(BaseModel):
    """Another config than that of pretraining."""

    EXCLUSIVE: ClassVar = (("head.crop.share", "steps"),)

    head: Head = Head()
    crop: Crop = Crop()
    steps: int | None = None
    files: tuple[str, ...] = ()


def test_keys_are_the_fields_of_models_and_dataclasses() -> None:
    head = ["head.name", "head.kind", "head.crop.scale", "head.crop.share"]
    assert list(list_keys(ProbeConfig)) == [*head, "crop.scale", "crop.share", "steps", "files"]


def test_text_that_only_a_text_key_takes_as_it_is() -> None:
    config = load(ProbeConfig, None, ["head.name=2024", "head.kind=attentive", "steps=7", 'files=["a", "b"]'])
    assert (config.head.name, config.head.kind, config.steps, config.files) == ("2024", "attentive", 7, ("a", "b"))
    assert load(ProbeConfig, None, ["head.name='a b'"]).head.name == "a b"


def test_one_of_two_exclusive_keys_drops_the_other_at_its_own_place(tmp_path: Path) -> None:
    recipe = tmp_path / "probe.toml"
    recipe.write_text("steps = 3\n[crop]\nshare = 0.25\n")
    config = load(ProbeConfig, str(recipe), ["head.crop.share=0.5"])
    assert config.head.crop == Crop(share=0.5)
    assert (config.steps, config.crop.share) == (None, 0.25)
    assert load(ProbeConfig, str(recipe), ["steps=4"]).crop.share == 0.25  # of the same name, in another section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crop.scael=1", r"crop\.scael: no such key \(override\); did you mean crop\.scale\?"),
        ("zebra=1", r"zebra: no such key .*sections: head, crop, steps, files"),
        ("crop.scale=[2, 1]", r"^crop\.scale=\(2\.0, 1\.0\): low <= high$"),
        ("head.crop.scale=[2, 1]", r"^head\.crop\.scale=\(2\.0, 1\.0\): low <= high$"),
        ("crop.scale=[2]", r"^crop\.scale=\[2\]: give more than 1 values"),
        ("crop.share=0", r"^crop\.share=0: input should be greater than 0$"),
        ("head.kind=tube", r"^head\.kind=tube: input should be 'linear' or 'attentive'$"),
    ],
)
def test_a_wrong_override_is_named_by_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ProbeConfig, None, [override])

"""Which clips a run plays, as its recipe says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.train.config import PretrainConfig, load_recipe
from reelmae.train.pretraining import pretrain

MakeConfig = Callable[..., PretrainConfig]


def test_a_recipe_names_one_dataset_or_a_mix_and_what_is_played_of_them(tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        '[[data.mix]]\nurl = "s3://bucket/a"\nweight = 3\nwhere = "motion > 2"\n'
        '[[data.mix]]\nurl = "b"\nweight = 1\nfraction = [0.0, 0.9]\n'
    )
    [a, b] = load_recipe(str(recipe), ["run.out=x", "run.steps=1"]).data.mix
    assert (a.url, a.weight, a.selection().where) == ("s3://bucket/a", 3, "motion > 2")
    assert (b.url, b.weight, b.selection().fraction) == ("b", 1, (0.0, 0.9))
    one = load_recipe(None, ["data.url=a", "data.where=label != 'x'", "run.out=x", "run.steps=1"]).data
    assert one.selection().where == "label != 'x'"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data"),
        (["data.duplicates=true"], r"data\.url: is not given; add data\.url=VALUE"),
        (["data.url=a", 'data.mix=[{url="b"}]'], r"data\.url beside data\.mix: put it into the parts"),
        (['data.mix=[{url="b", weight=-1}]'], r"data\.mix\.0\.weight=-1: .*greater than 0"),
        (["data.url=a", "data.wheer=x"], r"data\.wheer: no such key .*data\.where"),
    ],
)
def test_what_cannot_be_played_is_refused_by_name(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [*given, "run.out=x", "run.steps=1"])


def test_a_run_on_a_mix_resumes_and_refuses_other_weights(tiny: MakeConfig, dataset: str, other_dataset: str) -> None:
    def mixed(weight: float, *more: str) -> PretrainConfig:
        config = tiny(*more).model_dump()
        config["data"] = {"mix": [{"url": dataset, "weight": weight}, {"url": other_dataset, "weight": 1}]}
        return PretrainConfig.model_validate(config)

    pretrain(mixed(3, "run.steps=2"))
    assert pretrain(mixed(3, "run.steps=4")).steps == 4
    with pytest.raises(ConfigError, match="another selection of it, than before"):
        pretrain(mixed(2, "run.steps=6"))


def test_bad_clips_are_listed_beside_the_run(tiny: MakeConfig, dataset: str, tmp_path: Path) -> None:

    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    shard = sorted((copy / "shards").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    at = data.index(b"mdat") + 20  # within the first clip's pictures
    data[at : at + 20] = bytes(20)
    shard.write_bytes(data)
    summary = pretrain(tiny("run.steps=3", f"data.url={copy}"))
    [line] = (tmp_path / "run/bad_clips.jsonl").read_text().splitlines()
    assert list(summary.bad_clips) == [json.loads(line)["key"]]

"""Which clips a run plays, as its recipe says."""

import json
import shutil
import traceback
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
        (["data.url=a", "data.patience=-1"], r"data\.patience=-1: give minutes, 0 or more"),
        (
            ['data.mix=[{url="b"}]', "data.storage_options=@x"],
            r"storage_options beside data\.mix: put it into the parts",
        ),
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


# --- how a store is reached

SECRET = "hunter2-very-secret"


@pytest.mark.parametrize(
    "given",
    [
        ["data.url=a", f'data.storage_options={{"secret": "{SECRET}"}}'],
        ["data.url=a", f'data.storage_options={{secret = "{SECRET}"}}'],
        [f'data.mix=[{{url="a", storage_options=\'{{"secret": "{SECRET}"}}\'}}]'],
        [f'data.mix=[{{url="a", storage_options={{secret="{SECRET}"}}}}]'],
        [f'data.mix=[{{url="a", storage_options={{secret="{SECRET}"}}'],  # a bracket is missing
    ],
)
def test_options_within_a_recipe_are_refused_and_not_shown(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.mix|@FILE only; put the JSON into a file") as e:
        load_recipe(None, [*given, "run.out=x", "run.steps=1"])
    assert SECRET not in "".join(traceback.format_exception(e.value))


def test_options_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"secret": SECRET}))
    given = ["data.url=a", f"data.storage_options=@{file}", "data.patience=0.5", "run.out=x", "run.steps=1"]
    data = load_recipe(None, given).data
    assert (data.access().options, data.access().patience_s) == ({"secret": SECRET}, 30)
    assert SECRET not in repr(data)
    file.write_text(f"[{SECRET}")
    with pytest.raises(ConfigError, match=r"data\.storage_options: .*options\.json: is not a JSON object") as e:
        data.access()
    assert SECRET not in str(e.value)


def test_each_part_of_a_mix_is_reached_in_its_own_way(dataset: str, tmp_path: Path) -> None:
    keys = [tmp_path / "a.json", tmp_path / "b.json"]
    for i, key in enumerate(keys):
        key.write_text(json.dumps({"key": i}))
    parts = ", ".join(f'{{url="{dataset}", storage_options="@{key}", patience={i}}}' for i, key in enumerate(keys))
    index = load_recipe(None, [f"data.mix=[{parts}]", "run.out=x", "run.steps=1"]).data.open()
    assert [dict(store.access.options) for store in index.stores] == [{"key": 0}, {"key": 1}]
    assert [store.access.patience_s for store in index.stores] == [0, 60]


def test_other_credentials_and_patience_go_on_with_the_same_run(tiny: MakeConfig, tmp_path: Path) -> None:
    pretrain(tiny("run.steps=2"))
    file = tmp_path / "renewed.json"
    file.write_text("{}")
    assert pretrain(tiny("run.steps=4", f"data.storage_options=@{file}", "data.patience=1")).steps == 4

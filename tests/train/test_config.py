"""Recipes and overrides: what they mean, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelmae.model.config import MotionConfig, motion_config, videomae_config
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.batch import MEAN, STD
from reelmae.train.config import RECIPES, difference, from_json, load

GIVEN = ["data.url=shards", "run.out=runs/a"]


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_every_recipe_builds_its_model_and_loader_config(recipe: str) -> None:
    config = load(recipe, GIVEN)
    mae, loader = config.model.mae(), config.loader_config()
    assert loader.grid_THW == mae.grid_THW
    assert (loader.sample.frames, loader.sample.size) == (mae.frames, mae.size)
    assert (RECIPES / f"{recipe}.toml").read_text().startswith("#")


def test_learning_rate_counts_videos_and_not_repeats() -> None:
    config = load(None, [*GIVEN, "run.steps=1", "optim.blr=1.6e-3", "loader.batch_videos=512", "loader.repeats=4"])
    assert config.lr() == pytest.approx(3.2e-3)


def test_an_objective_is_its_preset_with_what_differs() -> None:
    videomae = load(None, [*GIVEN, "run.steps=1", "model.objective=videomae", "model.decoder_depth=2"])
    assert videomae.model.mae() == videomae_config("B", decoder_depth=2)
    motion = load(
        None,
        [
            *GIVEN,
            "run.steps=1",
            "model.objective=motion",
            "model.motion.gap=2",
            "model.motion.decoders=shared",
        ],
    )
    assert motion.model.mae() == motion_config("B", motion=MotionConfig(gap=2, decoders="shared"))
    assert from_json(motion.model_dump_json()) == motion


def test_another_objective_is_a_difference_both_ways() -> None:
    plain = load(None, [*GIVEN, "run.steps=1", "model.objective=motion"])
    given = load(None, [*GIVEN, "run.steps=1", "model.objective=motion", "model.motion.gap=2"])
    mae = load(None, [*GIVEN, "run.steps=1"])
    assert difference(mae, plain) == ["model.objective=mae (was motion)"]
    for one, other in ((given, mae), (mae, given), (given, plain), (plain, given)):
        told = "; ".join(difference(one, other))
        assert "model.motion.gap=" in told and ("model.objective=" in told) == (mae in (one, other))


def test_motion_settings_without_motion_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.motion: is of model.objective=motion, not of mae"):
        load(None, [*GIVEN, "run.steps=1", "model.motion.gap=2"])
    with pytest.raises(ConfigError, match=r"model.motion.gap=16: give less than frames=16"):
        load(None, [*GIVEN, "run.steps=1", "model.objective=motion", "model.motion.gap=16"])


def test_targets_are_made_of_pixels_as_the_loader_normalises_them() -> None:
    mae = videomae_config("B")
    assert mae.pixel_mean == (MEAN,) * 3 and mae.pixel_std == (STD,) * 3


def test_overrides_are_toml_and_text_needs_no_quotes() -> None:
    config = load("demo", [
        "data.url=2024", "run.out='runs/b'", "loader.sample.scale=[0.25, 1.0]", "model.encoder=dense", "run.compile=true",
    ])  # fmt: skip
    assert config.data.url == "2024"
    assert config.run.out == "runs/b"
    assert config.loader.sample.scale == (0.25, 1.0)
    assert config.model.mae().encoder == "dense"
    assert config.run.compile


def test_one_of_two_exclusive_keys_replaces_the_recipes_other_one() -> None:
    config = load("mae_st_vit_b", [*GIVEN, "run.steps=7", "loader.sample.stride=4"])
    assert (config.run.steps, config.run.epochs) == (7, None)
    assert (config.loader.sample.stride, config.loader.sample.fps) == (4, None)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("loader.batch_vidoes=3", ["loader.batch_vidoes", "did you mean loader.batch_videos?"]),
        ("batch_videos=3", ["did you mean loader.batch_videos?"]),
        ("zebra=1", ["zebra: no such key", "sections: data, loader, model, optim, run"]),
        ("steps", ["steps: is no override", "section.key=value"]),
        ("loader.batch_videos=0", ["loader.batch_videos=0", "greater than or equal to 1"]),
        ("run.steps=many", ["run.steps=many", "integer"]),
        ("loader.mask.ratio=1.5", ["loader.mask.ratio=1.5", "less than 1"]),
        ("loader.mask.ratio=0.9999", ["loader.mask.ratio=0.9999", "leaves no token"]),
        ("model.frames=15", ["model.frames=15", "such as 14"]),
        ("model.preset=vit_x", ["model.preset='vit_x'", "vit_b"]),
        ("run.out=s3://bucket/x", ["run.out=s3://bucket/x", "local folder"]),
        ("run.precision=fp8", ["run.precision=fp8", "bf16"]),
    ],
)
def test_a_wrong_override_is_told_the_key_the_value_and_the_remedy(override: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        load("demo", [*GIVEN, override])
    assert all(text in str(e.value) for text in told), str(e.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.out: is not given; add run\.out=VALUE"):
        load("demo", ["data.url=shards"])
    with pytest.raises(ConfigError, match="give exactly one"):
        load(None, GIVEN)


def test_a_wrong_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"demoo: no such recipe; .* one of demo, mae_st_vit_b"):
        load("demoo", GIVEN)
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(ConfigError, match="is no valid TOML"):
        load(str(broken), GIVEN)
    broken.write_text("[run]\nstep = 3\n")
    with pytest.raises(ConfigError, match=r"run\.step: no such key \(.*broken\.toml\); did you mean run\.steps\?"):
        load(str(broken), GIVEN)


def test_a_config_survives_json_and_names_what_differs() -> None:
    a = load("demo", GIVEN)
    assert from_json(a.model_dump_json()) == a
    b = load(
        "demo",
        [*GIVEN, "run.steps=9", "run.out=x", "loader.workers=3", "optim.blr=0.5", "loader.mask.kind=tube"],
    )
    assert difference(b, a) == ["loader.mask.kind=tube (was random)", f"optim.blr=0.5 (was {a.optim.blr})"]

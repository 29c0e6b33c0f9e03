"""Recipes and overrides: what they mean, and what a wrong one is told."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from reelmae.model.config import MAEConfig, MotionConfig, motion_config, videomae_config
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.config import PIXEL_MEAN, PIXEL_STD, LoaderOptions
from reelmae.pipeline.loading.order.draws import SampleOptions
from reelmae.train.config import difference, from_json, load_recipe
from reelmae.train.optim import OptimConfig
from reelmae.train.recipe import RECIPES

GIVEN = ["data.url=shards", "run.out=runs/a"]


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_every_recipe_builds_its_model_and_loader_config(recipe: str) -> None:
    config = load_recipe(recipe, GIVEN)
    mae, loader = config.model.mae(), config.loader_config()
    assert loader.grid_THW == mae.grid_THW
    assert (loader.sample.frames, loader.sample.size) == (mae.frames, mae.size)
    assert (RECIPES / f"{recipe}.toml").read_text().startswith("#")


def test_learning_rate_counts_videos_and_not_repeats() -> None:
    config = load_recipe(
        None, [*GIVEN, "run.steps=1", "optim.blr=1.6e-3", "loader.batch_videos=512", "loader.repeats=4"]
    )
    assert config.lr() == pytest.approx(3.2e-3)


def test_an_objective_is_its_preset_with_what_differs() -> None:
    videomae = load_recipe(None, [*GIVEN, "run.steps=1", "model.objective=videomae", "model.decoder_depth=2"])
    assert videomae.model.mae() == videomae_config("B", decoder_depth=2)
    changes = ["model.objective=motion", "model.motion.gap=2", "model.motion.decoders=shared"]
    motion = load_recipe(None, [*GIVEN, "run.steps=1", *changes])
    assert motion.model.mae() == motion_config("B", motion=MotionConfig(gap=2, decoders="shared"))
    assert from_json(motion.model_dump_json()) == motion


def test_another_objective_is_a_difference_both_ways() -> None:
    plain = load_recipe(None, [*GIVEN, "run.steps=1", "model.objective=motion"])
    given = load_recipe(None, [*GIVEN, "run.steps=1", "model.objective=motion", "model.motion.gap=2"])
    mae = load_recipe(None, [*GIVEN, "run.steps=1"])
    assert difference(mae, plain) == ["model.objective=mae (was motion)"]
    for one, other in ((given, mae), (mae, given), (given, plain), (plain, given)):
        told = "; ".join(difference(one, other))
        assert "model.motion.gap=" in told and ("model.objective=" in told) == (mae in (one, other))


def test_motion_settings_without_motion_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.motion: is of model.objective=motion, not of mae"):
        load_recipe(None, [*GIVEN, "run.steps=1", "model.motion.gap=2"])
    with pytest.raises(ConfigError, match=r"model.motion.gap=16: give less than frames=16"):
        load_recipe(None, [*GIVEN, "run.steps=1", "model.objective=motion", "model.motion.gap=16"])


def test_targets_are_made_of_pixels_as_the_loader_normalises_them() -> None:
    mae = videomae_config("B")
    assert mae.pixel_mean == PIXEL_MEAN and mae.pixel_std == PIXEL_STD


def test_overrides_are_toml_and_text_needs_no_quotes() -> None:
    values = ["loader.sample.scale=[0.25, 1.0]", "model.encoder=dense", "run.compile=true"]
    config = load_recipe("demo", ["data.url=2024", "run.out='runs/b'", *values])
    assert config.data.url == "2024"
    assert config.run.out == "runs/b"
    assert config.loader.sample.scale == (0.25, 1.0)
    assert config.model.mae().encoder == "dense"
    assert config.run.compile


def test_one_of_two_exclusive_keys_replaces_the_recipes_other_one() -> None:
    config = load_recipe("mae_st_vit_b", [*GIVEN, "run.steps=7", "loader.sample.stride=4"])
    assert (config.run.steps, config.run.epochs) == (7, None)
    assert (config.loader.sample.stride, config.loader.sample.fps) == (4, None)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("loader.batch_vidoes=3", ["loader.batch_vidoes", "did you mean loader.batch_videos?"]),
        ("batch_videos=3", ["did you mean loader.batch_videos?"]),
        ("zebra=1", ["zebra: no such key", "sections: data, loader, model, optim, run"]),
        ("steps", ["steps: is not an override", "section.key=value"]),
        ("loader.batch_videos=0", ["loader.batch_videos=0", "greater than or equal to 1"]),
        ("run.steps=many", ["run.steps=many", "integer"]),
        ("loader.mask.ratio=1.5", ["loader.mask.ratio=1.5", "0 <= ratio < 1"]),
        ("loader.mask.ratio=0", ["loader.mask.ratio=0", "more than 0"]),
        ("loader.mask.ratio=0.9999", ["loader.mask.ratio=0.9999", "leaves no token"]),
        ("model.frames=15", ["model.frames=15", "such as 14"]),
        ("model.preset=vit_x", ["model.preset='vit_x'", "vit_b"]),
        ("run.out=s3://bucket/x", ["run.out=s3://bucket/x", "local folder"]),
        ("run.precision=fp8", ["run.precision=fp8", "bf16"]),
    ],
)
def test_a_wrong_override_is_told_the_key_the_value_and_the_remedy(override: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        load_recipe("demo", [*GIVEN, override])
    assert all(text in str(e.value) for text in told), str(e.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.out: is not given; add run\.out=VALUE"):
        load_recipe("demo", ["data.url=shards"])
    with pytest.raises(ConfigError, match="give exactly one"):
        load_recipe(None, GIVEN)


def test_a_wrong_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"demoo: no such recipe; .* one of demo, mae_st_vit_b"):
        load_recipe("demoo", GIVEN)
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_recipe(str(broken), GIVEN)
    broken.write_text("[run]\nstep = 3\n")
    with pytest.raises(ConfigError, match=r"run\.step: no such key \(.*broken\.toml\); did you mean run\.steps\?"):
        load_recipe(str(broken), GIVEN)


def test_a_config_survives_json_and_names_what_differs() -> None:
    a = load_recipe("demo", GIVEN)
    assert from_json(a.model_dump_json()) == a
    changes = ["run.steps=9", "run.out=x", "loader.workers=3", "optim.blr=0.5", "loader.mask.kind=tube"]
    b = load_recipe("demo", [*GIVEN, *changes])
    assert difference(b, a) == ["loader.mask.kind=tube (was random)", f"optim.blr=0.5 (was {a.optim.blr})"]


def test_a_sections_defaults_are_those_of_the_part_that_uses_it() -> None:
    config = load_recipe(None, [*GIVEN, "run.steps=1"])
    assert config.loader == LoaderOptions(sample=SampleOptions(fps=7.5)) and config.optim == OptimConfig()
    assert load_recipe(None, [*GIVEN, "run.steps=1", "loader.sample.flip=false"]).loader.sample.fps == 7.5
    assert config.model.mae() == MAEConfig()
    names = {f.name for f in fields(MAEConfig)}
    assert {*dict(config.model)} == {*names, "objective", "preset"}


def test_pixel_statistics_of_the_model_are_the_loaders() -> None:
    colours = ["model.pixel_mean=[0.4, 0.5, 0.6]", "model.pixel_std=[0.1, 0.2, 0.3]"]
    config = load_recipe("demo", [*GIVEN, *colours])
    assert (config.model.mae().pixel_mean, config.model.mae().pixel_std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    loader = config.loader_config()
    assert (loader.pixel_mean, loader.pixel_std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match=r"model\.pixel_std=\(0\.0, 1\.0, 1\.0\): give more than 0"):
        load_recipe("demo", [*GIVEN, "model.pixel_std=[0, 1, 1]"])
    with pytest.raises(ConfigError, match=r"model\.pixel_mean=\[0\.4, 0\.5\]: give more than 2 values"):
        load_recipe("demo", [*GIVEN, "model.pixel_mean=[0.4, 0.5]"])


def test_the_config_of_an_earlier_version_is_read_and_no_other_run() -> None:
    """It wrote null for what was not given, did not know some keys, and had 7.5 as the rate's default."""
    text = """{
        "data": {"where": null, "fraction": null, "keys": null, "duplicates": false, "url": "shards", "mix": []},
        "loader": {"backend": "auto", "batch_videos": 8, "repeats": 2, "workers": 1, "pipelines": 1, "prefetch": null,
            "sample": {"stride": null, "fps": 7.5, "scale": [0.5, 1.0], "ratio": [0.75, 1.3333333333333333], "flip": true},
            "mask": {"kind": "random", "ratio": 0.9}, "decoder_mask": {"kind": "none", "ratio": 0.5},
            "lanes": 64, "decode": "auto", "cache": null, "cache_gb": 100.0, "max_bad_fraction": 0.01},
        "model": {"objective": "motion", "preset": "T", "frames": 16, "size": 64, "patch": 8, "t_patch": null, "dim": null,
            "pred_t_dim": null, "unit_pixels": null,
            "motion": {"decoders": null, "gap": 2, "sign": null, "norm": null, "weight": null}},
        "optim": {"blr": 0.096, "betas": [0.9, 0.95], "weight_decay": 0.05, "decay": "mae_st", "schedule": "after_warmup",
            "warmup": 0.1, "start_lr": 0.0, "min_lr": 0.0, "clip_grad": 1.0},
        "run": {"out": "runs/old", "init": null, "init_allow": [], "steps": 600, "epochs": null, "seed": 0,
            "device": "cpu", "precision": "auto", "compile": false, "checkpointing": false, "threads": null,
            "log_every": 10, "checkpoint_every": 200}
    }"""
    loader = ["loader.batch_videos=8", "loader.repeats=2", "loader.prefetch=3"]
    model = ["model.objective=motion", "model.preset=T", "model.size=64", "model.patch=8", "model.frames=16"]
    optim = ["optim.blr=0.096", "optim.warmup=0.1", "optim.clip_grad=1.0"]
    given = [*GIVEN, "run.steps=700", *loader, *model, *optim]
    assert difference(load_recipe(None, [*given, "model.motion.gap=2"]), from_json(text)) == []
    assert difference(load_recipe(None, [*given, "model.motion.gap=2", "loader.sample.stride=4"]), from_json(text)) == [
        "loader.sample.stride=4 (was None)",
        "loader.sample.fps=None (was 7.5)",
    ]
    assert difference(load_recipe(None, [*given, "model.motion.gap=1"]), from_json(text)) == [
        "model.motion.gap=1 (was 2)"
    ]

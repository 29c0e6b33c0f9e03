"""The pictures of a reconstruction: sizes, frames, and that kept patches are shown as they went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reelmae.model.config import mae_config
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import find_checkpoint, load_model
from reelmae.model.weights.configs import config_to_json
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.config import PIXEL_MEAN, PIXEL_STD
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order.draws import Draw
from reelmae.tools.reconstruct import GREY, _draw, draw_frames, draw_grid, make_panels, reconstruct
from reelmae.train.checkpoint import save
from reelmae.train.config import load_config

TILE = 40
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_model(**changes: object) -> MaskedAutoencoder:
    sizes = {
        "frames": 8,
        "size": 32,
        "patch": 8,
        "dim": 24,
        "depth": 1,
        "heads": 2,
        "decoder_dim": 16,
        "decoder_depth": 1,
    }
    torch.manual_seed(0)
    return MaskedAutoencoder(mae_config("T", **{**sizes, "decoder_heads": 2, **changes})).eval()


def small_pixels(model: MaskedAutoencoder, clips: int = 3) -> torch.Tensor:
    """Pixels in 0 … 1, float32 [B, C, T, H, W]."""
    c = model.config
    return torch.rand(clips, 3, c.frames, c.size, c.size, generator=torch.Generator().manual_seed(0))


def small_batch(model: MaskedAutoencoder, clips: int = 3, kept: int = 6) -> ClipBatch:
    c = model.config
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (c.pixel_mean, c.pixel_std))
    ids = torch.stack([torch.randperm(c.n_tokens, generator=generator)[:kept].sort().values for _ in range(clips)])
    return ClipBatch(
        clips_BCTHW=(small_pixels(model, clips) - mean) / std,
        ids_keep_BK=ids,
        clip_B=np.arange(clips),
        repeat_B=np.zeros(clips, np.int64),
        label_B=torch.full((clips,), -1),
        draws=[Draw(0, 1, 0, 0, 32, 32, False, 0)] * clips,
        epoch=0,
        step=0,
    )


def true_frames(model: MaskedAutoencoder, batch: ClipBatch) -> np.ndarray:
    """The true target frames, uint8 [B, T, H, W, 3]."""
    frames = batch.clips_BCTHW[:, :, model.config.target_frame_index()] * PIXEL_STD[0] + PIXEL_MEAN[0]
    return (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def test_kept_patches_are_shown_as_they_went_in_and_removed_ones_are_not() -> None:
    model = small_model()
    batch = small_batch(model)
    original, masked, reconstructed = make_panels(model, batch, 0.1).films
    truth = true_frames(model, batch)
    assert np.array_equal(original, truth)
    t, h, w = model.config.grid_THW
    side = model.config.patch
    for b, ids in enumerate(batch.ids_keep_BK.tolist()):
        for token in range(t * h * w):
            ti, y, x = token // (h * w), token // w % h * side, token % w * side
            where = (b, ti, slice(y, y + side), slice(x, x + side))
            if token in ids:
                assert np.array_equal(reconstructed[where], truth[where])
                assert np.array_equal(masked[where], truth[where])
            else:
                assert len(np.unique(masked[where])) == 1
                assert not np.array_equal(reconstructed[where], truth[where])


def test_a_perfect_prediction_gives_back_the_clip() -> None:
    class Perfect(MaskedAutoencoder):
        def predict(self, clips_BCTHW: torch.Tensor, *_: object) -> torch.Tensor:
            everything = torch.arange(self.config.n_tokens).expand(len(clips_BCTHW), -1)
            return self.targets.space(clips_BCTHW, everything)

    model = small_model()
    model.__class__ = Perfect
    batch = small_batch(model)
    original, _, reconstructed = make_panels(model, batch, 0.1).films
    assert np.abs(original.astype(int) - reconstructed).max() <= 1


def test_frames_stand_for_their_time_in_the_clip() -> None:
    model = small_model()
    assert model.config.target_frame_index() == [0, 2, 4, 7]
    assert make_panels(model, small_batch(model), 0.1).durations_ms == [200, 200, 300, 100]
    every = small_model(pred_t_dim=8)
    panels = make_panels(every, small_batch(every), 0.05)
    assert panels.durations_ms == [50] * 8
    assert panels.films[2].shape == (3, 8, 32, 32, 3)


def test_three_panels_of_equal_size_side_by_side() -> None:
    model = small_model()
    panels = make_panels(model, small_batch(model, clips=1), 0.1)
    frames = draw_frames(panels, TILE)
    assert len(frames) == 4
    assert frames[0].width == 3 * TILE + 2 * 3
    for i, film in enumerate(panels.films):
        box = frames[2].crop((i * (TILE + 3), 24, i * (TILE + 3) + TILE, 24 + TILE))
        wanted = Image.fromarray(film[0, 2]).resize((TILE, TILE), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(box), np.asarray(wanted))
    grid = draw_grid(panels, TILE)
    assert grid.height > 3 * TILE
    assert grid.width > 4 * TILE


def test_a_trained_run_gives_a_png_an_animation_and_facts(tiny_run: Path, tmp_path: Path) -> None:
    facts = reconstruct(tiny_run / "train", str(tiny_run / "shards"), tmp_path / "out", clips=4)
    with Image.open(facts["png"]) as png:
        assert png.format == "PNG"
        assert png.width > 8 * 128
        assert png.height > 4 * 3 * 128
    with Image.open(facts["animation"]) as animation:
        assert animation.n_frames == facts["frames_shown"] == 8
        assert animation.width == 2 * (3 * 128 + 6) + 18
        first = np.asarray(animation.convert("RGB")).astype(int)
        animation.seek(4)
        assert np.abs(np.asarray(animation.convert("RGB")) - first).mean() > 0.5
    assert len(set(facts["keys"])) == 4
    assert "mean" in facts["caption"]
    assert json.loads((tmp_path / "out" / "reconstruction.json").read_text())["loss"] == facts["loss"]
    again = reconstruct(tiny_run / "train", str(tiny_run / "shards"), tmp_path / "again", clips=4)
    assert Path(again["png"]).read_bytes() == Path(facts["png"]).read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_what_is_no_run_is_named(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        reconstruct(tmp_path / "nowhere", str(tiny_run / "shards"), tmp_path / "out")
    with pytest.raises(InputError, match="holds no checkpoints"):
        reconstruct(tmp_path, str(tiny_run / "shards"), tmp_path / "out")
    with pytest.raises(ConfigError, match="clips=0"):
        reconstruct(tiny_run / "train", str(tiny_run / "shards"), tmp_path / "out", clips=0)


@pytest.mark.parametrize("stats", [IMAGENET, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_a_model_with_statistics_of_its_own_is_drawn_in_the_right_colours(
    tiny_run: Path, stats: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    """The pixels come from the real loader, which normalises them by the model's statistics."""
    config = load_config(find_checkpoint(tiny_run / "train"))
    changes = {"pixel_mean": stats[0], "pixel_std": stats[1]}
    other = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    index = ClipIndex.open(str(tiny_run / "shards"))
    films = []
    for wanted in (config, other):
        model = MaskedAutoencoder(wanted.model.mae()).eval()
        batch = _draw(index, wanted, 2, 0)
        films.append(make_panels(model, batch, 0.1).films)
    assert not torch.equal(_draw(index, config, 2, 0).clips_BCTHW, batch.clips_BCTHW)
    for usual, own in zip(films[0][:2], films[1][:2], strict=True):  # original and masked
        assert np.array_equal(usual, own)
    assert films[1][0].std() > 10


def test_kept_patches_and_removed_ones_are_right_with_other_statistics() -> None:
    model = small_model(pixel_mean=IMAGENET[0], pixel_std=IMAGENET[1])
    pixels, batch = small_pixels(model), small_batch(model)
    original, masked, _ = make_panels(model, batch, 0.1).films
    stored = (pixels[:, :, model.config.target_frame_index()] * 255).round().to(torch.uint8)
    assert np.array_equal(original, stored.permute(0, 2, 3, 4, 1).numpy())
    grey = (masked != original).any(-1)
    assert grey.mean() > 0.8 and set(np.unique(masked[grey])) == {round(GREY * 255)}


def test_a_model_that_predicts_no_pixels_is_told(tiny_run: Path, tmp_path: Path) -> None:
    trained, config = load_model(tiny_run / "train"), load_config(find_checkpoint(tiny_run / "train"))
    hog = config.model_copy(update={"model": config.model.model_copy(update={"target": "hog"})})
    model = MaskedAutoencoder(hog.model.mae())
    facts = {"config": hog.model_dump_json(), "model_config": config_to_json(model.config)}
    path = save(tmp_path, 1, {**facts, "model": model.state_dict()})
    assert isinstance(trained, MaskedAutoencoder) and trained.config.target == "pixels"
    with pytest.raises(InputError, match=r"predicts target='hog', no pixels"):
        reconstruct(path, str(tiny_run / "shards"), tmp_path / "out")

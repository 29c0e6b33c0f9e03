"""Pictures of what a pretrained model fills in: original | masked | reconstructed, as a PNG and as an animation.

Properties that hold:
- Clips, windows, crops and masks come from the real loader, with a seed that no training run uses. The model may have
  been trained on these clips, but not on these windows, crops and masks of them.
- The model paints removed patches only; kept patches are shown as they went in. With normalised targets each painted
  patch gets the mean and the deviation of the true one, which are not predicted. Such pictures are usually made so, and
  the caption says it.
- A model that predicts one frame per tube is shown at those frames, each for the time until the next.
- Pixels are normalised on the way in by the model's own `pixel_mean` and `pixel_std`, and on the way out by the same.

Legend: B batch, C channel, T frame, H height, W width, K kept token, L token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.patches import unpatchify
from reelmae.model.weights import find_checkpoint, load_model
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import whole_file
from reelmae.train.config import PretrainConfig, load_config

ROWS = ("original", "masked", "reconstructed")
PNG, ANIMATION, FACTS = "reconstruction.png", "reconstruction.webp", "reconstruction.json"
PICTURE_SEED = 0x5EED_0000  # far from the seeds that people train with: other windows, crops and masks
GREY = 0.45  # of a removed patch, in 0 … 1
INK, PAPER = (31, 35, 40), (255, 255, 255)

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Panels:
    """What is drawn of a batch."""

    films: tuple[U8, U8, U8]
    """Original, masked and reconstructed, each uint8 [B, T, H, W, 3]."""
    durations_ms: list[int]
    """How long each frame is shown."""
    loss: float
    """The model's loss on the removed patches of these clips."""


def reconstruct(
    checkpoint: str | Path,
    data: str,
    out: str | Path,
    *,
    clips: int = 6,
    seed: int = 0,
    tile: int = 128,
    access: Access | None = None,
) -> dict[str, Any]:
    """Write OUT/reconstruction.png, .webp (animated) and .json; returns what the last holds.

    `checkpoint`: a run's folder or a checkpoint file. `data`: a shard dataset, reached by `access`. `tile`: side of a shown
    frame in pixels.
    Raises ConfigError and InputError on bad arguments.
    """
    if clips < 1:
        raise ConfigError(f"clips={clips}: give at least 1")
    path = find_checkpoint(checkpoint)
    index = ClipIndex.open(data, access=access)
    config, model = load_config(path), load_model(path)
    assert isinstance(model, MaskedAutoencoder), type(model)
    if model.config.target != "pixels":
        raise InputError(
            f"{path}: predicts target={model.config.target!r}, no pixels; give a model that predicts pixels"
        )
    batch = _draw(index, config, min(clips, len(index)), seed)
    panels = make_panels(model, batch, _frame_seconds(index, batch))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tile = max(tile, model.config.size)
    grid = draw_grid(panels, tile)
    with whole_file(out / PNG) as part:
        grid.save(part, "PNG", optimize=True)
    frames = draw_frames(panels, tile)
    with whole_file(out / ANIMATION) as part:
        options = {"duration": panels.durations_ms, "loop": 0, "quality": 85, "method": 4}
        frames[0].save(part, "WEBP", save_all=True, append_images=frames[1:], **options)
    facts = {
        "checkpoint": str(path),
        "data": data,
        "clips": len(batch),
        "keys": [index.key(int(clip)) for clip in batch.clip_B],
        "seed": seed,
        "mask": dict(config.loader_config().mask.__dict__),
        "frames_shown": len(panels.durations_ms),
        "loss": panels.loss,
        "caption": caption(model, batch, panels),
        "png": str(out / PNG),
        "animation": str(out / ANIMATION),
    }
    with whole_file(out / FACTS) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def caption(model: MaskedAutoencoder, batch: ClipBatch, panels: Panels) -> str:
    """What the picture shows, in one or two sentences."""
    c = model.config
    kept, patch = batch.ids_keep_BK.shape[1], f"{c.t_patch}×{c.patch}×{c.patch}"
    text = (
        f"{kept} of {c.n_tokens} patches ({patch}) are seen, {1 - kept / c.n_tokens:.0%} are removed. Reconstructed: "
        f"removed patches are the model's prediction, kept ones are shown as they went in."
    )
    if c.target_norm != "none":
        text += " Each predicted patch is given the mean and deviation of the true one, which are not predicted."
    text += f" Loss on these windows: {panels.loss:.3f}"
    return text + (" (predicting each patch's mean: 1.0)." if c.target_norm != "none" else ".")


def _draw(index: ClipIndex, config: PretrainConfig, clips: int, seed: int) -> ClipBatch:
    """One batch of `clips` different clips, each with one window, crop and mask."""
    changes = {
        "batch_videos": clips,
        "repeats": 1,
        "seed": PICTURE_SEED + seed,
        "workers": 0,
        "prefetch": 1,
        "backend": "auto",
        "device": "cpu",
    }
    with ClipLoader(index, config.loader_config().model_copy(update=changes)) as loader:
        return next(iter(loader))


def _frame_seconds(index: ClipIndex, batch: ClipBatch) -> float:
    """Time from one sampled frame to the next; the median over the clips, as one animation shows them all."""
    return float(np.median([d.stride / index.fps[clip] for d, clip in zip(batch.draws, batch.clip_B, strict=True)]))


@torch.no_grad()
def make_panels(model: MaskedAutoencoder, batch: ClipBatch, frame_seconds: float) -> Panels:
    """Run the model and compose the three films at the frames it predicts."""
    clips_BCTHW = batch.clips_BCTHW
    ids_keep_BK = batch.ids_keep_BK
    loss = model(clips_BCTHW, ids_keep_BK).losses["space"]
    c = model.config
    shown = c.target_frame_index()
    true_BCTHW = clips_BCTHW[:, :, shown]
    painted_BCTHW = model.to_clip(model.predict(clips_BCTHW, ids_keep_BK), clips_BCTHW)
    values = c.pixel_values
    removed_BL = torch.ones(len(clips_BCTHW), c.n_tokens).scatter(1, ids_keep_BK, 0.0)
    removed_BCTHW = unpatchify(removed_BL[..., None].expand(-1, -1, values), c.grid_THW, c.target_t_patch, c.patch)
    mean_C111, std_C111 = (torch.tensor(v).view(-1, 1, 1, 1) for v in (c.pixel_mean, c.pixel_std))
    films = (
        true_BCTHW,
        torch.where(removed_BCTHW > 0.5, (GREY - mean_C111) / std_C111, true_BCTHW),
        torch.where(removed_BCTHW > 0.5, painted_BCTHW, true_BCTHW),
    )
    ends = [*shown[1:], c.frames]
    durations = [round(1000 * frame_seconds * (b - a)) for a, b in zip(shown, ends, strict=True)]
    original, masked, reconstructed = (_pixels(film_BCTHW.float() * std_C111 + mean_C111) for film_BCTHW in films)
    return Panels((original, masked, reconstructed), durations, float(loss))


def _pixels(film_BCTHW: Tensor) -> U8:
    """Floats in 0 … 1 → uint8 [B, T, H, W, C]."""
    scaled = film_BCTHW.clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().numpy()


# --- drawing ---------------------------------------------------------------------------------------------------


def draw_grid(panels: Panels, tile: int) -> Image.Image:
    """For each clip three labelled rows, time from left to right."""
    clips, frames = panels.films[0].shape[:2]
    label, gap, head = 118, 3, 26
    block = 3 * tile + 2 * gap
    width = label + frames * (tile + gap) - gap + 8
    canvas = Image.new("RGB", (width, head + clips * (block + 16)), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    at = np.concatenate([[0], np.cumsum(panels.durations_ms)[:-1]]) / 1000
    for t in range(frames):
        pen.text((label + t * (tile + gap) + tile / 2, 6), f"{at[t]:.2f} s", INK, font, anchor="ma")
    for clip in range(clips):
        top = head + clip * (block + 16)
        for row, (name, film) in enumerate(zip(ROWS, panels.films, strict=True)):
            y = top + row * (tile + gap)
            pen.text((label - 10, y + tile / 2), name, INK, font, anchor="rm")
            for t in range(frames):
                canvas.paste(_tile(film[clip, t], tile), (label + t * (tile + gap), y))
    return canvas


def draw_frames(panels: Panels, tile: int) -> list[Image.Image]:
    """The animation: each clip as three panels side by side, clips in two columns."""
    clips, frames = panels.films[0].shape[:2]
    gap, space, head = 3, 18, 24
    columns = 1 if clips == 1 else 2
    rows = -(-clips // columns)
    triple = 3 * tile + 2 * gap
    size = (columns * triple + (columns - 1) * space, head + rows * (tile + space) - space)
    font = ImageFont.load_default(size=15)
    base = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(base)
    for column in range(columns):
        for i, name in enumerate(ROWS):
            x = column * (triple + space) + i * (tile + gap) + tile / 2
            pen.text((x, 4), name, INK, font, anchor="ma")
    pictures = []
    for t in range(frames):
        picture = base.copy()
        for clip in range(clips):
            y, x = head + clip // columns * (tile + space), clip % columns * (triple + space)
            for i, film in enumerate(panels.films):
                picture.paste(_tile(film[clip, t], tile), (x + i * (tile + gap), y))
        pictures.append(picture)
    return pictures


def _tile(frame_HWC: U8, side: int) -> Image.Image:
    return Image.fromarray(frame_HWC).resize((side, side), Image.Resampling.BICUBIC)

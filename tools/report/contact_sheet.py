"""The page's contact sheet: some clips of a shard dataset as small playing pictures.

Properties that hold: the bytes come by ranged reads out of the tars, as training reads them, so the sheet shows what is in
the shards and nothing else; a clip that cannot be read, or is not what the index says, has a card that says so.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import av
from PIL import Image

from reelmae.pipeline.dataset.contents import DatasetFacts
from reelmae.pipeline.dataset.sums import SHEET_CLIPS_PER_SOURCE
from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.loading.fetch.pieces import Damage, Piece, read_pieces
from reelmae.pipeline.storage.store import Store
from reelmae.tools.show import printable, short_name

THUMB_HEIGHT = 108
SHOWN_FPS = 7.5
SHOWN_SECONDS = 2.4


@dataclass(frozen=True)
class Thumb:
    """The pictures of one clip, as data: URIs; None where the clip could not be read."""

    row: dict[str, Any]
    """The clip's row of the index."""
    playing: str | None
    still: str | None
    problem: str = ""
    """Why the clip could not be read."""


def sheet(store: Store, dataset: DatasetFacts) -> str:
    """The section with the contact sheet; no clip on it repeats another. "" where there is no clip."""
    if not dataset.sheet:
        return ""
    src = str(dataset.about.get("src", ""))
    shown = f"{len(dataset.sheet)} of {dataset.clips:,} clips, spread over the whole dataset, "
    shown += f"at most {SHEET_CLIPS_PER_SOURCE} of one source"
    if len(dataset.sheet) == dataset.clips:
        shown = "All clips"
    cards = "".join(_card(_thumb(store, row), src) for row in dataset.sheet)
    return (
        f"<h2>Clips</h2><p>{shown}, read from "
        "the shards as training reads them. Each shows its first seconds, at its own speed."
        f"{' None of them repeats another.' if dataset.duplicates else ''}</p><div class=sheet>{cards}</div>"
    )


def _card(thumb: Thumb, src: str) -> str:
    row = thumb.row
    name = short_name(row["source"], src)
    text = f"{row['width']}×{row['height']} · {row['fps']:.4g} fps · {row['frames'] / row['fps']:.3g} s"
    if thumb.playing is None:
        picture = f"<span class=note>cannot be read: {escape(printable(thumb.problem[:80]))}</span>"
    else:
        picture = (
            f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{thumb.still}">'
            f'<img src="{thumb.playing}" alt="{escape(name)}"></picture>'
        )
    label = printable(str(row["label"] or Path(name).name))
    return (
        f'<figure><div class=frame>{picture}</div><figcaption title="{escape(name)} at {row["span_start_s"]:g} s">'
        f"{escape(label)}<br>{text}</figcaption></figure>"
    )


def _thumb(store: Store, row: dict[str, Any]) -> Thumb:
    try:
        piece = Piece(row["offset"], row["size"], int(row["sha256"][:16], 16))
        [data] = read_pieces(store, row["shard"], [piece])
        if isinstance(data, Damage):
            return Thumb(row, None, None, data.reason)
        frames = _frames(data, row["fps"])
    except (StorageError, FileNotFoundError, av.error.FFmpegError) as e:
        return Thumb(row, None, None, str(e))
    if not frames:
        return Thumb(row, None, None, "no frame could be decoded")
    playing, still = io.BytesIO(), io.BytesIO()
    milliseconds = round(1000 / SHOWN_FPS)
    animation = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    frames[0].save(playing, "WEBP", quality=62, method=4, **animation)
    frames[0].save(still, "WEBP", quality=70)
    return Thumb(row, data_uri(playing.getvalue(), "image/webp"), data_uri(still.getvalue(), "image/webp"))


def _frames(data: bytes, fps: float) -> list[Image.Image]:
    """Frames of the first SHOWN_SECONDS at SHOWN_FPS, THUMB_HEIGHT pixels high."""
    stride = max(1, round(fps / SHOWN_FPS))
    frames: list[Image.Image] = []
    with av.open(io.BytesIO(data)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % stride:
                continue
            width = max(2, round(frame.width * THUMB_HEIGHT / frame.height))
            frames.append(frame.to_image().resize((width, THUMB_HEIGHT), Image.Resampling.BILINEAR, reducing_gap=2))
            if len(frames) >= SHOWN_FPS * SHOWN_SECONDS:
                break
    return frames


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as a data: URI, so that the page needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"

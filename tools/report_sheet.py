"""The contact sheet: some clips of a shard dataset as small playing pictures, read the way a trainer reads them.

Properties that hold: bytes come by ranged reads out of the tars, so the
sheet shows what lies in the shards and nothing else; a clip that cannot be read is told of, not left out.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import av
from PIL import Image

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.storage import Store

THUMB_HEIGHT = 108
SHOWN_FPS = 7.5
SHOWN_SECONDS = 2.4


@dataclass(frozen=True)
class Thumb:
    """One clip: its index row, and its pictures as data: URIs (None where it could not be read, with the reason)."""

    row: dict[str, Any]
    playing: str | None
    still: str | None
    problem: str = ""


def contact_sheet(store: Store, rows: list[dict[str, Any]]) -> list[Thumb]:
    """A thumb of each of these index rows."""
    return [_thumb(store, row) for row in rows]


def _thumb(store: Store, row: dict[str, Any]) -> Thumb:
    try:
        frames = _frames(store.read_range(row["shard"], row["offset"], row["size"]), row["fps"])
    except (StorageError, FileNotFoundError, av.error.FFmpegError) as e:
        return Thumb(row, None, None, str(e))
    if not frames:
        return Thumb(row, None, None, "no frame could be decoded")
    playing, still = io.BytesIO(), io.BytesIO()
    frames[0].save(
        playing, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / SHOWN_FPS), loop=0, quality=62, method=4
    )  # fmt: skip
    frames[0].save(still, "WEBP", quality=70)
    return Thumb(row, data_uri(playing.getvalue(), "image/webp"), data_uri(still.getvalue(), "image/webp"))


def _frames(data: bytes, fps: float) -> list[Image.Image]:
    """Frames of the first seconds at `SHOWN_FPS`, `THUMB_HEIGHT` high."""
    stride = max(1, round(fps / SHOWN_FPS))
    frames: list[Image.Image] = []
    with av.open(io.BytesIO(data)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % stride:
                continue
            width = max(2, round(frame.width * THUMB_HEIGHT / frame.height))
            frames.append(
                frame.to_image().resize((width, THUMB_HEIGHT), Image.Resampling.BILINEAR, reducing_gap=2)
            )
            if len(frames) >= SHOWN_FPS * SHOWN_SECONDS:
                break
    return frames


def data_uri(data: bytes, mime: str) -> str:
    """The bytes within an address, so that a page needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"

"""Pure: which bytes of a clip its samples need, so that a window of a long clip costs its own bytes and not the clip's.

A pass (passes.py) needs the pictures from its keyframe to the last one in decoding order that is shown no later than its
last frame: with B-frames a few more than it shows, without them none. Their bytes follow each other in the file.
"""

from __future__ import annotations

import numpy as np

from reelmae.pipeline.loading.decode.mp4 import Track, read_track, tables_end
from reelmae.pipeline.loading.decode.passes import decode_passes
from reelmae.pipeline.loading.fetch.blocks import BLOCK, WORTH, Need
from reelmae.pipeline.loading.order.draws import frame_indices
from reelmae.pipeline.loading.tasks import ClipTask, DecodePolicy

USUAL_GOP = 16  # pictures from one keyframe to the next, guessed before the tables are read: reelmae shard's default


def needed_of(task: ClipTask, head: bytes, frames: int, policy: DecodePolicy) -> Need | None:
    """What of the clip is needed for samples of `frames` frames; see fetch/blocks.py. None where that is most of it."""
    wanted_RT = np.stack([frame_indices(draw, frames, task.frames) for draw in task.draws])
    if not head:
        guess = decode_passes(wanted_RT, range(0, task.frames, USUAL_GOP), policy)
        return Need(BLOCK) if sum(p.cost for p in guess) < task.frames * WORTH else None
    end = tables_end(head)
    if end is None or end > len(head):
        return None if end is None else Need(end)
    try:
        return Need(end, tuple(picture_ranges(read_track(head, task.size), wanted_RT, policy)))
    except (ValueError, IndexError):
        return None  # who decodes the whole clip says what is wrong with it


def picture_ranges(track: Track, wanted_RT: np.ndarray, policy: DecodePolicy) -> list[tuple[int, int]]:
    """(start, stop) in bytes of the pictures that R samples of T frame numbers need, one for each run that is whole."""
    ranges: list[tuple[int, int]] = []
    for p in decode_passes(wanted_RT, track.keyframes.tolist(), policy):
        at = slice(p.start, track.stop_after(p.wanted[-1]))
        starts, stops = track.offsets[at], track.offsets[at] + track.sizes[at]
        breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        firsts, lasts = np.append(0, breaks), np.append(breaks - 1, len(starts) - 1)
        ranges += zip(starts[firsts].tolist(), stops[lasts].tolist(), strict=True)
    return ranges

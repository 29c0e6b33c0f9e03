"""Pure: what the steps found out about a clip → its row of the index; a dropped span → its row of the rejects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reelmae.pipeline.ingest.clips.cut import Span, seconds
from reelmae.pipeline.ingest.clips.outcome import Dropped
from reelmae.pipeline.ingest.clips.probe import Probe, VerifiedClip
from reelmae.pipeline.ingest.clips.scores import Scores
from reelmae.pipeline.ingest.clips.screen import source_rate
from reelmae.pipeline.ingest.clips.source import Source
from reelmae.pipeline.ingest.clips.transcode import EncodePlan
from reelmae.pipeline.ingest.shards.pack import ClipRow
from reelmae.pipeline.schema import clip_key


def make_row(
    source: Source,
    probe: Probe,
    plan: EncodePlan,
    labels: Mapping[str, int],
    *,
    ordinal: int,
    span: Span,
    verified: VerifiedClip,
    scores: Scores,
) -> ClipRow:
    """The row of one clip. Shard, offset, size, hash and duplicates are left empty: packing and the ledger set them.

    `labels`: label → id. `ordinal`: number of the clip within its source.
    """
    kept = plan.kept
    row = source.row_of(span)
    label = source.label if row is None else row["label"]
    rate = source_rate(probe)
    return ClipRow(
        key=clip_key(source.url, ordinal),
        shard="",
        offset=0,
        size=0,
        sha256="",
        source=source.url,
        span_start_s=seconds(span.start, kept.fps),
        span_end_s=seconds(span.end, kept.fps),
        frames=verified.frames,
        fps=float(kept.fps),
        width=kept.width,
        height=kept.height,
        codec=verified.codec,
        label=label,
        label_id=-1 if label is None else labels[label],
        wanted_start_s=span.wanted_start_s,
        wanted_end_s=span.wanted_end_s,
        motion=scores.motion,
        luma=scores.luma,
        contrast=scores.contrast,
        border=scores.border,
        phash=scores.phash,
        duplicate_of=None,
        source_bytes=source.bytes,
        source_container=probe.container,
        source_codec=probe.codec,
        source_width=probe.width,
        source_height=probe.height,
        source_fps=float(rate or kept.fps),
        source_seconds=round(probe.duration_s, 6),
        encoder=plan.encoder,
        colour=plan.colour.rule,
        extra=json.loads(row["extra"]) if row is not None and row["extra"] else {},
    )


def make_reject_row(source: Source, dropped: Dropped) -> dict[str, Any]:
    """The row of one span that gives no clip."""
    return {
        "source": source.url,
        "span_start_s": dropped.span.wanted_start_s,
        "span_end_s": dropped.span.wanted_end_s,
        "reason": dropped.why.reason.value,
        "detail": dropped.why.detail,
    }

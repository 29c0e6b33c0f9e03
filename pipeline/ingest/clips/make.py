"""One fetched source → its clips with their rows, or why there are none: probe, screen, cut, transcode, verify, score.

Spans that give no clip (beyond the end, too short, screened out) are reject rows of their own beside the clips; a
source that gives no clip at all is one reject of the whole. Where one clip is not what was asked, all of the
source is rejected.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reelmae.pipeline.errors import ChildCrashedError, ChildTimeoutError
from reelmae.pipeline.ingest.clips import colour as colours
from reelmae.pipeline.ingest.clips import scenes
from reelmae.pipeline.ingest.clips.cut import (
    MAX_CLIPS,
    Span,
    at_keyframes,
    cut,
    seconds,
    spans_of_rows,
    spans_of_scenes,
)
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe, Prober, VerifiedClip
from reelmae.pipeline.ingest.clips.scores import SIDE, Scores, scores
from reelmae.pipeline.ingest.clips.screen import Kept, screen, source_rate
from reelmae.pipeline.ingest.clips.transcode import SCENES, SMALL, VIDEO, Plan, transcode
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.pack import ClipRow
from reelmae.pipeline.schema import Reason, clip_key

PROBE_S = 120.0  # wall clock of a probe
ENOUGH = 0.9  # of the frames that the packets promise
BORDER = 1 / 32  # of a side; thinner borders are left on


@dataclass(frozen=True)
class Source:
    """A fetched source: its url, label, the manifest's rows of it (see schema.SOURCES), its file and bytes."""

    url: str
    label: str | None
    rows: Sequence[dict[str, Any]]
    path: Path
    bytes: int


@dataclass(frozen=True)
class Dropped:
    """A span that gives no clip, and why."""

    span: Span
    why: Rejected


@dataclass(frozen=True)
class Made:
    """Clips of one source with their rows, and what was dropped of it."""

    clips: list[Path]
    rows: list[ClipRow]
    dropped: list[dict[str, Any]]


@dataclass(frozen=True)
class _Cut:
    """Spans as they were cut, the clips' files, and their places among the encoded frames."""

    spans: list[Span]
    files: list[Path]
    places: list[tuple[int, int]]
    dropped: list[Dropped]


class ClipMaker:
    """Makes the clips of one source after another. `labels`: label → id. Not shared by threads."""

    def __init__(
        self,
        config: ShardConfig,
        tool: Tool,
        encoder: str,
        labels: dict[str, int],
        sandbox: Sandbox,
        prober: Prober,
    ) -> None:
        self._config = config
        self._tool = tool
        self._encoder = encoder
        self._labels = labels
        self._sandbox = sandbox
        self._prober = prober

    def make(self, source: Source, work: Path) -> Made | Rejected:
        """The clips, as files in `work`.

        Where a child was killed, the source gets a second try: it may have been by somebody else, out of memory.
        """
        first = self._tried(source, work / "first")
        if isinstance(first, Rejected) and first.reason == Reason.CRASHED:
            return self._tried(source, work / "second")
        return first

    def _tried(self, source: Source, work: Path) -> Made | Rejected:
        work.mkdir()
        try:
            return self._made(source, work)
        except ChildTimeoutError as e:
            return Rejected(Reason.TIMEOUT, f"decoding {e}")
        except ChildCrashedError as e:
            return Rejected(Reason.CRASHED, f"decoding {e}")

    def _made(self, source: Source, work: Path) -> Made | Rejected:
        config = self._config
        probe = self._prober.probe(source.path, max_pixels=config.max_pixels, wall_s=PROBE_S)
        if isinstance(probe, tuple):
            return Rejected(*probe)
        kept = self._screened(source.path, probe)
        if isinstance(kept, Rejected):
            return kept
        colour = colours.colour(probe, tonemaps=self._tool.tonemaps)
        if isinstance(colour, Rejected):
            return colour
        spans, dropped = self._asked(source, kept)
        if not spans:
            return _whole(dropped)
        by_scenes = config.cut == "scenes" and spans[0].row is None
        plan = Plan(kept, colour, tuple(spans), self._encoder, by_scenes)
        out = work / "clips"
        out.mkdir()
        copied = self._copied(source.path, probe, plan)
        plan = copied or plan
        failed = transcode(self._sandbox, self._tool, source.path, out, probe, plan, config)
        if failed is not None:
            return failed
        made = self._cut(source.path if copied else out / VIDEO, out, plan, probe)
        if isinstance(made, Rejected):
            return made
        return self._rows(source, probe, plan, replace(made, dropped=dropped + made.dropped), out)

    def _screened(self, path: Path, probe: Probe) -> Kept | Rejected:
        kept = screen(probe, self._config)
        if not self._config.crop_borders or isinstance(kept, Rejected):
            return kept
        box = self._prober.borders(path, probe, wall_s=PROBE_S)
        if box is None or (
            probe.width - box[2] < BORDER * probe.width and probe.height - box[3] < BORDER * probe.height
        ):
            return kept
        return screen(probe, self._config, box)

    def _asked(self, source: Source, kept: Kept) -> tuple[list[Span], list[Dropped]]:
        """The spans that are wanted, and those that cannot be given."""
        config = self._config
        given = [(row["start_s"] or 0.0, row["end_s"]) for row in source.rows if _has_span(row)]
        if len(given) > MAX_CLIPS:
            why = Rejected(Reason.TOO_LONG, f"{len(given)} spans, over {MAX_CLIPS}")
            return [], [Dropped(Span(0, kept.frames, 0.0, 0.0), why)]
        if given:
            inside, outside = spans_of_rows(given, kept.frames, kept.fps)
            length = f"the video ends at {seconds(kept.frames, kept.fps):g} s"
            lost = [Dropped(span, Rejected(Reason.SPAN_OUTSIDE, length)) for span in outside]
            good: list[Span] = []
            for span in inside:
                short = self._too_short(span.end - span.start, kept)
                if short is None:
                    good.append(span)
                else:
                    lost.append(Dropped(span, short))
            return good, lost
        if config.cut == "scenes":
            return [Span(0, kept.frames, 0.0, seconds(kept.frames, kept.fps))], []
        spans, rest = cut(kept.frames, kept.fps, config.clip_seconds, config.remainder)
        rule = Rejected(Reason.TOO_SHORT, f"a remainder under clip_seconds={config.clip_seconds:g}")
        return spans, [Dropped(span, rule) for span in rest]

    def _too_short(self, frames: int, kept: Kept) -> Rejected | None:
        config, least = self._config, self._config.screens.min_seconds
        if frames < config.min_frames:
            return Rejected(Reason.TOO_FEW_FRAMES, f"frames: {frames}, under min_frames={config.min_frames}")
        if frames / kept.fps < least:
            return Rejected(Reason.TOO_SHORT, f"{float(frames / kept.fps):.2f} s, under min_seconds={least:g}")
        return None

    def _copied(self, path: Path, probe: Probe, plan: Plan) -> Plan | None:
        """The plan of a source whose packets can be taken as they are; None where it must be encoded."""
        if self._config.profile != "copy" or not _conforms(probe, plan):
            return None
        packets, keys = self._prober.keys(path, wall_s=PROBE_S)
        spans = at_keyframes(plan.spans, keys, packets)
        if packets != plan.kept.frames or not spans:
            return None
        return replace(plan, spans=tuple(spans), encoder="copy")

    def _cut(self, video: Path, out: Path, plan: Plan, probe: Probe) -> _Cut | Rejected:
        """Cut the encoded video (or the source, where it is copied) into clips."""
        wall_s = PROBE_S + probe.duration_s
        spans: list[Span] = list(plan.spans)
        dropped: list[Dropped] = []
        if plan.scenes:
            spans, dropped = self._scenes(video, out, plan, wall_s)
            if not spans:
                return _whole(dropped)
        copied = plan.encoder == "copy"
        places = [(s.start, s.end) if copied else plan.placed(s) for s in spans]
        done = self._prober.cut(video, places, plan.kept.fps, out, wall_s=wall_s)
        if isinstance(done, str):
            return Rejected(Reason.VERIFY_FAILED, done)
        frames, total = done
        if total < ENOUGH * plan.frames:
            return Rejected(Reason.TRUNCATED, f"{total} of {plan.frames} frames could be decoded")
        kept: list[int] = []
        for i, n in enumerate(frames):
            why = self._too_short(n, plan.kept)
            if why is None:
                kept.append(i)
            else:  # the decoder gave less than the packets promised
                dropped.append(Dropped(spans[i], why))
        cut_spans = [replace(spans[i], end=spans[i].start + frames[i]) for i in kept]
        if not kept:
            return _whole(dropped)
        files = [out / f"{i:05d}.mp4" for i in kept]
        return _Cut(cut_spans, files, [(places[i][0], places[i][0] + frames[i]) for i in kept], dropped)

    def _scenes(self, video: Path, out: Path, plan: Plan, wall_s: float) -> tuple[list[Span], list[Dropped]]:
        config, fps = self._config, plan.kept.fps
        packets, keys = self._prober.keys(video, wall_s=wall_s)
        least = math.ceil(config.min_scene_seconds * fps)
        found = scenes.cuts(out / SCENES, fps, threshold=config.scene_threshold, min_frames=1)
        good, short = spans_of_scenes(
            found, keys, packets, fps,
            clip_seconds=config.clip_seconds, remainder=config.remainder, min_seconds=config.min_scene_seconds,
        )  # fmt: skip
        why = Rejected(Reason.TOO_SHORT, f"a scene or remainder under {least} frames")
        return good[:MAX_CLIPS], [Dropped(span, why) for span in short]

    def _rows(self, source: Source, probe: Probe, plan: Plan, made: _Cut, out: Path) -> Made | Rejected:
        verified = self._prober.verify(made.files, wall_s=PROBE_S + 5 * probe.duration_s)
        fault = _fault(verified, made, plan, self._config)
        if fault is not None:
            return fault
        data = np.memmap(out / SMALL, np.uint8, "r")
        small_THW = data[: len(data) // SIDE**2 * SIDE**2].reshape(-1, SIDE, SIDE)
        clips, rows, dropped = [], [], list(made.dropped)
        for ordinal, span in enumerate(made.spans):
            found = scores(_small(small_THW, made.places[ordinal], plan.every))
            why = _screened_out(found, self._config)
            if why is not None:
                dropped.append(Dropped(span, why))
                continue
            clips.append(made.files[ordinal])
            rows.append(self._row(source, probe, plan, span, ordinal, verified[ordinal], found))
        if not rows:
            return _whole(dropped)
        return Made(clips, rows, [_reject(source, d) for d in dropped])

    def _row(
        self, source: Source, probe: Probe, plan: Plan, span: Span, ordinal: int, clip: VerifiedClip, found: Scores
    ) -> ClipRow:  # fmt: skip
        kept = plan.kept
        row = source.rows[span.row or 0] if source.rows else None
        label = source.label if row is None else row["label"]
        rate = source_rate(probe)
        return ClipRow(
            key=clip_key(source.url, ordinal), shard="", offset=0, size=0, sha256="", source=source.url,
            span_start_s=seconds(span.start, kept.fps), span_end_s=seconds(span.end, kept.fps),
            frames=clip.frames, fps=float(kept.fps), width=kept.width, height=kept.height, codec=clip.codec,
            label=label, label_id=-1 if label is None else self._labels[label],
            wanted_start_s=span.wanted_start_s, wanted_end_s=span.wanted_end_s,
            motion=found.motion, luma=found.luma, contrast=found.contrast, border=found.border, phash=found.phash,
            duplicate_of=None, source_bytes=source.bytes, source_container=probe.container,
            source_codec=probe.codec, source_width=probe.width, source_height=probe.height,
            source_fps=float(rate or kept.fps), source_seconds=round(probe.duration_s, 6),
            encoder=plan.encoder, colour=plan.colour.rule,
            extra=json.loads(row["extra"]) if row is not None and row["extra"] else {},
        )  # fmt: skip


def _has_span(row: dict[str, Any]) -> bool:
    return row["start_s"] is not None or row["end_s"] is not None


def _conforms(probe: Probe, plan: Plan) -> bool:
    """Whether a source's packets are already what a clip's must be."""
    kept = plan.kept
    return (
        (probe.container, probe.codec, probe.pix_fmt, probe.video_streams) == ("mov", "h264", "yuv420p", 1)
        and (probe.width, probe.height) == (kept.width, kept.height)
        and (probe.sar, probe.rotation, probe.interlaced, kept.crop) == (1.0, 0, False, None)
        and (probe.steady, probe.reordered, plan.colour.rule) == (True, False, "none")
        and probe.seen == probe.packets
        and kept.fps == source_rate(probe)
        and abs(probe.start_s) * kept.fps < 1 / 2
    )


def _small(small_THW: np.ndarray, place: tuple[int, int], every: int) -> np.ndarray:
    """The small frames of a clip at [start, end) of the encoded frames; at least one."""
    first, last = -(-place[0] // every), -(-place[1] // every)
    if last <= first or first >= len(small_THW):
        first = min(place[0] // every, len(small_THW) - 1)
        last = first + 1
    return np.asarray(small_THW[first:last])


def _screened_out(found: Scores, config: ShardConfig) -> Rejected | None:
    screens = config.screens
    if found.luma < screens.min_luma:
        return Rejected(Reason.DARK, f"luma {found.luma:.2f}, under min_luma={screens.min_luma:g}")
    if found.contrast < screens.min_contrast:
        return Rejected(Reason.BLANK, f"contrast {found.contrast:.2f}, under min_contrast={screens.min_contrast:g}")
    if screens.max_border and found.border > screens.max_border:
        return Rejected(Reason.BORDERS, f"{found.border:.0%} black border, over max_border={screens.max_border:g}")
    if found.motion < screens.min_motion:
        return Rejected(Reason.STATIC, f"motion {found.motion:.2f}, under min_motion={screens.min_motion:g}")
    return None


def _fault(verified: Sequence[VerifiedClip], made: _Cut, plan: Plan, config: ShardConfig) -> Rejected | None:
    """Why the clips of a source are not what was asked."""
    kept = plan.kept
    for span, clip in zip(made.spans, verified, strict=True):
        fault = clip.fault(
            frames=span.end - span.start, fps=kept.fps, width=kept.width, height=kept.height, codec=config.codec,
            untagged=plan.encoder == "copy",
        )  # fmt: skip
        if fault:
            return Rejected(Reason.VERIFY_FAILED, f"clip from {span.wanted_start_s:g} s: {fault}")
    return None


def _whole(dropped: Sequence[Dropped]) -> Rejected:
    """One reject for a source of which every span was dropped: the reason that most of them have."""
    reasons = Counter(d.why.reason for d in dropped)
    reason, n = reasons.most_common(1)[0]
    first = next(d.why.detail for d in dropped if d.why.reason == reason)
    if len(dropped) == 1:
        return Rejected(reason, first)
    others = ", ".join(f"{k} x {r.value}" for r, k in reasons.items() if r != reason)
    return Rejected(reason, f"{n} of {len(dropped)} spans: {first}" + (f"; {others}" if others else ""))


def _reject(source: Source, dropped: Dropped) -> dict[str, Any]:
    span = dropped.span
    return {
        "source": source.url,
        "span_start_s": span.wanted_start_s,
        "span_end_s": span.wanted_end_s,
        "reason": dropped.why.reason.value,
        "detail": dropped.why.detail,
    }

"""One fetched source → its clips with their rows, or the reason why there are none.

The steps, in their order; `ClipMaker._make_clips` calls one after the other:

    probe        facts of the file, by its content            probe.py
    screen       rate, size, length and shape of the source   screen.py
    colour       how it becomes BT.601, limited range         colour.py
    spans        a manifest's, windows, or the whole          cut.py, screen.py
    transcode    one ffmpeg decodes and encodes the source    transcode.py
    cut          scenes, where asked for; the clips' files    scenes.py, cut.py, probe.py, screen.py
    verify       every clip is decoded whole                  probe.py
    score        scores, and the screens on them              scores.py, screen.py
    row          one row of the index for each clip           rows.py

A span that gives no clip (beyond the end, too short, screened out) is a reject row of its own beside the clips. A
source that gives no clip at all is one reject. If one clip differs from what was planned, the whole source is
rejected.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import ChildCrashedError, ChildKilledError, ChildTimeoutError
from reelmae.pipeline.ingest.clips import scenes
from reelmae.pipeline.ingest.clips.colour import Colour, choose_colour
from reelmae.pipeline.ingest.clips.cut import (
    MAX_CLIPS,
    Span,
    cut_windows,
    move_to_keyframes,
    seconds,
    spans_of_rows,
    spans_of_scenes,
)
from reelmae.pipeline.ingest.clips.outcome import Dropped, Rejected, reject_source
from reelmae.pipeline.ingest.clips.probe import Probe, Prober, VerifiedClip
from reelmae.pipeline.ingest.clips.rows import make_reject_row, make_row
from reelmae.pipeline.ingest.clips.scores import read_small_frames, score_clip, small_frames_of
from reelmae.pipeline.ingest.clips.screen import Kept, screen_length, screen_scores, screen_source
from reelmae.pipeline.ingest.clips.source import Source
from reelmae.pipeline.ingest.clips.transcode import SCENES, SMALL, VIDEO, EncodePlan, can_copy, transcode
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.pack import ClipRow
from reelmae.pipeline.schema import Reason

PROBE_S = 120.0  # wall clock of a question to the probing child, beside what grows with the source's length
ENOUGH = 0.9  # fewer decoded frames than this share of the planned ones: TRUNCATED
KILLED_TRIES = 10  # of a source whose child somebody else kills each time
BORDER = 1 / 32  # borders that take less than this share of both sides are not cropped


@dataclass(frozen=True)
class SourceClips:
    """The clips of one source."""

    clips: list[Path]
    rows: list[ClipRow]
    """One for each clip, in the same order."""
    dropped: list[dict[str, Any]]
    """Rows of the rejects: the spans that give no clip."""


@dataclass(frozen=True)
class _Clip:
    """A clip that was cut and is not verified yet."""

    file: Path
    span: Span
    place: tuple[int, int]
    """[start, end) among the frames of the video that it was cut from."""


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

    def make(self, source: Source, work: Path) -> SourceClips | Rejected:
        """The clips, as files below `work`.

        A source gets a second try if its child crashed, and KILLED_TRIES in all if somebody else killed it: the kernel
        may have done it for lack of memory, which says little about the source.
        """
        crashed = False
        for number in range(KILLED_TRIES):
            folder = work / f"try{number}"
            try:
                outcome = self._try_once(source, folder)
            except ChildKilledError as e:
                outcome = Rejected(Reason.CRASHED, f"decoding {e}, {KILLED_TRIES} times")
            else:
                if crashed or not (isinstance(outcome, Rejected) and outcome.reason == Reason.CRASHED):
                    return outcome
                crashed = True
            shutil.rmtree(folder)
        return outcome

    def _try_once(self, source: Source, folder: Path) -> SourceClips | Rejected:
        folder.mkdir()
        try:
            return self._make_clips(source, folder)
        except ChildTimeoutError as e:
            return Rejected(Reason.TIMEOUT, f"decoding {e}")
        except ChildKilledError:
            raise
        except ChildCrashedError as e:
            return Rejected(Reason.CRASHED, f"decoding {e}")

    def _make_clips(self, source: Source, folder: Path) -> SourceClips | Rejected:
        """All steps, in their order. The first step that rejects the source ends them."""
        probe = self._prober.probe(source.path, max_pixels=self._config.max_pixels, wall_s=PROBE_S)
        if isinstance(probe, Rejected):
            return probe
        kept = self._screen_source(source, probe)
        if isinstance(kept, Rejected):
            return kept
        colour = choose_colour(probe, tonemaps=self._tool.tonemaps)
        if isinstance(colour, Rejected):
            return colour
        spans, dropped = self._choose_spans(source, kept)
        if not spans:
            return reject_source(dropped)
        plan = self._plan_encoding(source, probe, kept, colour, spans)
        failure = transcode(self._sandbox, self._tool, source.path, folder, probe, plan, self._config)
        if failure is not None:
            return failure
        cut = self._cut_clips(source, probe, plan, folder)
        if isinstance(cut, Rejected):
            return cut
        clips, lost = cut
        verified = self._verify_clips(clips, probe, plan)
        if isinstance(verified, Rejected):
            return verified
        return self._score_clips(source, probe, plan, clips, verified, dropped + lost, folder)

    def _screen_source(self, source: Source, probe: Probe) -> Kept | Rejected:
        """Screen the source; with `crop_borders` once more, as the picture within its black borders."""
        kept = screen_source(probe, self._config)
        if not self._config.crop_borders or isinstance(kept, Rejected):
            return kept
        box = self._prober.find_borders(source.path, probe, wall_s=PROBE_S)
        if box is None:
            return kept
        _, _, width, height = box
        if probe.width - width < BORDER * probe.width and probe.height - height < BORDER * probe.height:
            return kept
        return screen_source(probe, self._config, box)

    def _choose_spans(self, source: Source, kept: Kept) -> tuple[list[Span], list[Dropped]]:
        """The spans that become clips, and those that cannot: a manifest's, or windows, or the whole for scenes."""
        wanted = source.manifest_spans()
        if len(wanted) > MAX_CLIPS:
            why = Rejected(Reason.TOO_LONG, f"{len(wanted)} spans, over {MAX_CLIPS}")
            return [], [Dropped(Span(0, kept.frames, 0.0, 0.0), why)]
        if wanted:
            return self._place_spans(wanted, kept)
        config = self._config
        if config.cut == "scenes":
            return [Span(0, kept.frames, 0.0, seconds(kept.frames, kept.fps))], []
        spans, rest = cut_windows(kept.frames, kept.fps, config.clip_seconds, config.remainder)
        why = Rejected(Reason.TOO_SHORT, f"a remainder under clip_seconds={config.clip_seconds:g}")
        return spans, [Dropped(span, why) for span in rest]

    def _place_spans(
        self, wanted: Sequence[tuple[float, float | None]], kept: Kept
    ) -> tuple[list[Span], list[Dropped]]:
        """A manifest's spans in frames, without those that lie beyond the end or are too short."""
        inside, outside = spans_of_rows(wanted, kept.frames, kept.fps)
        why = Rejected(Reason.SPAN_OUTSIDE, f"the video ends at {seconds(kept.frames, kept.fps):g} s")
        spans: list[Span] = []
        dropped = [Dropped(span, why) for span in outside]
        for span in inside:
            short = screen_length(span.end - span.start, kept.fps, self._config)
            if short is None:
                spans.append(span)
            else:
                dropped.append(Dropped(span, short))
        return spans, dropped

    def _plan_encoding(
        self, source: Source, probe: Probe, kept: Kept, colour: Colour, spans: Sequence[Span]
    ) -> EncodePlan:
        """What ffmpeg has to do. With profile copy a source that conforms is cut at its keyframes, without encoding."""
        by_scenes = self._config.cut == "scenes" and spans[0].row is None
        plan = EncodePlan(kept, colour, tuple(spans), self._encoder, by_scenes)
        if self._config.profile != "copy" or not can_copy(probe, plan):
            return plan
        packets, keyframes = self._prober.list_keyframes(source.path, wall_s=PROBE_S)
        moved = move_to_keyframes(plan.spans, keyframes, packets)
        if packets != kept.frames or not moved:
            return plan
        return replace(plan, spans=tuple(moved), encoder="copy")

    def _cut_clips(
        self, source: Source, probe: Probe, plan: EncodePlan, folder: Path
    ) -> tuple[list[_Clip], list[Dropped]] | Rejected:
        """Cut the encoded video (the source itself, if it is copied) into the clips' files, packet by packet."""
        video = source.path if plan.copies else folder / VIDEO
        wall_s = PROBE_S + probe.duration_s
        spans = list(plan.spans)
        dropped: list[Dropped] = []
        if plan.scenes:
            spans, dropped = self._find_scenes(video, plan, folder, wall_s)
            if not spans:
                return reject_source(dropped)
        places = [(span.start, span.end) if plan.copies else plan.locate(span) for span in spans]
        done = self._prober.cut_clips(video, places, plan.kept.fps, folder, wall_s=wall_s)
        if isinstance(done, Rejected):
            return done
        if done.total < ENOUGH * plan.frames:
            return Rejected(Reason.TRUNCATED, f"{done.total} of {plan.frames} frames could be decoded")
        clips: list[_Clip] = []
        for span, (start, _), file, frames in zip(spans, places, done.files, done.frames, strict=True):
            short = screen_length(frames, plan.kept.fps, self._config)  # the decoder may give fewer than planned
            if short is None:
                clips.append(_Clip(file, replace(span, end=span.start + frames), (start, start + frames)))
            else:
                dropped.append(Dropped(span, short))
        return (clips, dropped) if clips else reject_source(dropped)

    def _find_scenes(
        self, video: Path, plan: EncodePlan, folder: Path, wall_s: float
    ) -> tuple[list[Span], list[Dropped]]:
        """The scenes of the encoded video that begin at its keyframes, and those that are too short."""
        config, fps = self._config, plan.kept.fps
        packets, keyframes = self._prober.list_keyframes(video, wall_s=wall_s)
        cuts = scenes.find_cuts(folder / SCENES, fps, threshold=config.scene_threshold, min_frames=1)
        spans, short = spans_of_scenes(
            cuts,
            keyframes,
            packets,
            fps,
            clip_seconds=config.clip_seconds,
            remainder=config.remainder,
            min_seconds=config.min_scene_seconds,
        )
        least = math.ceil(config.min_scene_seconds * fps)
        why = Rejected(Reason.TOO_SHORT, f"a scene or remainder under {least} frames")
        return spans[:MAX_CLIPS], [Dropped(span, why) for span in short]

    def _verify_clips(self, clips: Sequence[_Clip], probe: Probe, plan: EncodePlan) -> list[VerifiedClip] | Rejected:
        """Decode every clip whole. The source is rejected if a clip differs from the plan."""
        kept = plan.kept
        verified = self._prober.verify([clip.file for clip in clips], wall_s=PROBE_S + 5 * probe.duration_s)
        for clip, seen in zip(clips, verified, strict=True):
            fault = seen.fault(
                frames=clip.span.end - clip.span.start,
                fps=kept.fps,
                width=kept.width,
                height=kept.height,
                codec=self._config.codec,
                untagged=plan.copies,
            )
            if fault:
                return Rejected(Reason.VERIFY_FAILED, f"clip from {clip.span.wanted_start_s:g} s: {fault}")
        return verified

    def _score_clips(
        self,
        source: Source,
        probe: Probe,
        plan: EncodePlan,
        clips: Sequence[_Clip],
        verified: Sequence[VerifiedClip],
        dropped: list[Dropped],
        folder: Path,
    ) -> SourceClips | Rejected:
        """Score every clip and give those that pass the screens their rows. `dropped`: the spans lost before."""
        small_THW = read_small_frames(folder / SMALL)
        files: list[Path] = []
        rows: list[ClipRow] = []
        for ordinal, (clip, seen) in enumerate(zip(clips, verified, strict=True)):
            scores = score_clip(small_frames_of(small_THW, clip.place, plan.small_stride))
            why = screen_scores(scores, self._config)
            if why is not None:
                dropped.append(Dropped(clip.span, why))
                continue
            files.append(clip.file)
            rows.append(
                make_row(
                    source,
                    probe,
                    plan,
                    self._labels,
                    ordinal=ordinal,
                    span=clip.span,
                    verified=seen,
                    scores=scores,
                )
            )
        if not rows:
            return reject_source(dropped)
        return SourceClips(files, rows, [make_reject_row(source, drop) for drop in dropped])

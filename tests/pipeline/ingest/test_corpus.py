"""Every file of the shared corpus meets the fate its INDEX.csv calls certain; the others have a recorded one."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.tools.verify import verify

pytestmark = pytest.mark.slow
CONFIG = ShardConfig(short_side=64, clip_seconds=30)
# what INDEX.csv's words allow as the reason
REASONS: dict[str, set[str]] = {
    "not-video": {"not_a_video", "unreadable", "empty_file", "no_video_stream"},
    "zero-byte": {"empty_file"},
    "truncated": {"unreadable", "truncated"},
    "no-moov": {"unreadable"},
    "encrypted": {"encrypted"},
    "audio-only": {"no_video_stream"},
    "corrupt-real": {"unreadable", "no_frames", "no_video_stream", "truncated", "decode_errors"},
    "lfi": {"not_a_video"},
    "still-image": {"not_a_video"},
}


@pytest.fixture(scope="module")
def fates(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """path in INDEX.csv → {"clips": [rows], "reject": row | None}"""
    fates: dict[str, dict[str, Any]] = defaultdict(lambda: {"clips": [], "reject": None})
    for half in sorted(p for p in corpus.iterdir() if p.is_dir()):
        dst = tmp_path_factory.mktemp("corpus") / half.name
        shard(str(half), str(dst), CONFIG)
        assert verify(str(dst)).faults == ()
        for row in pq.read_table(dst / "index.parquet").to_pylist():
            fates[str(Path(row["source"]).relative_to(corpus))]["clips"].append(row)
        for row in pq.read_table(dst / "rejects.parquet").to_pylist():
            fates[str(Path(row["source"]).relative_to(corpus))]["reject"] = row
    return fates


@pytest.fixture(scope="module")
def index(corpus: Path) -> list[dict[str, str]]:
    with (corpus / "INDEX.csv").open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_every_file_has_exactly_one_fate(fates: dict[str, Any], index: list[dict[str, str]]) -> None:
    for row in index:
        fate = fates[row["path"]]
        assert bool(fate["clips"]) != bool(fate["reject"]), row["path"]
        if fate["reject"]:
            assert fate["reject"]["detail"], row["path"]


def test_what_is_surely_good_gives_clips(fates: dict[str, Any], index: list[dict[str, str]]) -> None:
    wrong = [
        (row["path"], fates[row["path"]]["reject"])
        for row in index
        if (row["expected"], row["confidence"]) == ("ok", "firm") and not fates[row["path"]]["clips"]
    ]
    assert wrong == []


def test_what_is_surely_bad_is_rejected_with_a_true_reason(
    fates: dict[str, Any], index: list[dict[str, str]]
) -> None:
    for row in index:
        if (row["expected"], row["confidence"]) != ("reject", "firm"):
            continue
        reject = fates[row["path"]]["reject"]
        assert reject is not None, row["path"]
        for tag in set(row["tags"].split(";")) & set(REASONS):
            assert reject["reason"] in REASONS[tag], (row["path"], tag, reject)


def test_clips_have_the_sources_frames_and_shape(fates: dict[str, Any], index: list[dict[str, str]]) -> None:
    for row in index:
        clips = fates[row["path"]]["clips"]
        if not clips or row["expected"] != "ok":
            continue
        frames = int(row["frames_decoded"])
        assert abs(sum(c["frames"] for c in clips) - frames) <= max(2, 0.02 * frames), row["path"]
        width, height = int(row["display_width"]), int(row["display_height"])
        across, down = (float(n) for n in (row["sar"] or "1:1").split(":"))
        turned = int(row["rotation"] or 0) % 180 != 0
        aspect = width / height * (down / across if turned else across / down)
        # floored to multiples of 16 on each side
        low, high = (
            (aspect * (1 - 16 / max(32, c["width"]) - 0.01) for c in clips[:1]),
            aspect * (1 + 16 / 32 + 0.01),
        )
        stored = clips[0]["width"] / clips[0]["height"]
        assert next(low) <= stored <= high, (row["path"], aspect, stored)

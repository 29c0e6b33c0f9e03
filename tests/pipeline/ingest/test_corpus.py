"""Every file of the shared corpus meets the fate its INDEX.csv calls certain; the others have a recorded one."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard

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


def test_what_is_surely_bad_is_rejected_with_a_true_reason(fates: dict[str, Any], index: list[dict[str, str]]) -> None:
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


@pytest.fixture(scope="module")
def screened(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each half under every screen, cut at scenes."""
    config = ShardConfig(preset="uncurated", cut="scenes", short_side=64)
    made = []
    for half in sorted(p for p in corpus.iterdir() if p.is_dir()):
        made.append(tmp_path_factory.mktemp("screened") / half.name)
        shard(str(half), str(made[-1]), config)
    return made


def test_every_source_has_one_fate_under_every_screen(
    screened: list[Path], index: list[dict[str, str]], corpus: Path
) -> None:
    ends: list[str] = []
    for dst in screened:
        assert verify(str(dst)).faults == ()
        ends += set(pq.read_table(dst / "index.parquet").column("source").to_pylist())
        rejects = pq.read_table(dst / "rejects.parquet").to_pylist()
        ends += [r["source"] for r in rejects if r["span_start_s"] is None]
        assert all(r["detail"] for r in rejects)
    of_index = {str(corpus / row["path"]) for row in index}
    assert sorted(url for url in ends if url in of_index) == sorted(of_index)


def test_byte_copies_are_marked_as_repeats(screened: list[Path], index: list[dict[str, str]], corpus: Path) -> None:
    copies = 0
    digest = {str(corpus / row["path"]): row["sha256"] for row in index}
    for dst in screened:
        clips: dict[str, list[Any]] = defaultdict(list)
        for row in pq.read_table(dst / "index.parquet").to_pylist():
            clips[row["source"]].append(row["duplicate_of"])
        by_bytes: dict[str, list[str]] = defaultdict(list)
        for url in clips:
            by_bytes[digest.get(url, url)].append(url)
        for urls in by_bytes.values():  # all but one of them repeat, clip for clip
            assert len([url for url in urls if None in clips[url]]) <= 1, urls
            copies += len(urls) - 1
    if not copies:
        pytest.skip("no byte copies in this corpus that give clips")

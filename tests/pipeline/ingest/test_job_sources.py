"""What may be a source of a job: what is gone, what can never be one, hostile files, disks that are away."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.errors import (
    StorageError,
)
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard

Make = Callable[..., Path]
SMALL = ShardConfig(short_side=48, clip_seconds=1, sources_per_task=3, labels="folder", shard_bytes=20_000)


@pytest.mark.parametrize(
    "values", [{}, {"profile": "copy", "crop_borders": True}, {"cut": "scenes", "min_scene_seconds": 0}]
)
def test_hostile_files_reach_no_file_and_no_address(values: dict[str, Any], make_video: Make, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    secret = make_video(tmp_path / "outside" / "secret.mp4", width=160, height=160)
    make_video(src / "good.mp4")
    make_video(src / "neighbour.mp4", seed=1)
    os.utime(secret, ns=(1, 1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.ts"
        for name in ("concat.mp4", "concat.ffconcat", "concat.mkv"):
            (src / name).write_text(f"ffconcat version 1.0\nfile neighbour.mp4\nfile {secret}\nfile {url}\n")
        for name in ("list.m3u8", "list.mp4", "list.avi"):
            (src / name).write_text(f"#EXTM3U\n#EXTINF:1,\n{url}\n#EXTINF:1,\nfile://{secret}\n")
        for name in ("list.mpd", "dash.mp4"):
            segments = f"<SegmentList><SegmentURL media='{url}'/><SegmentURL media='file://{secret}'/></SegmentList>"
            (src / name).write_text(f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'>{segments}</MPD>")
        part = f"subfile,,start,0,end,99,,:{secret}"
        (src / "part.mp4").write_text(f"ffconcat version 1.0\nfile '{part}'\n")
        (src / part.replace("/", "_")).write_text("a name that is a protocol")
        (src / "sdp.mp4").write_text("v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n")
        (src / "link.mp4").symlink_to(secret)
        shard(str(src), str(dst), ShardConfig(short_side=64, **values))
        listener.settimeout(0.3)
        with pytest.raises(TimeoutError):
            listener.accept()
    rejects = {Path(r["source"]).name: r["reason"] for r in pq.read_table(dst / schema.REJECTS_FILE).to_pylist()}
    assert rejects.pop("link.mp4") == "fetch_failed"
    assert set(rejects.values()) == {"not_a_video"}
    assert len(rejects) == 11
    assert secret.stat().st_atime_ns == 1  # nobody read it
    kept = pq.read_table(dst / schema.INDEX).column("source").to_pylist()
    assert sorted(Path(s).name for s in kept) == ["good.mp4", "neighbour.mp4"]


def test_a_source_that_vanished_is_a_reject(make_video: Make, tmp_path: Path) -> None:
    make_video(tmp_path / "good.mp4")
    (tmp_path / "list.csv").write_text("path,label\ngood.mp4,x\ngone.mp4,y\n")
    summary = shard(str(tmp_path / "list.csv"), str(tmp_path / "dst"), ShardConfig(short_side=64))
    assert summary.rejected == {"fetch_failed": 1}
    assert pq.read_table(tmp_path / "dst" / schema.INDEX).column("label").to_pylist() == ["x"]


def test_an_empty_folder_below_a_manifest_may_be_an_unmounted_disk(make_video: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_video(tmp_path / "disk" / f"{name}.mp4", frames=3)
    (tmp_path / "list.csv").write_text("path\ndisk/a.mp4\ndisk/b.mp4\n")
    config, dst = ShardConfig(short_side=64), tmp_path / "dst"
    (tmp_path / "disk").rename(tmp_path / "away")
    (tmp_path / "disk").mkdir()
    with pytest.raises(StorageError, match="disk is empty: is a disk not mounted"):
        shard(str(tmp_path / "list.csv"), str(dst), config)
    assert not list(dst.glob("commits/*"))
    (tmp_path / "away/b.mp4").unlink()  # this one is gone: something else is in its folder
    (tmp_path / "disk").rmdir()
    (tmp_path / "away").rename(tmp_path / "disk")
    summary = shard(str(tmp_path / "list.csv"), str(dst), config)
    assert (summary.sources_kept, summary.rejected, summary.retries) == (1, {"fetch_failed": 1}, {})


def test_what_can_never_be_a_source_never_stops_the_job(make_video: Make, tmp_path: Path) -> None:
    """However many there are, and in a row."""
    src = tmp_path / "src"
    make_video(src / "good.mp4", frames=3)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    for i in range(7):
        os.mkfifo(src / f"pipe{i}.mp4")
        (src / f"out{i}.mp4").symlink_to(tmp_path / "secret.mp4")
        (src / f"ring{i}.mp4").symlink_to(f"gnir{i}.mp4")
        (src / f"gnir{i}.mp4").symlink_to(f"ring{i}.mp4")
    (src / "dangling.mp4").symlink_to("nowhere")
    (src / "folder.mp4").symlink_to("/usr/share")
    summary = shard(str(src), str(tmp_path / "dst"), ShardConfig(short_side=64), workers=2)
    assert (summary.sources_kept, summary.rejected) == (1, {"fetch_failed": 30})
    rows = pq.read_table(tmp_path / "dst" / schema.REJECTS_FILE).to_pylist()
    details = {re.sub(r"\d", "", Path(row["source"]).stem): row["detail"] for row in rows}
    out = "a link that leads out of the bucket; not followed"
    ring = "a link in a ring"
    assert details == {
        **{"pipe": "no plain file", "out": out, "ring": ring, "gnir": ring},
        **{"dangling": "gone: no such file", "folder": out},
    }

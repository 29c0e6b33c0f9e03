"""One job at a time writes to a destination: `claim.json` there says who, and is renewed while that job lives.

A claim is created before anything of the destination is read, and removed at the end, also by an error or Ctrl-C.
Who finds one there:

    of this machine, its process is dead     takes it over at once
    of this machine, its process lives       is refused at once
    of another machine                       watches it for WATCH_S: a sign of life refuses, none lets it take over

With `takeover` it takes over at once, whoever lives. No clocks are compared: a beat is a number that changes.

A holder reads the claim again before everything that counts (`Claim.confirm`, or `refuse_others` where there is only
the holder's id), and stops where it is another's, or gone: whoever took it over may have ended. So does its heartbeat.
A holder whose store was away for
longer than WATCH_S may find out only then. What is left is the moment between reading the claim and writing; a commit
is therefore created exclusively too.

On a store that cannot create a file exclusively two jobs that start within a second may both believe that they were
first. Each reads its claim again a moment later, and the one that finds the other's is refused.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from reelmae.pipeline.errors import ClaimedError, ReelmaeError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store

CLAIM = "claim.json"
BEAT_S = 10.0  # between two signs of life
WATCH_S = 60.0  # a claim of another machine without a sign of life for so long is dead
LOOK_S = 2.0  # between two looks at it
SETTLE_S = 0.5  # after it was taken over: who wrote last has it
SHOWN = 80  # characters of a foreign value in a message

_log = logging.getLogger("reelmae.storage")
_held: set[str] = set()  # holders of this process
_told: set[str] = set()  # stores that cannot create exclusively, which were told


@dataclass(frozen=True)
class Process:
    """A process, named so that no other has ever had its name on this machine."""

    boot: str
    """Of the machine since it was started."""
    namespace: str
    """Of process ids: containers have their own."""
    pid: int
    started: int
    """Ticks since the boot."""

    def lives(self) -> bool | None:
        """Whether it runs; None where that cannot be seen from here."""
        here = this_process()
        if here is None or (here.boot, here.namespace) != (self.boot, self.namespace):
            return None
        try:
            state, started = _read_stat(self.pid)
        except (OSError, ValueError):
            return None if _answers(self.pid) else False  # /proc may hide the processes of others
        return state not in ("Z", "X") and started == self.started


@dataclass(frozen=True)
class Holder:
    """What `claim.json` says."""

    holder: str
    """A random id."""
    machine: str
    process: Process | None
    """None where the system does not tell."""
    user: str
    since: str
    """For people: UTC time, by the clock of its machine."""
    beat: int = 0

    def data(self) -> bytes:
        """The bytes of the file."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()

    def words(self) -> str:
        """Who it is, in one line."""
        process = f", process {self.process.pid}" if self.process else ""
        return f"{_shown(self.user)} on {_shown(self.machine)}{process}, since {_shown(self.since)}"


def read_holder(data: bytes) -> Holder | None:
    """The holder in the bytes of a claim; None where they are none, such as half of a file."""
    try:
        value: Any = json.loads(data)
        process = value["process"]
        texts = {name: value[name] for name in ("holder", "machine", "user", "since")}
        if not all(isinstance(text, str) for text in texts.values()):
            return None
        named = None
        if process is not None:
            named = Process(
                str(process["boot"]), str(process["namespace"]), int(process["pid"]), int(process["started"])
            )
        return Holder(**texts, process=named, beat=int(value["beat"]))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


class Claim:
    """The only right to write to a store. Take it as a context.

    Entering raises ClaimedError where another job holds it, and the errors of the store. Leaving removes the claim, if
    it is still ours. The heartbeat is a thread with an Access of its own, which does not wait for a store that is away.
    """

    def __init__(self, store: Store, *, takeover: bool = False) -> None:
        self._store = store
        self._takeover = takeover
        self._beating = Store(store.url(), Access(dict(store.access.options), patience_s=BEAT_S))
        self._me = Holder(secrets.token_hex(16), socket.gethostname(), this_process(), _user(), _now())
        self._taken_from: str | None = None  # its beat may be under way: it writes once more, and then it reads
        self._by: Holder | None = None
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._made_folder = store.is_local and not Path(store.root).exists()

    @property
    def holders(self) -> tuple[str, ...]:
        """Ids that `refuse_others` takes for ours."""
        return (self._me.holder,) if self._taken_from is None else (self._me.holder, self._taken_from)

    def __enter__(self) -> Claim:
        _held.add(self._me.holder)
        try:
            self._take()
        except ReelmaeError:  # another holds it, or the store fails: what may be there of ours counts as dead
            self._forget()
            raise
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beating.access.stop()
        self._thread.join()
        self._release()

    def check(self) -> None:
        """ClaimedError where the heartbeat found that another has taken the claim over. Asks no store."""
        if self._lost:
            raise _taken_over(self._store, self._by)

    def confirm(self) -> None:
        """ClaimedError where another has taken the claim over, as the store says now."""
        self.check()
        refuse_others(self._store, self.holders)

    def _take(self) -> None:
        store = self._store
        if not store.creates_exclusively and store.url() not in _told:
            _told.add(store.url())
            _log.warning(
                "%s: this store cannot create a file only where there is none; start one job at a time there",
                store.url(),
            )
        while True:
            if store.create(self._me.data(), CLAIM):
                if not store.creates_exclusively:
                    self._settle(None)  # another may have written it in the same moment
                return
            there = _read(store)
            if there is None:  # removed just now
                continue
            found = read_holder(there)
            if found is not None and found.holder == self._me.holder:
                return  # our own request, the answer of which was lost
            if self._takeover or self._is_dead(found, there):
                self._take_from(found)
                return

    def _is_dead(self, found: Holder | None, there: bytes) -> bool:
        """Whether the holder is dead; False where its claim has gone. ClaimedError where it lives."""
        lives = None
        if found is not None and found.process is not None:
            lives = found.process.lives()
            if lives and found.process == this_process():
                lives = found.holder in _held  # one that this process could not remove
        if lives:
            assert found is not None
            raise self._refused(found)
        if lives is False:
            return True
        who = "a job that cannot be told" if found is None else found.words()
        _log.warning(
            "%s: claimed by %s; watching it for up to %g s, whether that job lives", self._store.url(), who, WATCH_S
        )
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            time.sleep(min(LOOK_S, WATCH_S))
            now = _read(self._store)
            if now is None:
                return False
            if now != there:
                raise self._refused(read_holder(now))
        return True

    def _refused(self, found: Holder | None) -> ClaimedError:
        who = "" if found is None else f" ({found.words()})"
        return ClaimedError(
            f"{self._store.url()}: another job writes to it{who}; wait until it ends, give another DST, "
            "or take it over with --takeover"
        )

    def _take_from(self, found: Holder | None) -> None:
        self._taken_from = None if found is None else found.holder
        who = "" if found is None else f" from {found.words()}"
        _log.warning("%s: taken over%s", self._store.url(), who)
        self._store.publish_bytes(self._me.data(), CLAIM)
        self._settle(self._taken_from)

    def _settle(self, old: str | None) -> None:
        """Wait until the claim stays ours; ClaimedError where a third has it. `old` may write it once more."""
        while True:
            time.sleep(SETTLE_S)
            there = _read(self._store)
            found = None if there is None else read_holder(there)
            if found is not None and found.holder == self._me.holder:
                return
            if found is not None and found.holder != old:
                raise self._refused(found)
            self._store.publish_bytes(self._me.data(), CLAIM)

    def _beat(self) -> None:
        """Renew the claim until the end, or until it is another's."""
        while not self._ended.wait(BEAT_S):
            try:
                if not self._beat_once():
                    return
            except (ReelmaeError, OSError) as e:  # it is tried again at the next beat; what counts asks by itself
                _log.debug("%s: %s", self._store.url(CLAIM), e)

    def _beat_once(self) -> bool:
        self._me = replace(self._me, beat=self._me.beat + 1)
        there = _read(self._beating)
        found = None if there is None else read_holder(there)
        if there is None or (found is not None and found.holder not in self.holders):
            self._by, self._lost = found, True
            return False
        self._beating.publish_bytes(self._me.data(), CLAIM)
        return True

    def _release(self) -> None:
        """Remove the claim if it is ours."""
        store = Store(self._store.url(), Access(dict(self._store.access.options), patience_s=BEAT_S))
        try:
            there = _read(store)
            found = None if there is None else read_holder(there)
            if found is not None and found.holder == self._me.holder:
                store.remove(CLAIM)
        except FileNotFoundError:
            pass
        except ReelmaeError as e:
            _log.warning("%s; the claim of this job stays there, the next job takes it over", e)
        finally:
            self._forget()

    def _forget(self) -> None:
        """The claim counts as that of a dead process. An empty folder that this made is removed."""
        _held.discard(self._me.holder)
        if self._made_folder:
            with contextlib.suppress(OSError):  # it holds something, or is gone
                Path(self._store.root).rmdir()


def refuse_others(store: Store, holders: Collection[str]) -> None:
    """ClaimedError where the claim of a store is of none of these holders, or gone. Without holders nothing is asked."""
    if not holders:
        return
    there = _read(store)
    found = None if there is None else read_holder(there)
    if there is None or (found is not None and found.holder not in holders):
        raise _taken_over(store, found)


def _taken_over(store: Store, by: Holder | None) -> ClaimedError:
    what = "its claim is gone, as after another job took it over" if by is None else f"was taken over by {by.words()}"
    return ClaimedError(f"{store.url()}: {what}; this job stops, what it has committed stays and counts there")


def _read(store: Store) -> bytes | None:
    try:
        return store.read_bytes(CLAIM)
    except FileNotFoundError:
        return None


def this_process() -> Process | None:
    """This process; None where the system has no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        return Process(boot, namespace, os.getpid(), _read_stat(os.getpid())[1])
    except (OSError, ValueError):
        return None


def _read_stat(pid: int) -> tuple[str, int]:
    """A process's state and the ticks at which it was started."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # its name may hold anything
    return fields[0].decode("ascii"), int(fields[19])


def _answers(pid: int) -> bool:
    """Whether there is a process of this number, of whomever."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user, as in containers
        return f"user {os.getuid()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _shown(text: str) -> str:
    """A foreign text on one line, without what could control a terminal."""
    short = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return "".join(c if c.isprintable() else "?" for c in short)

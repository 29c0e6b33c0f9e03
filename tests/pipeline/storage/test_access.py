"""Options of a store: where they are read from, and that they are not shown."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.storage.access import Access, parse_options
from reelmae.pipeline.storage.store import Store


def test_options_are_json_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"key": "k"}')
    assert parse_options(None) == {}
    assert parse_options('{"key": "k"}') == parse_options(f"@{tmp_path}/keys.json") == {"key": "k"}


@pytest.mark.parametrize("text", ['{"secret": "hush"', '["hush"]', "hush", "@{folder}/nowhere", "@{folder}/bad"])
def test_options_that_are_none_are_refused_without_showing_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("hush")
    with pytest.raises(ConfigError, match="JSON") as told:
        parse_options(text.replace("{folder}", str(tmp_path)))
    assert "hush" not in str(told.value)


def test_nothing_shows_the_options() -> None:
    access = Access({"secret": "hush"})
    assert "hush" not in f"{access} {access!r} {Store('s3://b/x', access)!r}"
    for options in ({"secret": "hush", "nonsense": 1}, {"config_kwargs": {"secret": "hush"}}):
        store = None
        try:
            store = Store("s3://b/x", Access(options))
        except InputError as e:
            assert "hush" not in str(e)
        assert store is None or "hush" not in repr(store)


def test_a_copy_has_the_options_and_counts_for_itself() -> None:
    access = Access({"key": "k"}, 5)
    access.retries.add("timed out", 2)
    access.stop()
    there = pickle.loads(pickle.dumps(access))
    assert (there.options, there.patience_s, there.retries.counts()) == ({"key": "k"}, 5, {})
    assert not there.stopping.is_set()
    assert access.retries.counts() == {"timed out": 2}


WAITS = """
import logging
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store
logging.basicConfig()
store = Store("s3://b/x", Access({"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}))
try:
    store.read_ranges("y", [(i << 22, 5) for i in range(9)])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_the_waiting_of_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert b"waiting for" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        try:
            out, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert out == b"interrupted\n"

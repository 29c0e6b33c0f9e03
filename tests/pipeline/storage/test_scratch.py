"""Folders of killed processes are removed by the next; those of living ones and of others never."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reelmae.pipeline.storage.scratch import LOCK, Scratch, scratch_folder, sweep

MAKE = "import sys; from reelmae.pipeline.storage.scratch import Scratch; s = Scratch('work-'); print(s.path, flush=True); "


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def living(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a folder, until its stdin closes."""
    process = _start(temporary, "sys.stdin.read(); s.close()")
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.communicate("")


def _start(folder: Path, then: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", MAKE + then], env=environment, text=True, **pipes)


def test_a_folder_is_removed_with_what_is_in_it(temporary: Path) -> None:
    with pytest.raises(KeyError), scratch_folder("kind-") as folder:
        assert folder.name.startswith("reelmae-kind-")
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_at_once_and_nothing_else(
    temporary: Path, living: tuple[subprocess.Popen[str], Path]
) -> None:
    killed = _start(temporary, "(s.path / 'big').write_text('x'); import os; os.kill(os.getpid(), 9)")
    killed.communicate()
    mine = Scratch()
    foreign = temporary / "reelmae-notes"
    foreign.mkdir()
    (foreign / "lock").write_text("not ours")
    (temporary / "reelmae-file").write_text("x")
    assert len(list(temporary.iterdir())) == 5
    assert sweep() == 1
    assert {p.name for p in temporary.iterdir()} == {living[1].name, mine.path.name, "reelmae-notes", "reelmae-file"}
    for path in temporary.iterdir():
        os.utime(path, (0, 0))  # however old they look
    assert sweep() == 0
    mine.close()


def test_a_folder_is_locked_from_its_first_moment_on(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job sweeps at any moment while it is made."""
    rename = Path.rename

    def sweep_before(path: Path, to: Path) -> Path:
        assert sweep() == 0
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", sweep_before)
    with scratch_folder() as folder:
        assert (folder / LOCK).exists()
        assert sweep() == 0
        assert folder.exists()


def test_a_link_is_not_followed(temporary: Path) -> None:
    target = temporary / "mine"
    target.mkdir()
    (target / LOCK).write_text("")
    (temporary / "reelmae-link").symlink_to(target)
    assert sweep() == 0
    assert target.exists()

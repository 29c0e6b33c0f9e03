"""Checkpoints: whole or absent, few, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reelmae.pipeline.errors import InputError, StorageError
from reelmae.train import checkpoint


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 12, {"weights": {"w": torch.arange(3.0)}, "text": "x"})
    content = checkpoint.load(path)
    assert path.name == "step_000012.pt"
    assert content["step"] == 12 and content["text"] == "x"
    assert torch.equal(content["weights"]["w"], torch.arange(3.0))


def test_the_last_two_are_kept_in_order_of_their_steps(tmp_path: Path) -> None:
    for step in (5, 10, 1_000_000, 1_000_005):
        checkpoint.save(tmp_path, step, {})
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_1000000.pt", "step_1000005.pt"]


def test_a_failed_write_leaves_the_older_checkpoints_and_no_stump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoint.save(tmp_path, 1, {})

    def full(content: object, f: object) -> None:
        f.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"step_000002\.pt: could not be written .*free some space"):
        checkpoint.save(tmp_path, 2, {})
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"\0\0\0\x18ftypisom a video"])
def test_something_else_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_000001.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"step_000001\.pt: is not a checkpoint of reelmae"):
        checkpoint.load(path)


def test_a_foreign_or_missing_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"foreign\.pt: is not a checkpoint of reelmae of format 2"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"absent\.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "absent.pt")

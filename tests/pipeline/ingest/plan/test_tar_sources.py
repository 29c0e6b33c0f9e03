"""Listing tars: samples, names that occur twice, tars among files, a limit of memory."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan import samples, tar_sources
from reelmae.pipeline.ingest.plan.deal import MEMBERS
from reelmae.pipeline.ingest.plan.samples import SampleReader
from reelmae.pipeline.ingest.plan.sources import list_sources
from reelmae.pipeline.ingest.tars.scan import TarScan

WriteTar = Callable[..., Path]
CONFIG = ShardConfig()


def _read(path: Path) -> list[tuple[str, str | None, dict[str, object]]]:
    data = path.read_bytes()
    scan = TarScan(lambda offset, size: data[offset : offset + size], len(data))
    return [(s.member.name, s.label, dict(s.columns)) for s in SampleReader("label").read(scan)]


def test_a_sample_is_consecutive_members_of_one_key(
    write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SIDE_BYTES", 100)
    link = tarfile.TarInfo("l.json")
    link.type, link.linkname = tarfile.SYMTYPE, "a.json"
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("d.1/a.json", b'{"n": 1}'),
            ("d.1/a.low.mp4", b"v"),
            ("d.1/a.high.mp4", b"v"),
            ("d.1/b.mp4", b"v"),
            ("d.1/b.b.json", b'{"n": 2}'),  # its extension is b.json
            ("c.json", b"{}" + b" " * 100),  # too long
            ("c.mp4", b"v"),
            ("e.json", b'{"n": 3}'),
            ("e.mp4", b"v"),
            ("e.json", b'{"n": 4}'),  # the next sample
            ("e.mp4", b"v"),
            ("noext", b"v"),
            ("f.txt", b"a\0b"),
            ("f.mp4", b"v"),
            ("f.cls", b"  "),
            link,
            ("l.mp4", b"v"),
            ("g.txt", b"alone"),
            (".hidden.json", b"{}"),
            ("h.json", b'{"half": "\\ud800"}'),
            ("h.mp4", b"v"),
            ("i.json", b"[" * 50_000),
        ],
    )
    assert _read(path) == [
        ("d.1/a.low.mp4", None, {"n": 1}),
        ("d.1/a.high.mp4", None, {"n": 1}),
        ("d.1/b.mp4", None, {}),
        ("d.1/b.b.json", None, {}),
        ("c.mp4", None, {}),
        ("c.json", None, {}),
        ("e.mp4", None, {"n": 3}),
        ("e.mp4", None, {"n": 4}),
        ("noext", None, {}),
        ("f.mp4", None, {}),
        ("f.txt", None, {}),
        ("l.json", None, {}),
        ("l.mp4", None, {}),
        ("g.txt", None, {}),
        (".hidden.json", None, {}),
        ("h.mp4", None, {}),
        ("h.json", None, {}),
        ("i.json", None, {}),
    ]


def test_names_that_occur_twice_have_numbers_whatever_else_is_called_so(write_tar: WriteTar, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("b", b"1"), ("a", b"2"), ("b", b"3"), ("b#2", b"4"), ("b", b"5"), ("b!", b"6")])
    (tmp_path / "x.tar#a").write_text("a file beside it")
    table = list_sources(str(tmp_path), CONFIG).table
    assert table.schema.equals(MEMBERS)
    rows = {row["url"].removeprefix(f"{tmp_path}/"): row["offset"] for row in table.to_pylist()}
    assert rows == {
        "x.tar#a": None,
        "x.tar#a#2": 1024,
        "x.tar#b": 0,
        "x.tar#b!": 5120,
        "x.tar#b#2": 2048,
        "x.tar#b#2#1": 3072,
        "x.tar#b#3": 4096,
    }
    assert list(rows) == sorted(rows)


def test_a_bucket_without_tars_is_listed_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"v")
    (tmp_path / "no.tar").write_bytes(b"nothing of one")
    listing = list_sources(str(tmp_path), CONFIG)
    assert listing.table.column_names == ["url", "size", "etag", "label", "rows"]
    assert [Path(url).name for url in listing.table.column("url").to_pylist()] == ["a.mp4", "no.tar"]


def test_too_many_columns_are_refused(write_tar: WriteTar, tmp_path: Path) -> None:
    names = ",".join(f'"n{i}": 1' for i in range(1001))
    write_tar(tmp_path / "x.tar", [("a.json", f"{{{names}}}".encode()), ("a.mp4", b"v")])
    with pytest.raises(InputError, match=r"x\.tar: the \.json files .* have more than 1000 names"):
        list_sources(str(tmp_path), CONFIG)


def test_memory_holds_the_table_and_no_objects_of_its_rows(
    write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most rows that are Python objects at a time, of 60,000 members in one tar and 30 hard links to a small one."""
    write_tar(tmp_path / "one/x.tar", [(f"{i}.mp4", b"") for i in range(60_000)])
    write_tar(tmp_path / "many/0.tar", [(f"{i}.mp4", b"") for i in range(100)])
    for i in range(1, 30):
        os.link(tmp_path / "many/0.tar", tmp_path / f"many/{i}.tar")
    alive, most, real = 0, 0, tar_sources._row

    class Row(tuple):  # type: ignore[type-arg]
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def row(*args: object) -> Row:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return Row(real(*args))  # type: ignore[arg-type]

    monkeypatch.setattr(tar_sources, "_row", row)
    assert list_sources(str(tmp_path / "one"), CONFIG).table.num_rows == 60_000
    assert most == tar_sources._ROWS
    most = 0
    table = list_sources(str(tmp_path / "many"), CONFIG).table
    assert (table.num_rows, most) == (3000, 100)
    assert isinstance(table, pa.Table)

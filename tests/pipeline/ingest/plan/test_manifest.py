"""Manifests of every kind say the same, keep their columns and spans, and name each faulty line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan import manifest
from reelmae.pipeline.ingest.plan.sources import LISTED, Listing, list_sources


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """read(text or bytes, name="m.csv", **config) → Listing"""

    def write_and_read(text: str | bytes, name: str = "m.csv", **config: Any) -> Listing:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return list_sources(str(tmp_path / name), ShardConfig(**config))

    return write_and_read


def _sources(listing: Listing, folder: Path) -> dict[str, Any]:
    """path → label, or its rows where it has some."""
    return {
        row["url"].removeprefix(f"{folder}/"): row["label"] if row["rows"] is None else row["rows"]
        for row in listing.table.to_pylist()
    }


def _extra(listing: Listing) -> list[Any]:
    rows = [row for rows in listing.table.column("rows").to_pylist() for row in rows or [{"extra": None}]]
    return [json.loads(row["extra"]) if row["extra"] else None for row in rows]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_all_kinds_say_the_same(kind: str, read: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "path": "x/a,b.mp4",
            "label": "one",
            "start": 1.5,
            "end": None,
            "views": 3,
            "score": 0.5,
            "by": "ü\n",
        },
        {"path": "c.mp4", "label": None, "start": None, "end": None, "views": None, "score": 2.0, "by": None},
        {
            "path": "d.mp4",
            "label": "two",
            "start": None,
            "end": None,
            "views": None,
            "score": None,
            "by": None,
        },
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
        data = (tmp_path / "m.parquet").read_bytes()
    elif kind == "jsonl":
        data = "\n\n".join(json.dumps(row) for row in rows).encode()
    else:
        text = (
            'path,label,start,end,views,score,by\r\n"x/a,b.mp4",one,1.5,,3,0.5,"ü\n"\r\nc.mp4,,,,,2,\r\nd.mp4,two,,,,,'
        )
        if kind == "tsv":
            text = text.replace(",", "\t").replace("a\tb", "a,b")
        data = b"\xef\xbb\xbf" + text.encode()
    listing = read(data, f"m.{kind}")
    assert listing.table.schema.equals(LISTED)
    assert listing.columns == {"views": "int64", "score": "double", "by": "string"}
    extra = '{"by": "ü\\n", "score": 0.5, "views": 3}'
    assert _sources(listing, tmp_path) == {
        "c.mp4": [{"start_s": None, "end_s": None, "label": None, "extra": '{"score": 2.0}'}],
        "d.mp4": "two",
        "x/a,b.mp4": [{"start_s": 1.5, "end_s": None, "label": "one", "extra": extra}],
    }
    assert (listing.rows, set(listing.table.column("size").to_pylist())) == (3, {-1})


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", [True, False])
def test_the_separator_is_told_from_the_first_line(separator: str, header: bool, read: Any, tmp_path: Path) -> None:
    lines = ["path,label"] * header + ["a/b c.mp4,one", "", "d.mp4,two words"]
    listing = read("\r\n".join(lines).replace(",", separator))
    assert _sources(listing, tmp_path) == {"a/b c.mp4": "one", "d.mp4": "two words"}


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("a/b.mp4 3\nc.mp4 4\n", {"a/b.mp4": "3", "c.mp4": "4"}),
        ("a/x,y.mp4 3\n", {"a/x,y.mp4": "3"}),
        ("\n,,\na.mp4,3\n", {"a.mp4": "3"}),
        ("a/b c.mp4\nd.mp4\n", {"a/b c.mp4": None, "d.mp4": None}),
        ("some/folder,label\n", {"some/folder": "label"}),
    ],
)
def test_lists_without_a_header(text: str, there: dict[str, Any], read: Any, tmp_path: Path) -> None:
    assert _sources(read(text), tmp_path) == there


def test_columns_without_names_are_numbered(read: Any, tmp_path: Path) -> None:
    listing = read("a.mp4,x,1,2,seen,9\n")
    assert listing.columns == {"column_5": "string", "column_6": "int64"}
    assert _sources(listing, tmp_path)["a.mp4"][0]["extra"] == '{"column_5": "seen", "column_6": 9}'
    listing = read("7,a.mp4,x,3\n", url_column="2", start_column="4", label_column="3")
    assert listing.columns == {"column_1": "int64"}
    assert _sources(listing, tmp_path)["a.mp4"][0]["start_s"] == 3


def test_columns_may_be_named(read: Any, tmp_path: Path) -> None:
    text = "video,action,from,to,label\na.mp4,run,0:01:30.5,1:31,z\n"
    named = {"url_column": "video", "label_column": "action", "start_column": "from", "end_column": "to"}
    listing = read(text, **named)
    assert listing.columns == {"manifest_label": "string"}
    extra = '{"manifest_label": "z"}'
    assert _sources(listing, tmp_path)["a.mp4"] == [{"start_s": 90.5, "end_s": 91.0, "label": "run", "extra": extra}]


def test_the_usual_names_of_spans(read: Any, tmp_path: Path) -> None:
    for start, end in (("start", "end"), ("start_s", "end_s"), ("time_start", "time_end")):
        listing = read(f"url,{start},{end}\na.mp4,,5\n")
        assert listing.columns == {}
        assert _sources(listing, tmp_path)["a.mp4"] == [{"start_s": 0.0, "end_s": 5.0, "label": None, "extra": None}]


def test_rows_of_one_source_are_gathered_by_their_time(read: Any, tmp_path: Path) -> None:
    listing = read(
        "path,label,start,end\nb.mp4,x,10,20\na.mp4,y,3,4\nb.mp4,x,5,9\nb.mp4,x,5,7\na.mp4,z,1,\nc.mp4,w,,\n"
    )
    assert (listing.rows, listing.table.num_rows) == (6, 3)
    there = _sources(listing, tmp_path)
    assert [(r["start_s"], r["end_s"], r["label"]) for r in there["b.mp4"]] == [
        (5, 7, "x"),
        (5, 9, "x"),
        (10, 20, "x"),
    ]
    assert [(r["start_s"], r["end_s"], r["label"]) for r in there["a.mp4"]] == [(1, None, "z"), (3, 4, "y")]
    assert listing.table.column("label").to_pylist() == [None, "x", "w"]
    assert there["c.mp4"] == "w"


@pytest.mark.parametrize(
    ("values", "kind", "first"),
    [
        (["1", "-20", ""], "int64", 1),
        (["1", "2.5"], "double", 1.0),
        (["1e3", "-0.5"], "double", 1000.0),
        (["01", "2"], "string", "01"),
        (["+1"], "string", "+1"),
        (["9223372036854775807"], "int64", 2**63 - 1),
        (["9223372036854775808"], "string", "9223372036854775808"),
        (["9007199254740993", "0.5"], "string", "9007199254740993"),
        (["1", "nan"], "string", "1"),
        (["true", "false"], "string", "true"),
        (["1e999"], "string", "1e999"),
        (["1_0"], "string", "1_0"),
    ],
)
def test_types_of_text_columns(values: list[str], kind: str, first: Any, read: Any) -> None:
    listing = read("path,x\n" + "".join(f"{i}.mp4,{v}\n" for i, v in enumerate(values)))
    assert listing.columns == {"x": kind}
    assert _extra(listing)[0] == {"x": first}
    assert type(_extra(listing)[0]["x"]) is type(first)


@pytest.mark.parametrize(
    ("values", "kind", "there"),
    [
        ("true null false", "bool", [True, None, False]),
        ("1 2", "int64", [1, 2]),
        ("1 2.5 NaN", "double", [1.0, 2.5, None]),
        ('1 "2"', "string", ["1", "2"]),
        ('true 1 {"b":[1],"a":2}', "string", ["true", "1", '{"a": 2, "b": [1]}']),
    ],
)
def test_types_of_json_columns(values: str, kind: str, there: list[Any], read: Any) -> None:
    lines = [f'{{"path": "{i}.mp4", "x": {value}}}' for i, value in enumerate(values.split(" "))]
    listing = read("\n".join(lines), "m.jsonl")
    assert listing.columns == {"x": kind}
    assert _extra(listing) == [None if v is None else {"x": v} for v in there]


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "path": ["a.mp4", "b.mp4"],
            "u": pa.array([1, None], pa.uint8()),
            "f": pa.array([float("nan"), 0.5], pa.float32()),
            "d": pa.array(["1.25", None]).cast(pa.decimal128(5, 2)),
            "b": [True, None],
            "t": pa.array([1, None], pa.timestamp("ns")),
            "l": [[1, 2], None],
            "label": [4, 5],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    listing = list_sources(str(tmp_path / "m.parquet"), ShardConfig())
    kinds = ("int64", "double", "double", "bool", "string", "string")
    assert listing.columns == dict(zip("ufdbtl", kinds, strict=True))
    first = {"u": 1, "d": 1.25, "b": True, "t": "1970-01-01 00:00:00.000000001", "l": "[1, 2]"}
    assert _extra(listing) == [first, {"f": 0.5}]
    assert listing.table.column("label").to_pylist() == ["4", "5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.mp4,x\n", "no column url or path; there are 'file', 'label'; name it with --url-column"),
        ("path label\na.mp4 x\n", "no column url or path; there are 'path label'"),
        ("path,label,size,manifest_size\n", "'manifest_size', which is taken; rename it"),
        ("path,kind,reason\n", "names no file"),
        ("path,path\n", "2 columns, 2 named 'path'"),
        ("path\na.mp4\na.mp4\n", r"line 3: '.*/a.mp4' is named in line 2 already; remove one"),
        ("path,label\na.mp4,x\n./a.mp4,y\n", r"line 3: .* is named in line 2 already \(with label 'x'\)"),
        ("path,start\na.mp4,3\nb.mp4,\na.mp4,\n", "line 2: .* is named whole in line 4, here in part"),
        ("path,start,end\na.mp4,1,2\na.mp4,1.0,0:02\n", "line 3: .* is named in line 2"),
        ("path,label\n,x\n", "line 2: has no path"),
        ("path\na.mp4,b,c\n", "line 2: has 3 fields, the first line 1"),
        ("path,label\na.mp4\n", "line 2: has 1 fields, the first line 2"),
        ("a.mp4 1\nb  2\n", "line 2: has 3 fields"),
        ("path\n", "names no file"),
        ("", "names no file"),
        ("\n \n", "names no file"),
        ('path\n"a.mp4\n', "line 2: cannot be read"),
        ('path,by\n"a\n\n.mp4","x\ny"\nb.mp4\n', "line 6: has 1 fields"),
        ('path,by\na.mp4,"x\ny"\n"a.mp4","1\n\n2"\n', "line 4: .* is named in line 2"),
        (b"path,by\na.mp4,x\nb.mp4,caf\xe9\n", "line 3: is not UTF-8"),
        (b"caf\xe9,x\n", "line 1: is not UTF-8"),
        ("path,start\na.mp4,-1\n", "line 2: start '-1' is not a time"),
        ("path,start\na.mp4,nan\n", "line 2: start 'nan' is not a time"),
        ("path,start\na.mp4,1_0\n", "line 2: start '1_0' is not a time"),
        ("path,end\na.mp4,1:60\n", "line 2: end '1:60' is not a time"),
        ("path,start,end\na.mp4,5,5\n", "line 2: end 5 is not after start 5"),
        ("path,end\na.mp4,0\n", "line 2: end 0 is not after start 0"),
    ],
)
def test_faults_name_file_line_and_remedy(text: str | bytes, words: str, read: Any) -> None:
    with pytest.raises(InputError, match=f"/m.csv.*{words}"):
        read(text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"path": 5}', "path 5 is not text"),
        (b'{"label": "x"}', "has no path"),
        (b'{"path": "\\ud800.mp4"}', "is not JSON"),
        (b'{"path": "\xff"}', "is not UTF-8"),
        (b'{"path": "b.mp4", "start": true}', "start True is not a time"),
        (b'{"path": "b.mp4", "start": NaN}', "start nan is not a time"),
    ],
)
def test_bad_json_lines(line: bytes, words: str, read: Any) -> None:
    with pytest.raises(InputError, match=f"/m.jsonl, line 3: .*{words}"):
        read(b'{"path": "a.mp4", "start": 1}\n\n' + line + b"\n", "m.jsonl")


def test_bad_parquet(tmp_path: Path, read: Any) -> None:
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read("no parquet", "m.parquet")
    pq.write_table(
        pa.table({"path": ["a.mp4", "", "a.mp4"], "n": pa.array([1, 2, 3], pa.uint64())}),
        tmp_path / "n.parquet",
    )
    with pytest.raises(InputError, match=r"row 2: has no path.*\n.*row 3: .* is named in row 1 already"):
        list_sources(str(tmp_path / "n.parquet"), ShardConfig())
    pq.write_table(pa.table({"path": ["a.mp4"], "n": pa.array([2**64 - 1], pa.uint64())}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="row 1: n 18446744073709551615 is beyond int64"):
        list_sources(str(tmp_path / "n.parquet"), ShardConfig())


@pytest.mark.parametrize("role", ["url", "label", "start", "end"])
def test_a_column_that_is_asked_for_must_be_there(role: str, read: Any) -> None:
    with pytest.raises(InputError, match=f"no column 7; there are 'path', 'label'; name it with --{role}-column"):
        read("path,label\na.mp4,x\n", **{f"{role}_column": "7"})
    if role != "url":
        with pytest.raises(InputError, match="no column x; there are columns 1 to 2, no header"):
            read("a.mp4,x\n", **{f"{role}_column": "x"})


def test_ten_faults_are_told_and_the_rest_counted(read: Any) -> None:
    with pytest.raises(InputError) as e:
        read("path,label\nz.mp4,x\nz.mp4,x\n" + "".join(f"{i}.mp4\n" for i in range(1000)))
    lines = str(e.value).splitlines()
    assert [line.split(", line ")[1].split(":")[0] for line in lines[:10]] == [str(n) for n in range(3, 13)]
    assert lines[10:] == ["and 991 more"]


def test_the_messy_manifest_of_the_corpus_is_told_whole(corpus: Path) -> None:
    with pytest.raises(InputError) as e:
        list_sources(str(corpus / "kinetics_style" / "annotations_messy.csv"), ShardConfig())
    assert [line.split(", line ")[1].split(":")[0] for line in str(e.value).splitlines()] == [
        "3",
        "7",
        "8",
        "9",
        "10",
        "13",
    ]
    assert list_sources(str(corpus / "kinetics_style" / "annotations.csv"), ShardConfig()).rows == 18


def test_lines_are_whole_however_the_file_is_cut_into_pieces(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_PIECE", 7)
    listing = read("path,by\r\n" + "".join(f'dir/ü{i:04d}.mp4,"a ""b""\n{i}"\r\n' for i in range(200)))
    assert list(_sources(listing, tmp_path)) == [f"dir/ü{i:04d}.mp4" for i in range(200)]
    assert _extra(listing)[7] == {"by": 'a "b"\n7'}
    monkeypatch.setattr(manifest, "_LONGEST", 50)
    with pytest.raises(InputError, match=r"m\.csv, line 2: is longer than 50 bytes"):
        read("path\n" + "x" * 100)


def test_a_file_that_only_has_the_name_of_a_json_list_is_told_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_bytes(bytes(range(128, 256)) * 20)
    with pytest.raises(InputError, match=r"list.jsonl, line 1: is not UTF-8"):
        list_sources(str(path), ShardConfig())

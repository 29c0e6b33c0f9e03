"""A bucket of tars gives what its files would give alone, and whatever is wrong with a tar is accounted for."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.repairs import repair
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import InputError, StorageError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.estimate import estimate
from reelmae.pipeline.ingest.job import rerun_tasks, shard
from reelmae.pipeline.ingest.run import members

Make = Callable[..., Path]
WriteTar = Callable[..., Path]
SMALL = ShardConfig(short_side=48, clip_seconds=1, sources_per_task=3)


@pytest.fixture(scope="session")
def videos(make_video: Make, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Seven small videos, each another."""
    folder = tmp_path_factory.mktemp("videos")
    return [make_video(folder / f"{i}.mp4", frames=4, seed=i).read_bytes() for i in range(7)]


def fates(dst: Path | str) -> dict[str, Any]:
    """Source → the sha256 of its clips, or why there is none; without the part of the url up to its `#`."""
    found: dict[str, Any] = {}
    for row in pq.read_table(f"{dst}/{schema.INDEX}").to_pylist():
        found.setdefault(row["source"].partition("#")[2] or Path(row["source"]).name, []).append(row["sha256"])
    for row in pq.read_table(f"{dst}/{schema.REJECTS_FILE}").to_pylist():
        found[row["source"].partition("#")[2] or Path(row["source"]).name] = row["reason"], row["detail"]
    return found


def rows(dst: Path, *names: str) -> dict[str, tuple[Any, ...]]:
    """Member → values of these columns of its first clip."""
    table = pq.read_table(dst / schema.INDEX).to_pylist()
    return {row["source"].partition("#")[2]: tuple(row[name] for name in names) for row in table}


def files(dst: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dst)): p.read_bytes() for p in sorted(dst.rglob("*")) if p.is_file()}


def test_a_bucket_of_tars_gives_what_its_loose_files_give(
    tiny_bucket: Path, write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [p for p in sorted(tiny_bucket.rglob("*")) if p.is_file()]
    for i in range(2):
        write_tar(tmp_path / f"src/{i}.tar", [(p.name, p.read_bytes()) for p in paths[i::2]])
    shard(str(tiny_bucket), str(tmp_path / "loose"), SMALL)
    shard(str(tmp_path / "src"), str(tmp_path / "dst"), SMALL, workers=2)
    assert fates(tmp_path / "dst") == fates(tmp_path / "loose")
    assert len(fates(tmp_path / "dst")) == len(paths) == 16
    assert verify(str(tmp_path / "dst"), deep=True).faults == ()
    monkeypatch.setattr(members, "PIECE", 10_000)  # some videos are longer
    shard(str(tmp_path / "src"), str(tmp_path / "pieces"), SMALL, workers=1)
    assert files(tmp_path / "pieces") == files(tmp_path / "dst")
    plan = json.loads((tmp_path / "dst" / schema.PLAN_JSON).read_text())
    assert plan["format"] == schema.FORMAT
    assert [part["tars"] for part in plan["parts"]] == [2]
    plan = json.loads((tmp_path / "loose" / schema.PLAN_JSON).read_text())
    assert "tars" not in plan["parts"][0]  # as older versions write it and know it


def test_side_files_are_label_and_columns(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    def facts(**values: object) -> bytes:
        return json.dumps(values).encode()

    write_tar(
        tmp_path / "src/a.tar",
        [
            ("x/1.cls", b"walk\n"),
            ("x/1.json", facts(n=1, rate=1, source="camera", deep={"b": [1]}, label="run", url="https://h/1")),
            ("x/1.mp4", videos[0]),
            ("x/1.txt", "wälk\n".encode()),
            ("x/2.JSON", facts(n=2, rate=0.5, label="run", none=None)),
            ("x/2.mp4", videos[1]),
            ("x/3.mp4", videos[2]),
            ("x/3.json", b'["no object"]'),
            ("x/3.txt", b"\xff"),
            ("y/4.txt", b"alone"),
            ("y/5.mp4", videos[3]),
        ],
    )
    write_tar(tmp_path / "src/b.tar", [("6.mp4", videos[4]), ("6.json", facts(n=-1, manifest_source=3, source=True))])
    dst = tmp_path / "dst"
    shard(str(tmp_path / "src"), str(dst), SMALL)
    columns = ("label", "n", "rate", "manifest_manifest_source", "manifest_source", "deep", "url", "txt")
    assert json.loads((dst / schema.DATASET_JSON).read_text())["columns"] == {
        "deep": "string",
        "manifest_manifest_source": "string",
        "manifest_source": "int64",
        "n": "int64",
        "rate": "double",
        "txt": "string",
        "url": "string",
    }
    assert rows(dst, *columns) == {
        "x/1.mp4": ("walk", 1, 1.0, "camera", None, '{"b": [1]}', "https://h/1", "wälk"),
        "x/2.mp4": ("run", 2, 0.5, None, None, None, None, None),
        "x/3.mp4": (None,) * 8,
        "y/5.mp4": (None,) * 8,
        "6.mp4": (None, -1, None, "true", 3, None, None, None),
    }
    assert json.loads((dst / schema.LABELS).read_text()) == {"run": 0, "walk": 1}
    rejected = {name: fate[0] for name, fate in fates(dst).items() if isinstance(fate, tuple)}
    assert rejected == dict.fromkeys(("x/3.json", "x/3.txt", "y/4.txt"), "not_a_video")
    shard(str(tmp_path / "src"), str(tmp_path / "named"), SMALL.model_copy(update={"label_column": "n"}))
    assert {name: label for name, (label,) in rows(tmp_path / "named", "label").items()} == {
        "x/1.mp4": "walk",
        "x/2.mp4": "2",
        "x/3.mp4": None,
        "y/5.mp4": None,
        "6.mp4": "-1",
    }
    with pytest.raises(InputError, match=r"no \.json in the tars has a 'm'; name their label with --label-column"):
        shard(str(tmp_path / "src"), str(tmp_path / "no"), SMALL.model_copy(update={"label_column": "m"}))


def test_a_folder_is_a_label_if_it_is_wanted(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    write_tar(tmp_path / "src/run/a.tar", [("x/1.mp4", videos[0]), ("2.cls", b"own"), ("2.mp4", videos[1])])
    write_tar(tmp_path / "src/b.tar", [("./walk/deep/3.mp4", videos[2]), ("4.mp4", videos[3])])
    shard(str(tmp_path / "src"), str(tmp_path / "dst"), SMALL.model_copy(update={"labels": "folder"}))
    labels = {name: label for name, (label,) in rows(tmp_path / "dst", "label").items()}
    assert labels == {"x/1.mp4": "run", "2.mp4": "own", "./walk/deep/3.mp4": "walk", "4.mp4": None}


def _broken(path: Path, name: str, at: int, write: bytes) -> None:
    """Write over a member's header."""
    with tarfile.open(path) as tar:
        offset = tar.getmember(name).offset
    data = bytearray(path.read_bytes())
    data[offset + at : offset + at + len(write)] = write
    path.write_bytes(bytes(data))


def test_whatever_is_wrong_with_a_tar_is_accounted_for(
    videos: list[bytes], write_tar: WriteTar, tmp_path: Path
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    cut = write_tar(src / "cut.tar", [("c1.mp4", videos[0]), ("c2.mp4", videos[1])])
    cut.write_bytes(cut.read_bytes()[: 512 + -(-len(videos[0]) // 512) * 512 + 512 + 700])
    write_tar(src / "none.tar", [])
    write_tar(src / "broken.tar", [(f"b{i}.mp4", videos[i]) for i in range(3)])
    _broken(src / "broken.tar", "b1.mp4", 148, b"0000000\0")
    liar = tarfile.TarInfo("l1.mp4")
    liar.size = 10**11
    write_tar(src / "lie.tar", [("l0.mp4", videos[0]), ("l1.mp4", videos[1]), ("l2.mp4", videos[2])])
    _broken(src / "lie.tar", "l1.mp4", 0, liar.tobuf(tarfile.GNU_FORMAT))
    kinds = {"sym.mp4": tarfile.SYMTYPE, "hard.mp4": tarfile.LNKTYPE, "dev.mp4": tarfile.CHRTYPE}
    odd: list[Any] = []
    for name, kind in kinds.items():
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        odd.append(info)
    long = ["p" * 150 + "/p.mp4", "ü" * 130 + ".mp4"]
    odd += [("d.mp4", videos[3]), ("d.mp4", videos[4]), ("d.mp4#7", videos[5]), ("d.mp4", b"")]
    odd += [(long[0], videos[1]), ("../../up.mp4", videos[2]), ("/abs.mp4", videos[3]), ("__meta__.mp4", videos[4])]
    write_tar(src / "odd.tar", odd, tarfile.GNU_FORMAT)
    write_tar(
        src / "pax.tar",
        [(long[1], videos[0]), (b"\xff\xfe.mp4".decode("utf-8", "surrogateescape"), videos[1])],
        tarfile.PAX_FORMAT,
    )
    write_tar(Path(os.fsdecode(bytes(src) + b"/caf\xe9.tar")), [("n.mp4", videos[5])])
    (src / "text.tar").write_bytes(b"no tar at all " * 100)
    (src / "empty.tar").write_bytes(b"")
    (src / "video.tar").write_bytes(videos[6])
    (src / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    outside = write_tar(tmp_path / "outside.tar", [("secret.mp4", videos[0])])
    (src / "out.tar").symlink_to(outside)
    os.mkfifo(src / "pipe.tar")
    summary = shard(str(src), str(dst), SMALL)
    alone = tmp_path / "alone"
    alone.mkdir()
    for i, video in enumerate(videos):
        (alone / f"{i}.mp4").write_bytes(video)
    shard(str(alone), str(tmp_path / "loose"), SMALL)
    clip = [fates(tmp_path / "loose")[f"{i}.mp4"] for i in range(7)]
    missing = len(videos[1]) - 700
    follows = "a link in a tar; not followed"
    second = 512 + -(-len(videos[0]) // 512) * 512  # where the header of a second member is
    beyond = second + 512 + 10**11 - (src / "lie.tar").stat().st_size
    assert fates(dst) == {
        "c1.mp4": clip[0],
        "c2.mp4": ("fetch_failed", "its tar ends before it does"),
        "cut.tar": ("fetch_failed", f"the tar ends {missing} bytes before its member 'c2.mp4' does"),
        "none.tar": ("fetch_failed", "the tar holds no file"),
        "b0.mp4": clip[0],
        "b2.mp4": clip[2],
        "broken.tar": ("fetch_failed", f"the tar has a broken header at byte {second}"),
        "l0.mp4": clip[0],
        "l1.mp4": ("fetch_failed", "its tar ends before it does"),
        "l2.mp4": clip[2],
        "lie.tar": ("fetch_failed", f"the tar ends {beyond} bytes before its member 'l1.mp4' does"),
        "sym.mp4": ("fetch_failed", follows),
        "hard.mp4": ("fetch_failed", follows),
        "dev.mp4": ("fetch_failed", "a device, no plain file"),
        "d.mp4": clip[3],
        "d.mp4#2": clip[4],
        "d.mp4#7#1": clip[5],
        "d.mp4#3": ("empty_file", "0 bytes"),
        long[0]: clip[1],
        "../../up.mp4": clip[2],
        "/abs.mp4": clip[3],
        "__meta__.mp4": clip[4],
        long[1]: clip[0],
        "\\xff\\xfe.mp4": clip[1],
        "n.mp4": clip[5],
        "text.tar": ("not_a_video", fates(dst)["text.tar"][1]),
        "empty.tar": ("empty_file", "0 bytes"),
        "video.tar": clip[6],
        "gone.tar": ("fetch_failed", "gone: no such file"),
        "out.tar": ("fetch_failed", "a link that leads out of the bucket; not followed"),
        "pipe.tar": ("fetch_failed", "no plain file"),
    }
    assert summary.sources == 31
    assert verify(str(dst), deep=True).faults == ()
    assert not (tmp_path.parent / "up.mp4").exists()


def test_src_may_be_a_tar_or_a_list_of_tars(
    videos: list[bytes], write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        write_tar(tmp_path / f"src/0{i}.tar", [(f"{i}.mp4", videos[i])])
    shutil.copytree(tmp_path / "src", tmp_path / "src/folder.tar")
    for n, (src, names) in enumerate(
        [
            ("src/00.tar", "0"),
            ("src/{00..02}.tar", "012"),
            (f"src/00.tar::{tmp_path}/src/0{{2,3}}.tar::src/../src/00.tar", "023"),
            ("src/folder.tar", "0123"),
        ]
    ):
        dst = tmp_path / f"dst{n}"
        shard(src, str(dst), SMALL)
        assert sorted(fates(dst)) == [f"{name}.mp4" for name in names]
        assert shard(src, str(dst), SMALL).new_sources == 0  # resumes under the same name
    plan = json.loads((tmp_path / "dst2" / schema.PLAN_JSON).read_text())
    assert plan["parts"][0]["src"] == f"{tmp_path}/src/00.tar::{tmp_path}/src/0{{2,3}}.tar::{tmp_path}/src/00.tar"
    summary = shard("src/{03..05}.tar", str(tmp_path / "gone"), SMALL)  # not all of them are there
    assert summary.rejected == {"fetch_failed": 2}
    assert fates(tmp_path / "gone")["05.tar"] == ("fetch_failed", "gone: no such file")


@pytest.mark.parametrize(
    ("src", "words"),
    [
        ("x.tar", "x.tar: no such tar; check the path"),
        ("x{0..3}.tar", "no such tar"),
        ("a.tar.gz", "'a.tar.gz' is a compressed tar, which cannot be read in parts; unpack it to a .tar"),
        ("a.tar::b.tgz", "'b.tgz' is a compressed tar"),
        ("pipe:cat a.tar", "commands are not run"),
        ("{0..9999999}.tar", "names more than 1000000 tars"),
    ],
)
def test_lists_that_are_refused(src: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        shard(src, str(tmp_path / "dst"), SMALL)
    assert words in str(refused.value)


def test_a_manifests_row_is_for_all_members_of_its_tar(
    videos: list[bytes], write_tar: WriteTar, tmp_path: Path
) -> None:
    (tmp_path / "loose.mp4").write_bytes(videos[0])
    own = json.dumps({"n": 7, "who": "member", "label": "own"}).encode()
    write_tar(tmp_path / "a.tar", [("1.json", own), ("1.mp4", videos[1]), ("2.mp4", videos[2])])
    write_tar(tmp_path / "b.tar", [("3.json", own), ("3.mp4", videos[3])])
    lines = ["path,label,who,score", "a.tar,x,row,2", "b.tar,,,", "loose.mp4,y,me,3", "no.tar,z,,"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    dst = tmp_path / "dst"
    shard(str(tmp_path / "list.csv"), str(dst), SMALL)
    assert rows(dst, "label", "who", "score", "n") == {
        "1.mp4": ("x", "row", 2, 7),
        "2.mp4": ("x", "row", 2, None),
        "3.mp4": ("own", None, None, 7),
        "": ("y", "me", 3, None),
    }
    assert fates(dst)["no.tar"] == ("fetch_failed", "gone: no such file")
    (tmp_path / "spans.csv").write_text("path,start,end\na.tar,1,2\nb.tar,,\nc.tar.gz,,\n")
    with pytest.raises(InputError) as refused:
        shard(str(tmp_path / "spans.csv"), str(tmp_path / "no"), SMALL)
    first, second = str(refused.value).splitlines()
    assert first.endswith("is a tar, which has no span; leave it out")
    assert "line 4: " in second
    assert "is a compressed tar" in second


def test_append_takes_new_tars_and_new_members(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_tar(src / "a.tar", [("1.mp4", videos[0]), ("2.mp4", videos[1])])
    shard(str(src), str(dst), SMALL, limit=1)
    assert len(fates(dst)) == 1
    assert shard(str(src), str(dst), SMALL, append=True).new_sources == 1
    write_tar(src / "b.tar", [("3.mp4", videos[2])])
    write_tar(src / "a.tar", [("1.mp4", videos[0]), ("2.mp4", videos[1]), ("4.mp4", videos[3])])
    (src / "loose.mp4").write_bytes(videos[4])
    summary = shard(str(src), str(dst), SMALL, append=True)
    assert (summary.new_sources, summary.changed_sources) == (3, 2)  # the old members' tar has another time
    assert sorted(fates(dst)) == ["1.mp4", "2.mp4", "3.mp4", "4.mp4", "loose.mp4"]
    assert shard(str(src), str(dst), SMALL, append=True).new_sources == 0
    assert verify(str(dst), deep=True).faults == ()


def test_retry_reads_the_tars_as_they_are_then(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    members = [(f"{i}.mp4", videos[i]) for i in range(4)]
    whole = write_tar(src / "a.tar", members).read_bytes()
    (src / "a.tar").write_bytes(whole[: 512 + -(-len(videos[0]) // 512) * 512 + 512 + 700])
    write_tar(src / "b.tar", [("x.mp4", b"no video"), ("y.mp4", b"nor this"), ("z.mp4", b"")])
    (src / "loose.mp4").write_text("no video")
    write_tar(src / "gone.tar", [("g.mp4", b"gone")])
    shard(str(src), str(dst), SMALL)
    assert sorted(name for name, fate in fates(dst).items() if isinstance(fate, list)) == ["0.mp4"]
    (src / "a.tar").write_bytes(whole)
    write_tar(src / "b.tar", [("front.mp4", videos[5]), ("x.mp4", videos[4]), ("z.mp4", b"")])
    (src / "loose.mp4").write_bytes(videos[6])
    (src / "gone.tar").unlink()
    shard(str(src), str(dst), SMALL, retry_rejected="all")
    found = fates(dst)
    assert sorted(name for name, fate in found.items() if isinstance(fate, list)) == [
        "0.mp4",
        "1.mp4",
        "loose.mp4",
        "x.mp4",
    ]
    assert {name: fate for name, fate in found.items() if isinstance(fate, tuple)} == {
        "a.tar": ("fetch_failed", "is whole now: --append takes the members that are new"),
        "g.mp4": ("fetch_failed", "gone: its tar is no more there"),
        "y.mp4": ("fetch_failed", "its tar holds no such member any more"),
        "z.mp4": ("empty_file", "0 bytes"),
    }
    summary = shard(str(src), str(dst), SMALL, append=True)
    assert summary.new_sources == 3
    assert sorted(set(fates(dst)) - set(found)) == ["2.mp4", "3.mp4", "front.mp4"]
    assert verify(str(dst), deep=True).faults == ()


def test_a_tar_that_was_replaced_after_planning(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_tar(src / "a.tar", [(f"{i}.mp4", videos[i]) for i in range(3)])
    write_tar(src / "b.tar", [("b.mp4", videos[3])])
    shard(str(src), str(dst), SMALL)
    for name in ("commits", "shards", "index.parquet", "rejects.parquet", "dataset.json"):
        shutil.rmtree(dst / name) if (dst / name).is_dir() else (dst / name).unlink()
    write_tar(src / "a.tar", [("0.mp4", videos[0]), ("front.mp4", videos[4]), ("1.mp4", videos[1])])
    (src / "b.tar").unlink()
    shard(str(src), str(dst), SMALL)
    changed = ("fetch_failed", "the tar has changed since it was planned")
    found = fates(dst)
    assert found.pop("b.mp4") == ("fetch_failed", "gone: its tar is no more there")
    assert isinstance(found.pop("0.mp4"), list)
    assert found == {"1.mp4": changed, "2.mp4": changed}


def test_a_repair_reads_the_tars_again(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    for name in "ab":
        write_tar(src / f"{name}.tar", [(f"{name}{i}.mp4", videos[i]) for i in range(3)] + [(f"{name}.md", b"no")])
    cut = (src / "b.tar").read_bytes()
    (src / "b.tar").write_bytes(cut[: cut.index(b"b.md")])  # within a header: the tar itself is a reject
    shard(str(src), str(dst), SMALL)
    before = files(dst)
    for shard_file in sorted((dst / "shards").glob("*.tar")):
        shard_file.write_bytes(shard_file.read_bytes()[:-5000])
    next((dst / "commits").iterdir()).unlink()
    report = repair(str(dst), deep=True)
    assert report.ok
    assert files(dst) == before
    rerun_tasks(str(dst), [0, 1])
    assert files(dst) == before
    (dst / "shards/000000-00.tar").unlink()
    for name in "ab":
        (src / f"{name}.tar").rename(tmp_path / f"{name}.tar")
    with pytest.raises(StorageError, match=r"\.tar: gone; without these sources, shards of .* cannot be made again"):
        repair(str(dst))
    (src / "a.tar").write_bytes(bytes(10240))
    (src / "b.tar").write_bytes(bytes(10240))
    with pytest.raises(StorageError, match="tar has changed since it was planned; its shard cannot be made again"):
        repair(str(dst))


def test_a_dataset_of_ours_is_a_bucket_of_tars(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    write_tar(
        tmp_path / "src/a.tar",
        [
            member
            for i in range(4)
            for member in ((f"{i}.cls", b"x"), (f"{i}.json", b'{"n": 1}'), (f"{i}.mp4", videos[i]))
        ],
    )
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    shard(str(tmp_path / "src"), str(one), SMALL)
    for src, dst in ((one, two), (two, three)):
        summary = shard(str(src / "shards"), str(dst), SMALL)
        assert (summary.sources_kept, summary.rejected) == (4, {"not_a_video": 2})  # the .idx of its shards
        table = pq.read_table(dst / schema.INDEX)
        assert table.column("label").to_pylist() == ["x"] * 4
        source = "manifest_source"
        before = set(pq.read_table(src / schema.INDEX).column("source").to_pylist())
        assert set(table.column(source).to_pylist()) == before


def test_a_dry_run_counts_members(videos: list[bytes], write_tar: WriteTar, tmp_path: Path) -> None:
    members = [member for i in range(6) for member in ((f"{i}.json", b'{"n": 1}'), (f"{i}.mp4", videos[i]))]
    write_tar(tmp_path / "src/a.tar", members)
    found = estimate(str(tmp_path / "src/a.tar"), str(tmp_path / "dst"), SMALL)
    assert found["listed_sources"] == found["new_sources"] == 6
    assert found["kinds"] == {".mp4": 6}
    assert found["columns"] == {"n": "int64"}
    assert found["source_bytes"] == sum(map(len, videos[:6]))
    assert found["estimate"]["clips"] == 6

"""What a dataset holds, counted in one pass, and how `reelmae inspect` prints it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.contents import DatasetFacts, Durations, duration_bins
from reelmae.pipeline.dataset.contents import facts as dataset_facts
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.storage.claim import CLAIM, Claim
from reelmae.pipeline.storage.store import Store
from reelmae.tools.summary import bar, inspect

Tables = Callable[..., Path]
Clip = Callable[..., dict[str, Any]]


def facts(folder: Path) -> DatasetFacts:
    return dataset_facts(Store(str(folder)))


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from reelmae.tools.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "inspect", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# --- the pass --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory, make_tables: Tables, make_clip: Clip) -> DatasetFacts:
    """Of 15,001 sources: the last gave 5 clips, the others 3 each, so that batches end within a source."""
    n = 15_000
    names = [*np.repeat([f"/raw/{i:05d}.mp4" for i in range(n)], 3).tolist(), *["/raw/last.mp4"] * 5]
    row = make_clip("/raw/x.mp4")
    scalars = {name: pa.scalar(value, schema.CLIPS.field(name).type) for name, value in row.items()}
    columns: dict[str, Any] = {name: pa.repeat(scalar, len(names)) for name, scalar in scalars.items()}
    columns["source"] = pa.array(names)
    columns["key"] = pa.array([f"{i:021d}" for i in range(len(names))])
    columns["duplicate_of"] = pa.array([None if i % 10 else f"{1:021d}" for i in range(len(names))], pa.string())
    folder = make_tables(tmp_path_factory.mktemp("large"), pa.table(columns, schema.CLIPS))
    return facts(folder)


def test_a_source_counts_once_though_a_batch_ends_within_it(large: DatasetFacts) -> None:
    assert (large.sources_kept, large.clips) == (15_001, 45_005)
    assert large.bytes_in == 15_001 * 1000
    assert (large.seconds_in, large.seconds_out) == (15_001 * 60, 45_005 * 10)
    assert large.codec_in == (("hevc in mov", 15_001),)
    assert large.codec_out == (("h264", 45_005),)
    assert large.largest == ("/raw/last.mp4", 5)


def test_the_sheet_is_spread_evenly_over_clips_that_repeat_no_other(large: DatasetFacts) -> None:
    places = [int(row["key"]) for row in large.sheet]
    assert len(places) == 25
    assert all(place % 10 for place in places)
    gaps = np.diff(places)
    assert gaps.max() < 1.6 * gaps.min()
    assert places[0] < 1000 and places[-1] > 43_000


def test_a_source_of_unknown_length_is_left_out_of_the_hours(
    tmp_path: Path, make_tables: Tables, make_clip: Clip
) -> None:
    rows = [
        make_clip("/raw/a.mp4"),
        make_clip("/raw/b.mp4", source_seconds=0.0),
        make_clip("/raw/c.mp4", source_seconds=float("nan")),
    ]
    found = facts(make_tables(tmp_path, rows))
    assert (found.sources_kept, found.sources_timed, found.seconds_in) == (3, 1, 60)


def test_rejects_are_counted_by_reason_sources_and_spans_apart(
    tmp_path: Path, make_tables: Tables, make_clip: Clip
) -> None:
    rejects = [(f"/raw/{i:04d}", None, None, "unreadable", f"words {i}") for i in range(1000)]
    rejects += [("/raw/a.mp4", 10.0 * i, 10.0 * i + 10, "static", "motion 0.1") for i in range(3)]
    rejects += [("/raw/b.mp4", None, None, "static", "motion 0.2")]
    found = facts(make_tables(tmp_path, [make_clip("/raw/a.mp4")], rejects))
    assert [(r.reason, r.sources, r.spans) for r in found.rejects] == [
        ("unreadable", 1000, 0),
        ("static", 1, 3),
    ]
    assert (found.sources, found.sources_rejected, found.spans_rejected) == (1002, 1001, 3)
    unreadable, static = (r.examples for r in found.rejects)
    assert len(unreadable) == 20
    assert [e.source for e in unreadable] == sorted(e.source for e in unreadable)
    assert unreadable[0].source < "/raw/0300" and unreadable[-1].source > "/raw/0700"  # drawn from all over
    assert all(e.detail == f"words {int(e.source[-4:])}" for e in unreadable)
    assert [e.start_s for e in static] == [0.0, 10.0, 20.0, None]


def test_scores_fall_into_fixed_bins_with_the_threshold_in_force_and_what_it_rejected(
    tmp_path: Path, make_tables: Tables, make_clip: Clip
) -> None:
    values = (0.0, 0.49, 0.5, 1.0, 250.0)
    rows = [make_clip(f"/raw/{i}", motion=v, border=1.0 if i == 0 else 0.0) for i, v in enumerate(values)]
    rejects = [("/raw/s", None, None, "static", ""), ("/raw/0", 1.0, 2.0, "static", "")]
    found = facts(make_tables(tmp_path, rows, rejects, config={"min_motion": 0.5, "max_border": 0}))
    motion, border = found.scores[0], found.scores[3]
    assert (motion.name, motion.threshold, motion.sources, motion.spans) == ("motion", 0.5, 1, 1)
    assert (motion.counts[:3], motion.counts[-1], sum(motion.counts)) == ((2, 1, 1), 1, 5)
    assert (border.threshold, border.common, border.beyond_common) == (0, 0.7, 1)
    assert (border.counts[0], border.counts[-1]) == (4, 1)


def test_repeats_are_told_with_what_they_repeat(tmp_path: Path, make_tables: Tables, make_clip: Clip) -> None:
    first = make_clip("/raw/a.mp4", 1)
    same = make_clip("/raw/b.mp4", 0, sha256=first["sha256"], duplicate_of=first["key"])
    like = make_clip("/raw/c.mp4", 0, sha256="f" * 64, duplicate_of=first["key"])
    found = facts(make_tables(tmp_path, [first, same, like]))
    assert found.duplicates == 2
    assert [(r.source, r.first_source, r.first_start_s, r.exact) for r in found.repeats] == [
        ("/raw/b.mp4", "/raw/a.mp4", 10.0, True),
        ("/raw/c.mp4", "/raw/a.mp4", 10.0, False),
    ]


def test_labels_and_the_manifests_own_columns(tmp_path: Path, make_tables: Tables, make_clip: Clip) -> None:
    rows = [
        make_clip(f"/raw/{i}", label="run" if i < 3 else None, label_id=1 if i < 3 else -1, views=i or None)
        for i in range(4)
    ]
    found = facts(make_tables(tmp_path, rows, labels={"jump": 0, "run": 1}, columns={"views": "int64"}))
    assert (found.labels.labels, found.labels.without_clips, found.labels.clips_unlabelled) == (2, 1, 1)
    assert found.labels.largest == (("run", 3),)
    assert [(c.name, c.type, c.filled) for c in found.columns] == [("views", "int64", 3)]


def test_a_dataset_of_which_everything_was_rejected_is_told_of(tmp_path: Path, make_tables: Tables) -> None:
    folder = make_tables(tmp_path, [], [("/raw/a", None, None, "empty_file", "0 bytes")])
    found = facts(folder)
    assert (found.sources, found.sources_kept, found.clips, found.durations) == (1, 0, 0, None)
    text = run(folder)
    assert (text.returncode, text.stderr) == (0, "")
    assert "empty_file" in text.stdout


def test_one_long_clip_does_not_flatten_the_durations() -> None:
    bins = duration_bins(Durations(1, 10, 10, 86_000, {50: 100, 100: 900, 860_000: 1}))
    assert len(bins) <= 26
    assert sum(n for _, n in bins) == 1001
    assert dict(bins)[5.0] == 100


def test_a_table_that_is_cut_off_or_of_another_version_is_named(
    tmp_path: Path, make_tables: Tables, make_clip: Clip
) -> None:
    folder = make_tables(tmp_path, [make_clip("/raw/a")])
    table = pq.read_table(folder / schema.INDEX)
    pq.write_table(table.drop_columns(["motion"]), folder / schema.INDEX)
    with pytest.raises(DatasetError, match=r"index.parquet: has no column motion"):
        facts(folder)
    data = (folder / schema.REJECTS_FILE).read_bytes()
    pq.write_table(table, folder / schema.INDEX)
    (folder / schema.REJECTS_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"rejects.parquet: is damaged"):
        facts(folder)


# --- the command -----------------------------------------------------------------------------------------------


def test_the_tables_are_plain_text_of_a_hundred_columns_where_there_is_no_terminal(tiny_run: Path) -> None:
    done = run(tiny_run / "shards")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    about = json.loads((tiny_run / "shards" / "dataset.json").read_text())
    assert f"{about['sources']}: {about['sources_kept']} gave clips" in done.stdout
    for word in (*about["rejected"], "█", "Motion", "Duration of clips", "min_motion is off"):
        assert word in done.stdout


def test_json_is_one_object_whose_sums_are_those_of_the_dataset(tiny_run: Path) -> None:
    found = json.loads(run(tiny_run / "shards", "--json").stdout)
    about = json.loads((tiny_run / "shards" / "dataset.json").read_text())
    assert found["finished"] is True
    for name in ("sources", "sources_kept", "clips", "duplicates", "shards"):
        assert found[name] == about[name]
    assert found["seconds_out"] == pytest.approx(about["seconds"], abs=0.01)
    assert {r["reason"]: r["sources"] for r in found["rejects"]} == about["rejected"]
    rows = pq.read_table(tiny_run / "shards" / "index.parquet").to_pylist()
    assert found["bytes_in"] == sum({r["source"]: r["source_bytes"] for r in rows}.values())
    assert dict(found["size_out"]) == Counter(f"{r['width']}×{r['height']}" for r in rows)


def test_every_reject_is_a_line_of_five_fields(tiny_run: Path) -> None:
    rows = pq.read_table(tiny_run / "shards" / "rejects.parquet").to_pylist()
    lines = [line.split("\t") for line in run(tiny_run / "shards", "--rejects").stdout.splitlines()]
    assert [(line[0], line[1]) for line in lines] == [(r["reason"], r["source"]) for r in rows]
    assert {len(line) for line in lines} == {5}
    reason = rows[0]["reason"]
    chosen = run(tiny_run / "shards", "--rejects", reason).stdout.splitlines()
    assert len(chosen) == sum(r["reason"] == reason for r in rows)


def test_a_hostile_name_stays_on_its_line_and_can_be_told(tmp_path: Path, make_tables: Tables, make_clip: Clip) -> None:
    name = "/raw/a\nb\tc\x1b[2J\u202e\\n.mp4"
    folder = make_tables(tmp_path, [make_clip(name)], [(name, 10.0, None, "static", "one\ntwo")])
    done = run(folder, "--source", "[2J")
    escaped = r"/raw/a\nb\tc\x1b[2J\u202e\\n.mp4"
    kept, dropped = (line.split("\t") for line in done.stdout.splitlines())
    assert kept[:4] == ["clip", escaped, "0", "10"]
    assert dropped == ["static", escaped, "10", "", r"one\ntwo"]
    assert "\x1b" not in run(folder).stdout


def test_what_became_of_a_source_is_its_clips_and_its_rejects(tiny_run: Path) -> None:
    rows = pq.read_table(tiny_run / "shards" / "index.parquet").to_pylist()
    mine = [r for r in rows if r["source"] == rows[0]["source"]]
    lines = run(tiny_run / "shards", "--source", rows[0]["source"]).stdout.splitlines()
    assert len(lines) == len(mine)
    assert all(r["key"] in line and r["shard"] in line for r, line in zip(mine, lines, strict=True))
    found = json.loads(run(tiny_run / "shards", "--source", rows[0]["source"], "--json").stdout)
    assert [c["key"] for c in found["clips"]] == [r["key"] for r in mine]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rejects", "ugly"), "ugly: is not a reason"),
        (("--source", "nowhere"), "nowhere: no clip and no reject"),
    ],
)
def test_what_cannot_be_listed_is_a_message(arguments: tuple[str, ...], words: str, tiny_run: Path) -> None:
    done = run(tiny_run / "shards", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_reader_that_has_seen_enough_ends_the_list_in_silence(
    tmp_path: Path, make_tables: Tables, make_clip: Clip
) -> None:
    rejects = [(f"/raw/{i}", None, None, "unreadable", "words") for i in range(20_000)]
    folder = make_tables(tmp_path, [make_clip("/raw/a")], rejects)
    code = "import sys; from reelmae.tools.cli import main; sys.exit(main())"
    command = f"'{sys.executable}' -c '{code}' inspect '{folder}' --rejects | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_an_unfinished_dataset_says_how_far_it_is(tiny_run: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(tiny_run / "shards", tmp_path / "shards"))
    for name in ("dataset.json", "index.parquet", "rejects.parquet"):
        (shards / name).unlink()
    commits = sorted((shards / "commits").glob("*.parquet"))
    planned = json.loads((shards / "plan" / "plan.json").read_text())["parts"][0]
    done = run(shards)
    assert done.returncode == 0
    assert f"not finished: {len(commits)} of {planned['tasks']} tasks" in " ".join(done.stdout.split())
    commits[-1].unlink()
    found = json.loads(run(shards, "--json").stdout)
    assert found["finished"] is False
    assert found["job"]["tasks_done"] == planned["tasks"] - 1
    assert found["job"]["sources_done"] < found["job"]["sources"] == planned["sources"]
    with pytest.raises(InputError, match="not finished"):
        inspect(str(shards), rejects=())


def test_a_place_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no shard dataset"):
        inspect(str(tmp_path))


def test_a_dataset_in_object_storage_is_read(tiny_run: Path, s3_server: Any) -> None:
    url = s3_server.url("inspected")
    store = Store(url)
    for name in ("dataset.json", "index.parquet", "rejects.parquet", "labels.json", "plan/plan.json"):
        store.publish(tiny_run / "shards" / name, name)
    found, local = inspect(url, as_json=True), inspect(str(tiny_run / "shards"), as_json=True)
    assert found["url"] == url
    assert json.dumps({**found, "url": ""}) == json.dumps({**local, "url": ""})
    assert inspect(url, rejects=(), as_json=True) == inspect(str(tiny_run / "shards"), rejects=(), as_json=True)


def test_a_bar_is_never_empty_where_there_is_something() -> None:
    assert (bar(0, 10), bar(10, 10, 4), bar(5, 10, 4), bar(1, 10**6, 4)) == ("", "████", "██", "▏")


def test_the_sheet_shows_few_clips_of_one_source(tmp_path: Path, make_tables: Tables, make_clip: Clip) -> None:
    rows = [make_clip(f"/raw/{name}.mp4") for name in "a" + 40 * "b" + "cc"]
    shown = [row["source"][5] for row in facts(make_tables(tmp_path, rows)).sheet]
    assert shown == list("abbbcc")


def test_a_job_that_is_at_work_is_told(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(run_copy / "shards"))
    with Claim(store):
        inspect(store.url())
        assert "a job is at work: " in capsys.readouterr().out
        assert inspect(store.url(), as_json=True)["claim"].startswith("a job is at work: ")
    inspect(store.url())
    assert "a job" not in capsys.readouterr().out
    assert inspect(store.url(), as_json=True)["claim"] is None


def test_a_claim_that_was_left_says_what_is_known(run_copy: Path) -> None:
    store = Store(str(run_copy / "shards"))
    with Claim(store):
        claim = json.loads(store.read_bytes(CLAIM))
    dead = claim | {"process": claim["process"] | {"started": 1}, "user": "eve\x1b[2J"}
    for written, words in (
        (json.dumps(dead), "a job died here: "),
        (json.dumps(claim | {"process": None}), "claimed by a job: "),
        (json.dumps(claim | {"process": claim["process"] | {"boot": "another"}}), "claimed by a job: "),
        ("{", "claimed by a job that cannot be told"),
    ):
        store.publish_bytes(written.encode(), CLAIM)
        text = inspect(store.url(), as_json=True)["claim"]
        assert text.startswith(words) and text.isprintable()

import contextlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.index import columns
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection, in_fraction
from reelmae.pipeline.schema import clip_key, source_id

KINDS = {"views": "int64", "place": "string"}


def rows(n: int, **of: Callable) -> list[dict]:
    """Clips of sources of three clips each."""
    made: list[dict] = [{"source": f"source{i // 3}", "ordinal": i % 3, "frames": 30 + i} for i in range(n)]
    return [row | {name: value(i) for name, value in of.items()} for i, row in enumerate(made)]


def keys(index: ClipIndex) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def test_a_condition_plays_the_clips_of_which_it_is_true(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows(
        rows(
            23,
            views=lambda i: i * 10 if i % 4 else None,
            place=lambda i: f"p{i % 2}",
            label=lambda i: "xyz"[i % 3],
        ),
        KINDS,
    )
    index = ClipIndex.open(url, Selection(where="duration > 1.2 and label != 'x' and views < 200"))
    wanted = [i for i in range(23) if (30 + i) / 30 > 1.2 and i % 3 and i % 4 and i * 10 < 200]
    assert (index.frames - 30).tolist() == wanted
    assert index.unselected == 23 - len(wanted)
    assert len(ClipIndex.open(url, Selection(where="place == 'p1'"))) == 11


def test_what_is_selected_is_the_same_however_the_file_is_cut(index_of_rows: Callable[..., str]) -> None:
    many = rows(50, codec=lambda i: ["vp9", "h264"][i % 2])
    found = [
        ClipIndex.open(index_of_rows(many, rows_of_group=n), Selection(where="frames != 41 and frames < 70"))
        for n in (1, 7, 100)
    ]
    assert len({index.digest for index in found}) == 1
    for index in found:
        assert index.size.tolist() == found[0].size.tolist()
        assert index.shard_start.tolist() == found[0].shard_start.tolist()
        assert index.codec_names == ["h264", "vp9"]
        assert [index.codec_names[c] for c in index.codec_of_clip[:4]] == ["vp9", "h264", "vp9", "h264"]


def test_shards_and_codecs_of_which_nothing_is_left_are_gone(index_of_rows: Callable[..., str]) -> None:
    many = rows(12, codec=lambda i: "vp9" if i < 6 else "h264")
    index = ClipIndex.open(index_of_rows(many), Selection(where="codec == 'h264' and frames != 39"))
    assert index.shard_names == ["shards/000001-00.tar", "shards/000002-00.tar"]
    assert index.shard_start.tolist() == [0, 2, 5]
    assert index.codec_names == ["h264"]
    assert index.shard_bytes.tolist() == [512 + 4096 * 3 + 1007, 512 + 4096 * 3 + 1011]


def test_a_selection_that_leaves_nothing_is_refused(index_of_rows: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"none of its 6 clips is left by where='frames > 1000'"):
        ClipIndex.open(index_of_rows(rows(6)), Selection(where="frames > 1000"))


def test_an_unknown_column_is_named(index_of_rows: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"no column 'viewz'; did you mean views"):
        ClipIndex.open(index_of_rows(rows(3), KINDS), Selection(where="viewz > 3"))


# ---- fractions


def test_fractions_are_disjoint_complete_and_nested(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows(rows(300))

    def of(low: float, high: float) -> set[str]:
        return set(keys(ClipIndex.open(url, Selection(fraction=(low, high)))))

    everything = of(0, 1)
    assert len(everything) == 300
    assert of(0, 0.7) | of(0.7, 1) == everything
    assert not of(0, 0.7) & of(0.7, 1)
    assert of(0, 0.3) < of(0, 0.5) < of(0, 0.7)
    assert 100 < len(of(0, 0.5)) < 200


def test_clips_of_a_source_stay_together(index_of_rows: Callable[..., str]) -> None:
    index = ClipIndex.open(index_of_rows(rows(300)), Selection(fraction=(0, 0.5)))
    assert set(np.unique(index.source_id, return_counts=True)[1]) == {3}


def test_added_sources_change_nothing_for_the_others(index_of_rows: Callable[..., str]) -> None:
    before = ClipIndex.open(index_of_rows(rows(90)), Selection(fraction=(0.2, 0.6)))
    after = ClipIndex.open(index_of_rows(rows(150)), Selection(fraction=(0.2, 0.6)))
    assert keys(after)[: len(before)] == keys(before)
    assert after.ordinal.sum() > before.ordinal.sum()


def test_the_borders_of_a_fraction_belong_to_its_upper_side() -> None:
    ids = np.array([0, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert in_fraction(ids, (0, 0.25)).tolist() == [True, True, False, False, False, False]
    assert in_fraction(ids, (0.25, 0.5)).tolist() == [False, False, True, True, False, False]
    assert in_fraction(ids[:2], (0, 2.0**-65)).tolist() == [True, False]
    assert in_fraction(ids, (0.5, 1)).tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize("fraction", [(0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0, 1.5), (float("nan"), 1)])
def test_a_fraction_that_is_none_is_refused(fraction: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"fraction=\(.*0 <= from < to <= 1"):
        Selection(fraction=fraction)


def test_an_empty_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match="where is empty"):
        Selection(where=" ")


# ---- lists of keys


def test_a_list_plays_the_clips_it_names(index_of_rows: Callable[..., str], tmp_path: Path) -> None:
    url, listed = index_of_rows(rows(30)), tmp_path / "list.txt"
    wanted = [clip_key("source4", 2), clip_key("source0", 0), clip_key("source4", 1), clip_key("source9", 2)]
    listed.write_text("\n".join([*wanted, "", wanted[0], ""]) + "\r\n")
    index = ClipIndex.open(url, Selection(keys=str(listed)))
    assert sorted(keys(index)) == sorted(wanted)
    assert index.frames.tolist() == [30, 43, 44, 59]  # in the order of the index


def test_a_list_may_be_beside_or_at_a_url(index_of_rows: Callable[..., str], tmp_path: Path) -> None:
    url, key = index_of_rows(rows(6)), clip_key("source1", 1)
    fsspec.filesystem("memory").pipe_file("/lists/one.txt", key.encode())
    assert keys(ClipIndex.open(url, Selection(keys="memory://lists/one.txt"))) == [key]
    (tmp_path / "here.txt").write_text(key)
    with contextlib.chdir(tmp_path):
        assert keys(ClipIndex.open(url, Selection(keys="here.txt"))) == [key]


@pytest.mark.parametrize(
    "unknown", [clip_key("source4", 7), clip_key("nowhere", 0), f"{'f' * 16}_0000", f"{'0' * 16}_0000"]
)
def test_a_key_that_is_not_there_is_named(index_of_rows: Callable[..., str], tmp_path: Path, unknown: str) -> None:
    (tmp_path / "list.txt").write_text("\n".join([clip_key("source4", 1), unknown, clip_key("source99", 0)]))
    with pytest.raises(InputError, match=rf"{unknown} is not a clip of .*rows0 \(2 such keys\)"):
        ClipIndex.open(index_of_rows(rows(30)), Selection(keys=str(tmp_path / "list.txt")))


def test_a_listed_clip_that_another_wish_leaves_out_is_no_error(
    index_of_rows: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(clip_key("source1", n) for n in range(3)))
    url = index_of_rows(rows(30, duplicate_of=lambda i: clip_key("source0", 0) if i == 4 else None))
    index = ClipIndex.open(url, Selection(keys=str(tmp_path / "list.txt"), where="frames > 33"))
    assert (keys(index), index.left_out) == ([clip_key("source1", 2)], 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("0123456789abcdef_000", "'0123456789abcdef_000' is not a key"),
        ("ä", "not a list of keys"),
    ],
)
def test_a_list_that_is_none_is_refused(
    index_of_rows: Callable[..., str], tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        ClipIndex.open(index_of_rows(rows(3)), Selection(keys=str(tmp_path / "list.txt")))


def test_a_list_that_is_not_there_is_named(index_of_rows: Callable[..., str], tmp_path: Path) -> None:
    url = index_of_rows(rows(3))
    for missing in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match=f"{missing}: no such file"):
            ClipIndex.open(url, Selection(keys=str(missing)))


# ---- repeats


def test_repeats_are_left_out_and_counted_unless_asked_for(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows(rows(9, duplicate_of=lambda i: clip_key("source0", 0) if i in (3, 7, 8) else None))
    index = ClipIndex.open(url)
    assert ((index.frames - 30).tolist(), index.left_out, index.unselected) == ([0, 1, 2, 4, 5, 6], 3, 0)
    index = ClipIndex.open(url, Selection(duplicates=True))
    assert (len(index), index.left_out) == (9, 0)
    index = ClipIndex.open(url, Selection(where="frames > 35"))
    assert (index.frames.tolist(), index.left_out, index.unselected) == ([36], 2, 6)


def test_all_wishes_hold_at_once(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows(rows(300, duplicate_of=lambda i: clip_key("a", 0) if i % 5 == 0 else None))
    index = ClipIndex.open(url, Selection(where="frames < 200", fraction=(0, 0.5)))
    low = [i for i in range(170) if i % 5 and int(source_id(f"source{i // 3}"), 16) < 2**63]
    assert (index.frames - 30).tolist() == low


def test_many_threads_read_what_one_reads(index_of_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = index_of_rows(rows(200, codec=lambda i: f"c{i % 3}"), rows_of_group=3)
    monkeypatch.setattr(columns, "_ROWS", 2)
    found = []
    for cores in (1, 8):
        monkeypatch.setattr(columns, "usable_cores", lambda cores=cores: cores)
        found.append(ClipIndex.open(url, Selection(where="frames != 100")))
    one, many = found
    for name in (
        "source_id",
        "ordinal",
        "check",
        "offset",
        "frames",
        "codec_of_clip",
        "shard_start",
        "shard_bytes",
    ):
        assert getattr(one, name).tolist() == getattr(many, name).tolist(), name
    assert (one.shard_names, one.codec_names, one.digest) == (many.shard_names, many.codec_names, many.digest)

import re
import warnings

import pyarrow as pa
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.index.where import Where

ROWS = pa.record_batch(
    {
        "frames": pa.array([30, 120, 300, 60], pa.int32()),
        "fps": pa.array([30.0, 30.0, 25.0, 7.5]),
        "label": pa.array(["x", "y", None, "z z"]),
        "codec": pa.array(["h264", "vp9", "h264", "h264"]).dictionary_encode(),
        "views": pa.array([10, None, 2**60, 0], pa.int64()),
        "score": pa.array([0.5, None, float("nan"), -1.0]),
        "good": pa.array([True, False, None, True]),
        "phash": pa.array([b"a", None, b"b", b"c"], pa.binary()),
    }
)


def chosen(text: str) -> list[int]:
    mask = Where(text, ROWS.schema).mask(ROWS)
    assert mask.dtype == bool and mask.shape == (4,)
    return mask.nonzero()[0].tolist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("frames > 60", [1, 2]),
        ("frames >= 60", [1, 2, 3]),
        ("frames < 60 or frames > 200", [0, 2]),
        ("frames < 60 and fps == 30", [0]),
        ("not frames < 60", [1, 2, 3]),
        ("not (frames < 60 or fps < 10)", [1, 2]),
        ("60 <= frames < 300", [1, 3]),
        ("30 == frames", [0]),
        ("duration > 4", [2, 3]),
        ("duration >= 4", [1, 2, 3]),
        ("duration == 1", [0]),
        ("frames / 7 > 17.1", [1, 2]),
        ("frames - 30 == 0", [0]),
        ("-frames + 1 < -59 * 1.0", [1, 2]),
        ("(frames + 60) * 2 == 360", [1]),
        ("frames > +60.5", [1, 2]),
        ("frames * frames * frames * 1000 > 2000000000", [2]),
        ("frames in [-1, +30, 60]", [0, 3]),
        ("frames in [30, 60.0]", [0, 3]),
        ("frames not in (30, 60)", [1, 2]),
        ("label in ['x', 'z z']", [0, 3]),
        ("codec == 'h264'", [0, 2, 3]),
        ("codec in ['vp9']", [1]),
        ("'26' in codec", [0, 2, 3]),
        ("'z' not in label", [0, 1, 2]),
        ("'.' in label", []),
        ("label < 'y'", [0]),
        ("good", [0, 3]),
        ("not good", [1, 2]),
        ("good == False", [1]),
        ("good == (frames > 100)", []),
        ("True", [0, 1, 2, 3]),
        ("1 < 0", []),
        ("  frames > 60\n", [1, 2]),
        ("(frames > 60\n and fps < 30)", [2]),
    ],
)
def test_the_words_are_pythons(text: str, rows: list[int]) -> None:
    assert chosen(text) == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("label == 'x'", [0]),
        ("label != 'x'", [1, 2, 3]),
        ("not label == 'x'", [1, 2, 3]),
        ("label not in ['x']", [1, 2, 3]),
        ("label in ['x', None]", [0, 2]),
        ("label not in ['x', None]", [1, 3]),
        ("views in [None, 0]", [1, 3]),
        ("label is None", [2]),
        ("label is not None", [0, 1, 3]),
        ("label == None", [2]),
        ("None != label", [0, 1, 3]),
        ("views < 100", [0, 3]),
        ("views >= 0", [0, 2, 3]),
        ("not views < 100", [1, 2]),
        ("views + 1 > 0", [0, 2, 3]),
        ("views + 1 != 11", [1, 2, 3]),
        ("1 / views > 0", [0, 2]),
        ("1 / views is None", [1, 3]),
        ("views / 0 == 0", []),
        ("views == views", [0, 1, 2, 3]),
        ("views != score", [0, 2, 3]),
        ("score == score", [0, 1, 3]),
        ("score != 0.5", [1, 2, 3]),
        ("score > 0 or score <= 0", [0, 3]),
        ("good != True", [1, 2]),
        ("phash is None", [1]),
    ],
)
def test_what_is_missing_is_pythons_none(text: str, rows: list[int]) -> None:
    assert chosen(text) == rows


def test_only_the_columns_that_are_needed_are_named() -> None:
    assert Where("duration > 4 and label != 'x'", ROWS.schema).columns == {"frames", "fps", "label"}


def test_a_column_named_duration_is_that_column() -> None:
    rows = pa.record_batch({"duration": [1, 5], "frames": [900, 1], "fps": [1.0, 1.0]})
    assert Where("duration > 4", rows.schema).mask(rows).tolist() == [False, True]


HOSTILE = [
    ("__import__('os').system('id')", "\"__import__('os').system('id')\" is a function call"),
    ("frames > len(label)", "'len(label)' is a function call"),
    ("label.upper() == 'X'", "'label.upper()' is a function call"),
    ("label.__class__ == 1", "'label.__class__' is an attribute"),
    ("().__class__.__bases__[0]", r"'().__class__.__bases__[0]' is a subscript"),
    ("label[0] == 'x'", "'label[0]' is a subscript"),
    ("__builtins__ == 1", "no column '__builtins__'"),
    ("(lambda: 1) == 1", "'lambda: 1' is a function"),
    ("[x for x in label] == 1", "is a loop"),
    ("frames if good else 1", "is an if"),
    ("(n := 3) > frames", "'n := 3' is an assignment"),
    ("f'{label}' == 'x'", "is a text made of values"),
    ("frames ** 99999 > 1", "'frames ** 99999' is an operator"),
    ("9 ** 9 ** 9 ** 9 > frames", "is an operator"),
    ("frames % 2 == 0", "'frames % 2' is an operator"),
    ("frames // 2 == 0", "'frames // 2' is an operator"),
    ("frames << 99 > 1", "'frames << 99' is an operator"),
    ("~frames == 1", "'~frames' is an operator"),
    ("'x' * 10000000000 == label", "\"'x'\" is a text: it cannot be computed with"),
    ("frames == 1" + "0" * 50, "a number of many digits is not a value"),
    ("frames == 1" + "0" * 5000, "cannot be read"),
    ("frames < 1e999", "a number is too large"),
    ("frames == 1j", "'1j' is neither number nor text"),
    ("label == b'x'", "is neither number nor text"),
    ("label == ...", "is neither number nor text"),
    ("(" * 300 + "frames" + ")" * 300 + " > 1", "cannot be read"),
    ("1" + "+1" * 400 + " > frames", "nested more than 60 deep"),
    ("not " * 400 + "good", "nested more than 60 deep"),
    ("-" * 400 + "frames > 1", "nested more than 60 deep"),
    ("frames > 1 or " * 1000 + "good", "14004 characters, at most 10000"),
    ("frames = 3", "cannot be read"),
    ("frames >", "cannot be read"),
    ("import os", "cannot be read"),
    ("frames > 1; good", "cannot be read"),
    ("good\x00", "cannot be read"),
    ("label == 'a\\d'", "cannot be read (invalid escape sequence"),
    ("good and \udcff", "cannot be read"),
]


@pytest.mark.parametrize(("text", "words"), HOSTILE, ids=[text[:20] for text, _ in HOSTILE])
def test_what_is_not_allowed_is_refused_in_one_line_that_names_it(text: str, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # refused all the same, where warnings are no errors
        with pytest.raises(ConfigError, match=re.escape(words)) as e:
            Where(text, ROWS.schema)
    assert "\n" not in str(e.value)
    assert str(e.value).startswith("where=") and len(str(e.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("durration > 4", "no column 'durration'; did you mean duration?"),
        ("Label == 'x'", "no column 'Label'; did you mean label?"),
        ("qqq == 1", "did you mean frames, fps, label, codec, views, score, good, phash, duration?"),
        ("label > 3", "'label' is a text and '3' is a number: they cannot be compared"),
        ("frames == '3'", "'frames' is a number and \"'3'\" is a text"),
        ("good == 1", "'good' is a truth value and '1' is a number"),
        ("frames in [1, 'x']", "'frames' is a number and \"'x'\" is a text"),
        ("frames in []", "the list is empty"),
        ("frames in [-fps]", "'-fps': a list after `in` holds values only"),
        ("frames in [fps]", "'fps': a list after `in` holds values only"),
        ("frames in 3", "'3': after `in` comes a list"),
        ("codec in label", "'label': after `in` comes a list, or a text column after a text"),
        ("[1] == frames", "'[1]' is a list"),
        ("frames", "'frames' is a number, no condition"),
        ("label and good", "'label' is a text, no condition"),
        ("None", "'None' is nothing, no condition"),
        ("phash == 'a'", "'phash': only `is None`"),
        ("frames > None", "'None': only `is None`"),
        ("label + 'x' == 'xx'", "'label' is a text: it cannot be computed with"),
        ("good is True", "'True': `is` is only for None"),
        ("good < True", "'good' is a truth value, which has no order"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        Where(text, ROWS.schema)


def test_numbers_that_do_not_fit_are_named() -> None:
    where = Where("views * 1000 > 1", ROWS.schema)
    with pytest.raises(ConfigError, match=r"where='views \* 1000 > 1': overflow"):
        where.mask(ROWS)

"""Tables of a shard dataset, formats 1 and 2: what every column means, and the closed list of reject reasons.

    DST/
      dataset.json              DATASET_KEYS; written last, so its presence says the job is complete
      index.parquet             CLIPS, one row per clip, in shard order
      rejects.parquet           REJECTS, one row per rejected source or span
      labels.json               label → label_id, where the bucket has labels
      shards/000017-00.tar      task 17, its first shard: KEY.mp4 + KEY.json per clip, plain USTAR
      shards/000017-00.idx      DALI index (v1.2)
      shards/0001/000117-00.tar task 117: from task 100 on, each hundred of tasks has a folder
      commits/000017.parquet    COMMITS: the clip rows and reject rows of task 17; its presence says the task is done
      commits/0001/000117.parquet
      plan/plan.json            the frozen job: format, source root, config, seed, number of tasks
      plan/sources-HEX.parquet  SOURCES, in task order, with their task; where some are members of tars, also
                                TAR_COLUMNS. HEX: the first 16 hex of the file's sha256

KEY has no dot: `<first 16 hex of sha256(source url)>_<clip ordinal, 4 digits>`.

plan.json and dataset.json say the format, and the format never changes: new jobs are of FORMAT, and a job that began
as format 1 goes on and ends as format 1. Format 1 differs in three things:

- all shards lie in `shards/` and all commits in `commits/`, however many they are;
- index and commits have no column `blocks` (one of that name is the manifest's own);
- the sources of a plan's first part are in `plan/sources.parquet`, those of the second in `plan/sources-0001.parquet`.

The column `blocks` makes any part of a large clip checkable by itself: for a clip of at least BLOCKS_FROM bytes it
holds 8 bytes for each BLOCK of the clip's bytes, the last of which may be shorter: the first 8 bytes of its sha256.
That finds damage; it is no protection from an attacker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum

import pyarrow as pa

FORMAT = 2  # of new jobs
FORMATS = (1, 2)  # that can be read, and gone on with
IDX_VERSION = "v1.2"  # DALI's webdataset index

DATASET_JSON = "dataset.json"
INDEX = "index.parquet"
REJECTS_FILE = "rejects.parquet"
LABELS = "labels.json"
PLAN_JSON = "plan/plan.json"
PLAN_SOURCES = "plan/sources.parquet"  # of format 1

BLOCK = 1 << 16  # bytes of a clip that one check of `blocks` covers
BLOCKS_FROM = 1 << 20  # bytes from which on a clip has `blocks`
BLOCK_CHECK = 8  # bytes of one check
_FOLDER_TASKS = 100  # tasks in one folder of shards and of commits


class Reason(StrEnum):
    """Why a source or a span gave no clip, each with its meaning. A closed list: a new reason changes the format."""

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Reason:
        """A member: its value in the tables, and its meaning for people."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    EMPTY_FILE = "empty_file", "zero bytes"
    NOT_A_VIDEO = "not_a_video", "its content is not a video container (text, picture, playlist, random bytes)"
    UNREADABLE = "unreadable", "a video container with a header that cannot be read (truncated, no moov)"
    NO_VIDEO_STREAM = "no_video_stream", "sound or data only"
    ENCRYPTED = "encrypted", "encrypted, without a key"
    UNSUPPORTED_CODEC = "unsupported_codec", "this ffmpeg has no decoder for it"
    NO_FRAMES = "no_frames", "the decoder gave no picture"
    TOO_FEW_FRAMES = "too_few_frames", "fewer frames than min_frames"
    TOO_SMALL = "too_small", "a side under 16 pixels or under min_side"
    TOO_LARGE = "too_large", "more bytes than max_source_bytes or more pixels than max_pixels"
    TOO_LONG = "too_long", "longer than max_duration_s, or more than 10,000 spans or 20 million packets"
    BAD_TIMESTAMPS = "bad_timestamps", "no usable frame rate in its timestamps"
    DECODE_ERRORS = "decode_errors", "the decoder reported damage"
    TRUNCATED = "truncated", "far fewer frames than the container promises"
    TIMEOUT = "timeout", "took longer than allowed"
    CRASHED = "crashed", "its decoder died of a signal or a resource limit"
    FETCH_FAILED = "fetch_failed", "could not be read from storage"
    VERIFY_FAILED = "verify_failed", "the encoded clip does not decode to what was planned"
    UNSUPPORTED_COLOUR = "unsupported_colour", "HDR or wide gamut, and this ffmpeg cannot convert it"
    SPAN_OUTSIDE = "span_outside", "the span begins beyond the end of the video"
    TOO_SHORT = "too_short", "shorter than min_seconds or min_scene_seconds, or a dropped remainder"
    LOW_FPS = "low_fps", "fewer frames a second than min_fps"
    BAD_ASPECT = "bad_aspect", "longer side over shorter side above max_aspect"
    STATIC = "static", "hardly anything moves: under min_motion"
    DARK = "dark", "too dark: under min_luma"
    BLANK = "blank", "hardly any contrast: under min_contrast"
    BORDERS = "borders", "mostly black border: over max_border"


def reason_meaning(reason: str) -> str:
    """The meaning of a reason as a table has it; "" for one that this version does not know."""
    try:
        return Reason(reason).meaning
    except ValueError:
        return ""


SOURCES = pa.schema(
    [
        # full URL; a plain absolute path for local files; TAR#MEMBER for a member of a tar
        pa.field("url", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),  # bytes
        pa.field("etag", pa.string(), nullable=False),  # etag, else modification time; "" where storage has neither
        pa.field("label", pa.string()),  # null = unlabelled
        # the manifest's rows of this source, sorted by start and end; null: the whole source with at most a label
        pa.field(
            "rows",
            pa.list_(
                pa.struct(
                    [
                        pa.field("start_s", pa.float64()),  # both null: the whole source, cut as the config says
                        pa.field("end_s", pa.float64()),  # null with a start: the end of the video
                        pa.field("label", pa.string()),
                        pa.field("extra", pa.string()),  # the manifest's other columns, a JSON object; null = none
                    ]
                )
            ),
        ),
        pa.field("task", pa.int32(), nullable=False),
    ]
)
# further columns of a part of the plan that has sources out of tars; the url of such a source is TAR#MEMBER
TAR_COLUMNS = pa.schema(
    [
        pa.field("tar", pa.string()),  # url of its tar; null: the source is a file of its own
        pa.field("offset", pa.int64()),  # of the member's first header block in the tar; -1: the tar itself
        pa.field("end", pa.int64()),  # of the member's bytes in the tar: they are the `size` bytes before it
        pa.field("fault", pa.string()),  # why it cannot be read, as was seen when it was planned; null: it can
    ]
)

_CLIPS_1 = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # "shards/000017-00.tar"
        pa.field("offset", pa.int64(), nullable=False),  # of the video's bytes within the tar
        pa.field("size", pa.int64(), nullable=False),  # bytes of the video
        pa.field("sha256", pa.string(), nullable=False),  # of the video's bytes
        pa.field("source", pa.string(), nullable=False),  # the source's url
        pa.field("span_start_s", pa.float64(), nullable=False),  # actual span within the source
        pa.field("span_end_s", pa.float64(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # counted by decoding the clip whole
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("codec", pa.string(), nullable=False),  # h264 | vp9 | hevc
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32(), nullable=False),  # -1 = unlabelled
        # the wanted span (a manifest's row, a scene, a window); the actual one is above
        pa.field("wanted_start_s", pa.float64(), nullable=False),
        pa.field("wanted_end_s", pa.float64(), nullable=False),
        # screening scores, from grey frames of 64x64, about four a second (ingest/clips/scores.py)
        pa.field("motion", pa.float32(), nullable=False),  # upper quartile of differences between neighbours, 0 to 255
        pa.field("luma", pa.float32(), nullable=False),  # mean, 0 to 255
        pa.field("contrast", pa.float32(), nullable=False),  # standard deviation within a frame, mean over frames
        pa.field("border", pa.float32(), nullable=False),  # share of the picture that is black border, 0 to 1
        pa.field("phash", pa.binary(32)),  # four 64-bit perceptual hashes over time; null: too flat to tell
        pa.field("duplicate_of", pa.string()),  # key of the earlier clip that this one repeats; set when a job ends
        # what the source was
        pa.field("source_bytes", pa.int64(), nullable=False),
        pa.field("source_container", pa.string(), nullable=False),
        pa.field("source_codec", pa.string(), nullable=False),
        pa.field("source_width", pa.int32(), nullable=False),  # coded, before rotation and pixel aspect
        pa.field("source_height", pa.int32(), nullable=False),
        pa.field("source_fps", pa.float64(), nullable=False),
        pa.field("source_seconds", pa.float64(), nullable=False),
        pa.field("encoder", pa.string(), nullable=False),  # x264 | x265 | vpx | nvenc | copy
        pa.field("colour", pa.string(), nullable=False),  # the rule by which its colours were converted
    ]
)
_BLOCKS = pa.field("blocks", pa.binary())  # checks of the video's blocks (block_checks); null: under BLOCKS_FROM bytes
CLIPS = pa.schema([*_CLIPS_1, _BLOCKS])

REJECTS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("span_start_s", pa.float64()),  # null: the whole source
        pa.field("span_end_s", pa.float64()),
        pa.field("reason", pa.string(), nullable=False),  # a Reason
        pa.field("detail", pa.string(), nullable=False),  # the decoder's own words
    ]
)

CLIP, REJECT = "clip", "reject"  # kinds of rows in a commit record
# One task's rows, without the manifest's own columns (see with_columns): clips fill the columns of CLIPS, rejects those
# of REJECTS; the others are null. The schema's metadata has, under b"shards", a JSON object: shard name → bytes of its
# tar.
_COMMITS_1 = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        *(f.with_nullable(f.name != "source") for f in _CLIPS_1),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
COMMITS = pa.schema([*_COMMITS_1, _BLOCKS])


def clip_columns(format: int, extra: Mapping[str, str] | None = None) -> pa.Schema:
    """The columns of index.parquet: CLIPS as the format has them, then the manifest's own (see with_columns)."""
    return with_columns(CLIPS if format > 1 else _CLIPS_1, extra or {})


def commit_columns(format: int, extra: Mapping[str, str] | None = None) -> pa.Schema:
    """The columns of a commit record: COMMITS as the format has them, then the manifest's own (see with_columns)."""
    return with_columns(COMMITS if format > 1 else _COMMITS_1, extra or {})


def format_fault(found: object) -> str:
    """What is wrong with a format that a plan.json or dataset.json names; "" where this version reads it."""
    if found in FORMATS and type(found) is int:
        return ""
    known = " and ".join(map(str, FORMATS))
    return f"is of format {found!r}, this version of reelmae reads {known}; use the version that wrote it"


def source_columns(tars: bool) -> pa.Schema:
    """The columns of a plan's sources: SOURCES, and TAR_COLUMNS where some of them are members of tars."""
    return pa.schema([*SOURCES, *TAR_COLUMNS]) if tars else SOURCES


def with_columns(columns: pa.Schema, extra: Mapping[str, str]) -> pa.Schema:
    """CLIPS or COMMITS, then the manifest's own columns: name → int64, double, bool or string; all may be null."""
    return pa.schema([*columns, *(pa.field(name, pa.type_for_alias(kind)) for name, kind in extra.items())])


def source_id(url: str) -> str:
    """The first half of every key of this source: 16 hex digits of sha256 of its url."""
    return hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def clip_key(url: str, ordinal: int) -> str:
    """Key of clip `ordinal` (from 0) of a source; holds no dot, as webdataset splits names at the first."""
    if not 0 <= ordinal <= 9999:
        raise ValueError(f"clip ordinal {ordinal} of {url}: a source gives at most 10000 clips")
    return f"{source_id(url)}_{ordinal:04d}"


def shard_name(task: int, number: int, format: int) -> str:
    """Path of a task's shard: `shards/000017-00.tar`, `shards/0001/000117-00.tar`."""
    return f"shards/{_task_folder(task, format)}{task:06d}-{number:02d}.tar"


def commit_name(task: int, format: int) -> str:
    """Path of a task's commit record: `commits/000017.parquet`, `commits/0001/000117.parquet`."""
    return f"commits/{_task_folder(task, format)}{task:06d}.parquet"


def _task_folder(task: int, format: int) -> str:
    """The folder of a task below `shards` and `commits`, with a slash at its end; "" where it has none."""
    return "" if format == 1 or task < _FOLDER_TASKS else f"{task // _FOLDER_TASKS:04d}/"


def task_folders(tasks: int, format: int) -> list[str]:
    """All folders in which the shards and the commits of the tasks 0 to `tasks` - 1 lie."""
    below = dict.fromkeys(_task_folder(task, format).rstrip("/") for task in range(0, max(1, tasks), _FOLDER_TASKS))
    return [f"{kind}/{folder}".rstrip("/") for kind in ("shards", "commits") for folder in below]


def block_checks(data: bytes | bytearray | memoryview) -> bytes:
    """The checks of a clip's blocks, one after the other: BLOCK_CHECK bytes for each BLOCK bytes of `data`."""
    view = memoryview(data)
    blocks = (view[start : start + BLOCK] for start in range(0, len(view), BLOCK))
    return b"".join(hashlib.sha256(block).digest()[:BLOCK_CHECK] for block in blocks)


def clip_blocks(data: bytes) -> bytes | None:
    """What the column `blocks` has for a clip: its block_checks, None where it has under BLOCKS_FROM bytes."""
    return block_checks(data) if len(data) >= BLOCKS_FROM else None

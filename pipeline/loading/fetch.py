"""The bytes of one clip, by one ranged read."""

from __future__ import annotations

from reelmae.pipeline.errors import BadClipError, ShortFileError
from reelmae.pipeline.storage import Store


def fetch(store: Store, *, key: str, shard: str, offset: int, size: int) -> bytes:
    """The video's bytes within its shard.

    BadClipError where the shard is gone or ends before the clip does; StorageError where the storage itself
    fails after retries, which is no fault of the clip.
    """
    try:
        return store.read_range(shard, offset, size)
    except FileNotFoundError as e:
        raise BadClipError(key, f"its shard {store.url(shard)} is missing") from e
    except ShortFileError as e:
        raise BadClipError(key, str(e)) from e

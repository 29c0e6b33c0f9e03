"""The bytes of one clip: a pread where the store is local, a ranged read where it is not."""

from __future__ import annotations

import os

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.storage import Store


def fetch(store: Store, *, key: str, shard: str, offset: int, size: int) -> bytes:
    """The video's bytes within its shard.

    BadClipError where the shard is gone or ends before the clip does; StorageError where the storage itself
    fails after retries, which is no fault of the clip.
    """
    try:
        if not store.is_local:
            return store.read_range(shard, offset, size)
        file = os.open(store.local_path(shard), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise BadClipError(key, f"its shard {store.url(shard)} is missing") from e
    try:
        data = os.pread(file, size, offset)
    finally:
        os.close(file)
    if len(data) != size:
        raise BadClipError(key, f"{store.url(shard)} ends {size - len(data)} bytes before the clip does")
    return data

"""Fills a bucket with generated videos, broken files included, and makes the buckets of all URLs:

    python demo_bucket.py s3://raw/demo s3://shards/demo

What is there already stays. $DEMO_VIDEOS is their number (24), $DEMO_SECONDS their mean length (3). Keys and endpoint
come from AWS_* variables.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import fsspec

from reelmae.tools.synth.bucket import make_bucket


def main(raw: str, *others: str) -> None:
    """Make the buckets, then the videos, and upload those that are missing."""
    for url in (raw, *others):
        fs, path = fsspec.url_to_fs(url)
        fs.makedirs(path.split("/", 1)[0] if url.startswith("s3://") else path, exist_ok=True)
    fs, root = fsspec.url_to_fs(raw)
    with tempfile.TemporaryDirectory(prefix="reelmae-demo-") as folder:
        made = make_bucket(
            folder,
            videos=int(os.environ.get("DEMO_VIDEOS", "24")),
            seconds=float(os.environ.get("DEMO_SECONDS", "3")),
        )
        for name in made.files:
            if not fs.exists(f"{root}/{name}"):
                fs.put_file(str(Path(folder, name)), f"{root}/{name}")
    print(f"{raw}: {made.n_videos} videos and {made.n_broken} broken or hostile files, {made.bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])

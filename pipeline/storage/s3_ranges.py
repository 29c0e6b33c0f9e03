"""Ranged reads of S3 objects by obstore, at the endpoint and with the credentials that s3fs found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import fsspec.asyn
import obstore
from obstore.exceptions import BaseError as ObstoreError
from obstore.store import S3Store

RANGES_GIVEN_UP = 3  # after so many reads in a row that only s3fs could do, obstore is not used any more
CREDENTIALS_LAST = timedelta(minutes=10)  # botocore renews its credentials before they have less time left


class S3Ranges:
    """Ranged reads of one bucket with obstore: less CPU time and latency than s3fs (pipeline/decisions/0010), and no
    event loop that all threads wait for."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._given_up = 0
        bucket, _, _ = fs.split_path(root)
        client = fs.s3.meta
        region = client.region_name if client.region_name != "aws-global" else None
        signed = {"skip_signature": True} if fs.anon else {"credential_provider": _credentials(fs)}
        self._store = S3Store(
            bucket,
            endpoint=client.endpoint_url,
            region=region or "us-east-1",
            client_options={"allow_http": client.endpoint_url.startswith("http://")},
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=30)},
            **signed,
        )

    def read(self, full: str, offset: int, size: int) -> bytes:
        """The bytes of a range, by obstore where it can, else by `fs.cat_file`."""
        refused: Exception | None = None
        if self._given_up < RANGES_GIVEN_UP:
            try:
                _, key, _ = self._fs.split_path(full)
                data = bytes(obstore.get_range(self._store, key, start=offset, length=size))
                self._given_up = 0
                return data
            except (ObstoreError, OSError, ValueError) as e:
                refused = e
        data = bytes(self._fs.cat_file(full, start=offset, end=offset + size))
        if refused is not None:
            self._given_up += 1
            if self._given_up == RANGES_GIVEN_UP:
                logging.getLogger(__name__).warning(
                    "s3://%s: obstore cannot read it (%s), s3fs can; going on with s3fs alone, which is slower. "
                    "Where the bucket is in another region, set AWS_DEFAULT_REGION to it",
                    full,
                    str(refused).partition("\n")[0],
                )
        return data


def _credentials(fs: Any) -> Callable[[], dict[str, Any]]:
    """A function that gives obstore the credentials of the s3fs filesystem, which botocore keeps fresh."""
    chain = None if fs.key and fs.secret else fsspec.asyn.sync(fs.loop, fs.session.get_credentials)

    def now() -> dict[str, Any]:
        key, secret, token = fs.key, fs.secret, fs.token
        if chain is not None:
            frozen = fsspec.asyn.sync(fs.loop, chain.get_frozen_credentials)
            key, secret, token = frozen.access_key, frozen.secret_key, frozen.token
        if not (key and secret):
            raise PermissionError("no credentials")
        until = datetime.now(UTC) + CREDENTIALS_LAST
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": until}

    return now

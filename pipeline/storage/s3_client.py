"""Requests to S3 by the botocore client that s3fs sets up: one at a time, each with a deadline.

botocore's own retries are off, so that each retry is counted and told. Credentials that have expired are read anew. A
server that does not know a header is asked without it, from then on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.storage.causes import Cause, CausedError, find_cause
from reelmae.pipeline.storage.retry import deadline

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
RENEW_EVERY_S = 30.0
T = TypeVar("T")

# of a client that tries once and does not wait for ever; the user's own come on top
CONFIG = {
    "retries": {"max_attempts": 0},
    "request_checksum_calculation": "when_required",  # ours are given; others come in trailers, which some refuse
    "connect_timeout": 10,
    "read_timeout": 120,
    "max_pool_connections": 64,
}


class S3Client:
    """One s3fs file system's client."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._renewed = -RENEW_EVERY_S
        self._unknown: set[str] = set()  # headers that the server refuses

    def _split(self, full: str) -> tuple[str, str]:
        bucket, key, _ = self._fs.split_path(full)
        return bucket, key

    def _call(self, method: str, number: int, size: int = 0, **wanted: Any) -> dict[str, Any]:
        """One request by botocore's client, with `size` bytes of a body. One that comes is read within its deadline."""

        async def call() -> dict[str, Any]:
            client = await self._client(wanted["Bucket"])
            extra = self._fs._get_s3_method_kwargs(getattr(client, method), **wanted)
            try:
                answer: dict[str, Any] = await getattr(client, method)(**extra)
            except client.exceptions.ClientError as e:
                if e.response.get("Error", {}).get("Code") in EXPIRED:
                    await self._renew()
                raise
            if "Body" in answer:
                async with answer["Body"] as body:
                    answer["Body"] = await body.read()
            return answer

        return self._run(call(), deadline(number, size))

    def _call_with(
        self, headers: dict[str, Any], method: str, number: int, size: int = 0, **wanted: Any
    ) -> dict[str, Any]:
        """One request with headers that not all servers know: one that refuses them is asked without, from then on."""
        known = {name: value for name, value in headers.items() if name not in self._unknown}
        try:
            return self._call(method, number, size, **wanted, **known)
        except Exception as e:
            if not known or not is_refused(e):
                raise
            condition = {name for name in known if name == "IfNoneMatch"}
            for left_out in dict.fromkeys(
                map(frozenset, filter(None, (set(known) - condition, condition, set(known))))
            ):
                kept = {name: value for name, value in known.items() if name not in left_out}
                try:
                    answer = self._call(method, number, size, **wanted, **kept)
                except Exception as other:
                    if is_refused(other):
                        continue
                    if status_of(other) == 412:  # it was understood: the name is taken
                        self._unknown |= left_out
                    raise
                self._unknown |= left_out
                return answer
            raise  # the first refusal is told

    async def _client(self, bucket: str) -> Any:
        try:
            await self._fs.set_session()
        except (TypeError, ValueError) as e:  # an unknown name, or an endpoint that is none; the text may hold more
            names = ", ".join(sorted(self._fs.storage_options)) or "none"
            words = (
                f"its client cannot be made ({type(e).__name__}) with AWS_ENDPOINT_URL and these storage options: {names}; "
                "give key, secret, token, endpoint_url, profile, …"
            )
            raise CausedError(Cause("final", "storage options", words, InputError)) from None
        return await self._fs.get_s3(bucket)

    async def _renew(self) -> None:
        """Read the credentials anew: whoever renews them may write them to the place where they were found."""
        if time.monotonic() - self._renewed > RENEW_EVERY_S:
            self._renewed = time.monotonic()
            await self._fs.set_session(refresh=True)

    def _run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self._fs.loop).result()

    def _head(self, bucket: str, key: str, number: int, **wanted: Any) -> dict[str, Any]:
        """The answer to HEAD. One that refuses has no body that would tell the cause: then GET is asked, which has."""
        try:
            return self._call("head_object", number, Bucket=bucket, Key=key, ChecksumMode="ENABLED", **wanted)
        except Exception as e:
            if status_of(e) not in (400, 403):
                raise
            try:
                self._call("get_object", number, Bucket=bucket, Key=key, Range="bytes=0-0")
            except Exception as told:
                if status_of(told) != 416:  # an empty object, which is an answer
                    raise
            raise CausedError(
                Cause("passing", f"{status_of(e)} of HEAD", "the server refuses HEAD and answers GET")
            ) from e


def status_of(error: Exception) -> int:
    """The HTTP status that botocore's error carries; 0 where there is none."""
    answer: Any = getattr(error, "response", None)
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0) if isinstance(answer, dict) else 0


def code_of(error: Exception) -> str:
    """S3's error code that botocore's error carries; "" where there is none."""
    answer: Any = getattr(error, "response", None)
    return str(answer.get("Error", {}).get("Code") or "") if isinstance(answer, dict) else ""


def is_refused(error: Exception) -> bool:
    """Whether the server does not know what was asked, and never will."""
    cause = find_cause(error)
    return status_of(error) in (400, 501) and cause is not None and cause.kind == "final"

"""Answers of web servers that waiting does not change: what is there is no source for us, and never will be."""

from __future__ import annotations

_REFUSED_FOR_GOOD = (401, 403, 404, 410, 451)


def refused_status(url: str, error: BaseException) -> int | None:
    """The HTTP status with which a web server has refused a URL for good; None where the error is another one."""
    if not url.lower().startswith(("http://", "https://")):
        return None
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return status if status in _REFUSED_FOR_GOOD else None
        cause = cause.__cause__
    return None

"""How the steps of making clips say no: a source or a span that gives no clip, with its reason and the details."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from reelmae.pipeline.ingest.clips.cut import Span
from reelmae.pipeline.schema import Reason


@dataclass(frozen=True)
class Rejected:
    """Why there is no clip."""

    reason: Reason
    detail: str
    """The values that decided it, or the decoder's own words."""


@dataclass(frozen=True)
class Dropped:
    """A span that gives no clip, and why."""

    span: Span
    why: Rejected


def reject_source(dropped: Sequence[Dropped]) -> Rejected:
    """One reject for a source that lost every span: the most frequent reason, with the detail of its first span."""
    reasons = Counter(d.why.reason for d in dropped)
    reason, n = reasons.most_common(1)[0]
    first = next(d.why.detail for d in dropped if d.why.reason == reason)
    if len(dropped) == 1:
        return Rejected(reason, first)
    others = ", ".join(f"{k} x {r.value}" for r, k in reasons.items() if r != reason)
    return Rejected(reason, f"{n} of {len(dropped)} spans: {first}" + (f"; {others}" if others else ""))

"""A source that lost every span is one reject, with the reason that most of its spans have."""

from reelmae.pipeline.ingest.clips.cut import Span
from reelmae.pipeline.ingest.clips.outcome import Dropped, Rejected, reject_source
from reelmae.pipeline.schema import Reason

SPAN = Span(0, 1, 0.0, 0.1)


def _drop(reason: Reason, detail: str) -> Dropped:
    return Dropped(SPAN, Rejected(reason, detail))


def test_one_span_gives_its_own_reason() -> None:
    assert reject_source([_drop(Reason.DARK, "luma 1")]) == Rejected(Reason.DARK, "luma 1")


def test_of_several_spans_the_most_frequent_reason_counts_and_the_others_are_named() -> None:
    dropped = [
        _drop(Reason.STATIC, "motion 0"),
        _drop(Reason.DARK, "luma 1"),
        _drop(Reason.DARK, "luma 2"),
        _drop(Reason.TOO_SHORT, "0.1 s"),
    ]
    assert reject_source(dropped) == Rejected(Reason.DARK, "2 of 4 spans: luma 1; 1 x static, 1 x too_short")
    assert reject_source(dropped[1:3]) == Rejected(Reason.DARK, "2 of 2 spans: luma 1")

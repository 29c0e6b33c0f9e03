"""Bad clips: counted, named, replaced by a rule that needs no memory, and a limit at which the run stops.

A bad clip's place is taken by the clip that a draw keyed by (seed, epoch, bad clip, attempt) names; if that is
bad too, by the next attempt's. So the same run always ends with the same clips, whatever had been found bad before.
"""

from __future__ import annotations

from reelmae.pipeline.errors import BadClipError, TooManyBadClipsError
from reelmae.pipeline.loading.philox import STREAM_REPLACE, below, raw_bits

MIN_TRIED = (
    1000  # the limit is a share of at least so many clips, so that one bad clip does not end a small run
)
MAX_ATTEMPTS = 100


def replacement(planned: int, attempt: int, *, n_clips: int, seed: int, epoch: int) -> int:
    """The clip of attempt 1, 2, … for the place of clip `planned`; pure."""
    return below(raw_bits(1, seed=seed, stream=STREAM_REPLACE, words=(epoch, planned, attempt))[0], n_clips)


class Quarantine:
    """The bad clips of one run: `reasons` maps key to why, `clips` holds their rows in the index."""

    def __init__(self, n_clips: int, max_bad_fraction: float) -> None:
        self._n_clips = n_clips
        self._max_bad_fraction = max_bad_fraction
        self.reasons: dict[str, str] = {}
        self.clips: set[int] = set()
        self.tried = 0

    def add(self, clip: int, bad: BadClipError) -> None:
        """Count a bad clip. TooManyBadClipsError where that is over the limit."""
        self.clips.add(clip)
        self.reasons[bad.key] = bad.reason
        tried = max(min(self.tried, self._n_clips), MIN_TRIED)
        if len(self.clips) > self._max_bad_fraction * tried:
            raise TooManyBadClipsError(
                f"{len(self.clips)} bad clips of {self.tried} tried, more than max_bad_fraction={self._max_bad_fraction} of "
                f"{tried}; the last: {bad}; run reelmae verify --deep on the dataset"
            ) from bad

    def check_attempt(self, attempt: int) -> None:
        """Raise where replacing has become hopeless."""
        if attempt > MAX_ATTEMPTS:
            raise TooManyBadClipsError(
                f"no good clip among {MAX_ATTEMPTS} drawn to replace a bad one ({len(self.clips)} of {self._n_clips} clips "
                "are bad); run reelmae verify --deep on the dataset"
            )

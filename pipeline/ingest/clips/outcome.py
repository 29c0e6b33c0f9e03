"""How the steps of making clips say no: a reason of the closed list, and the details."""

from __future__ import annotations

from dataclasses import dataclass

from reelmae.pipeline.schema import Reason


@dataclass(frozen=True)
class Rejected:
    """Why a source gives no clip; `detail` holds the values, or the decoder's own words."""

    reason: Reason
    detail: str

"""Pure: how a source's colours become BT.601, limited range, 8-bit 4:2:0; the rule's name goes into the index.

    matrix   converted after the scaler; a source that names none is taken as BT.709 above 576 lines, else as BT.601
    range    full → limited
    alpha    laid on black
    PQ, HLG  linear light, BT.2020 → BT.709 primaries, tone-mapped (Hable, 100 cd/m² reference) by zscale and tonemap
    wide gamut without HDR (BT.2020, DCI-P3, Display P3 primaries): converted to BT.709 primaries by zscale
Other primaries (BT.709, SMPTE 170M, BT.470BG) are kept: they differ by a few levels at most.

A rule is named by its steps, "bt709>bt601+full>limited"; "?" marks an assumed matrix; "none" changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe
from reelmae.pipeline.schema import Reason

HDR = {16: ("pq", "smpte2084"), 18: ("hlg", "arib-std-b67")}  # by ffmpeg's number of the transfer curve
WIDE = {9: ("bt2020", "2020"), 11: ("dci-p3", "smpte431"), 12: ("display-p3", "smpte432")}  # by that of the primaries
MATRIX = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc", 10: "bt2020nc"}
_BT601 = ("bt470bg", "smpte170m")
_ZSCALE_MATRIX = {"bt709": "709", "fcc": "fcc", "bt470bg": "470bg", "smpte170m": "170m", "smpte240m": "240m"}
ALPHA = re.compile(r"^(yuva|rgba|bgra|argb|abgr|gbrap|ya\d|pal8|ayuv|vuya)")
_RGB = re.compile(r"^(rgb|bgr|gbr|argb|abgr|0rgb|0bgr|x2rgb|x2bgr|pal8)")


@dataclass(frozen=True)
class Colour:
    """How the colours of one source are converted."""

    rule: str
    """The rule's name."""
    before: str
    """Filters before the scaler; "" for none."""
    scaler: tuple[str, ...]
    """Arguments of the scaler."""
    behind: str
    """Filters after the scaler; "" for none."""


def choose_colour(probe: Probe, *, tonemaps: bool) -> Colour | Rejected:
    """The rule for this source; UNSUPPORTED_COLOUR if it needs zscale or tonemap and ffmpeg has none."""
    assumed = "bt709" if min(probe.width, probe.height) > 576 else "smpte170m"
    matrix = MATRIX.get(probe.colorspace, assumed)
    rgb = bool(_RGB.match(probe.pix_fmt))
    full = probe.color_range == 2 or probe.pix_fmt.startswith("yuvj")
    alpha = "format=gbrap,premultiply=inplace=1,format=gbrp" if ALPHA.match(probe.pix_fmt) else ""
    steps = ["alpha>black"] if alpha else []
    hdr, wide = HDR.get(probe.color_trc), WIDE.get(probe.color_primaries)
    if hdr or wide:
        name = hdr[0] if hdr else wide[0] if wide else ""
        if not tonemaps:
            detail = f"{name}: this ffmpeg has no zscale and tonemap; set REELMAE_FFMPEG"
            return Rejected(Reason.UNSUPPORTED_COLOUR, detail)
        source = _zscale_source(probe, matrix, full, rgb or bool(alpha))
        rule = "+".join([*steps, f"{name}>{'sdr' if hdr else 'bt709'}"])
        behind = _tonemap_filter(source) if hdr else _gamut_filter(source)
        return Colour(rule, alpha, (f"in_color_matrix={matrix}",), behind)
    converted = not rgb and not alpha and matrix not in _BT601
    if rgb:
        steps.append("rgb>bt601")
    elif converted:
        steps.append(f"{matrix}{'' if probe.colorspace in MATRIX else '?'}>bt601")
    if full and not rgb:
        steps.append("full>limited")
    # primaries and curve are not converted; they are only named, because the scaler refuses undefined values
    before = ",".join(filter(None, [alpha, "setparams=color_primaries=bt709:color_trc=bt709"]))
    scaler = (
        f"in_color_matrix={matrix}",
        f"out_color_matrix={matrix if converted else 'smpte170m'}",
        "out_range=tv",
    )
    return Colour("+".join(steps) or "none", before, scaler, _matrix_filter(matrix) if converted else "")


def _matrix_filter(matrix: str) -> str:
    """After the scaler, on small pictures: the scaler's own conversion goes through RGB and costs more than scaling."""
    return (
        f"format=yuv420p,colorspace=ispace={matrix}:iprimaries=bt709:itrc=bt709:irange=tv:"
        "space=smpte170m:primaries=bt709:trc=bt709:range=tv:fast=1"
    )


def _zscale_source(probe: Probe, matrix: str, full: bool, rgb: bool) -> str:
    """zscale's arguments that describe its input."""
    transfer = HDR[probe.color_trc][1] if probe.color_trc in HDR else "bt709"
    primaries = WIDE[probe.color_primaries][1] if probe.color_primaries in WIDE else "2020"
    named = "gbr" if rgb else _ZSCALE_MATRIX.get(matrix, "2020_ncl")
    if probe.color_trc in HDR and probe.colorspace not in MATRIX and not rgb:
        named = "2020_ncl"
    return f"tin={transfer}:pin={primaries}:min={named}:rin={'full' if full or rgb else 'limited'}"


def _tonemap_filter(source: str) -> str:
    return (
        f"zscale={source}:t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=tonemap=hable:desat=0,"
        "zscale=t=bt709:m=170m:r=limited"
    )


def _gamut_filter(source: str) -> str:
    return f"zscale={source}:t=bt709:p=bt709:m=170m:r=limited"

"""`reelmae doctor`: what this machine can do, and what it cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from reelmae.pipeline.ingest import sandbox, transcode
from reelmae.tools.machine import machine, versions

MEANING = {
    "limits": "no limits on memory, processor time and file size of the children that read foreign video: install util-linux (prlimit)",
    "no_network": "children that read foreign video are not cut off from the network: allow user namespaces (unshare -rn)",
    "dies_with_parent": "children may outlive a job that is killed: install util-linux (setpriv)",
}


def doctor() -> dict[str, Any]:
    """ffmpeg, the limits a sandboxed child can be put under, the loader's backend, machine, versions, warnings."""
    import torch

    can = sandbox.capabilities().as_dict()
    warnings = [MEANING[name] for name, enforced in can.items() if not enforced]
    if not torch.cuda.is_available():
        warnings.append("no GPU that torch can see: clips are decoded and models trained on the processor")
    return {
        "ffmpeg": asdict(transcode.find_ffmpeg()),
        "sandbox": can,
        "machine": machine(),
        "versions": versions(),
        "warnings": warnings,
    }

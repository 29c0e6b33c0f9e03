"""`reelmae doctor [URL]`: what this machine and the store at a URL can do, and a warning for each thing that they cannot.

Properties that hold: no option of the store is shown; what was written to the store to try it is removed.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import ChildError, InputError, StorageError
from reelmae.pipeline.ingest import encoders, sandbox
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store
from reelmae.tools.machine import machine, versions
from reelmae.tools.show import retries_text
from reelmae.tools.summary import claim_text

LIBRARIES = {"x264": "libx264", "x265": "libx265", "vp9": "libvpx-vp9"}
MEANING = {
    "limits": "child processes that read foreign video run without limits on memory, processor time and file size: install util-linux (prlimit)",
    "no_network": "child processes that read foreign video can reach the network: allow user namespaces (unshare -rn)",
    "dies_with_parent": "child processes may outlive a job that is killed: install util-linux (setpriv)",
    "x264": "this ffmpeg has no libx264: profiles default, fast-decode and copy cannot encode without NVENC; set REELMAE_FFMPEG",
    "x265": "this ffmpeg has no libx265: profile small cannot encode without NVENC; set REELMAE_FFMPEG",
    "vp9": "this ffmpeg has no libvpx-vp9: profile vp9 cannot encode; set REELMAE_FFMPEG",
    "nvenc_h264": "no NVENC for H.264 (it needs an NVIDIA GPU with NVENC and an ffmpeg with h264_nvenc): clips are encoded on the CPU",
    "nvenc_hevc": "no NVENC for HEVC (it needs an NVIDIA GPU with NVENC and an ffmpeg with hevc_nvenc): profile small is encoded on the CPU",
    "tonemaps": "this ffmpeg has no zscale and tonemap: HDR and wide gamut sources are rejected as unsupported_colour; set REELMAE_FFMPEG",
    "ray": "Ray is not installed: --runner ray is refused; install reelmae[ray]",
    "scenes": "PySceneDetect is not installed: --cut scenes is refused; install reelmae[curate]",
    "gpu": "torch sees no GPU: clips are decoded and models trained on the CPU",
}


STORE_MEANING = {
    "writable": "cannot be written with these credentials: it can be a source, and no destination",
    "exclusive_create": "cannot create a file only where there is none (it ignores If-None-Match): start one job at a time on a destination there",
    "checksum": "keeps no checksum of its files: a byte that is damaged on the way from it is seen only in clips, by the hashes of the index",
}


def doctor(url: str | None = None, access: Access | None = None) -> dict[str, Any]:
    """ffmpeg and its encoders, scene detection, Ray, the sandbox's limits, machine and versions, and a warning for each thing
    that is missing. With `url` also `store`, what `check_store` finds; `exit_status` is 1 where it cannot be reached."""
    import torch

    store = {} if url is None else check_store(url, access)

    tool, can = find_ffmpeg(), sandbox.capabilities().as_dict()
    encoding = _encoders(tool.path)
    extras = {"scenes": importlib.util.find_spec("scenedetect") is not None}
    extras |= {"ray": importlib.util.find_spec("ray") is not None}
    has = can | encoding | extras | {"tonemaps": tool.tonemaps, "gpu": torch.cuda.is_available()}
    return {
        **({"store": store, "exit_status": 0 if store["reachable"] else 1} if store else {}),
        "ffmpeg": asdict(tool),
        "encoders": encoding,
        **extras,
        "sandbox": can,
        "machine": machine(),
        "versions": versions(),
        "warnings": [*_store_warnings(store), *(MEANING[name] for name, there in has.items() if not there)],
    }


def check_store(url: str, access: Access | None = None) -> dict[str, Any]:
    """What the store at `url` can do. To find out, a small file is written there and removed.

    Keys: `url`, `reachable`, then `problem` where it is not; else what `Store.describe` says, `has_files` (whether any file
    is), `writable` (`problem` says why not), `exclusive_create` (whether of two who create a file only one can), `checksum`
    (the kind that the store keeps, or none), `claim` where a job claims it, `retries`. InputError where it is no URL.
    """
    store = Store(url, access)
    facts: dict[str, Any] = {"url": store.url(), "reachable": False}
    try:
        facts |= store.describe()
        facts |= {"has_files": store.exists(), "reachable": True}
        claim = claim_text(store)
    except (StorageError, InputError) as e:
        return facts | {"problem": str(e), "retries": store.access.retries.counts()}
    facts |= {"claim": claim} if claim else {}
    facts |= _check_local(store) if store.is_local else _check_writing(store)
    return facts | {"retries": store.access.retries.counts()}


def _check_local(store: Store) -> dict[str, Any]:
    folder = next(p for p in (Path(store.root), *Path(store.root).parents) if p.exists())
    return {"writable": folder.is_dir() and os.access(folder, os.W_OK | os.X_OK), "exclusive_create": True}


def _check_writing(store: Store) -> dict[str, Any]:
    """Whether it can be written to, and what it does with what is written."""
    if store.url().startswith(("http://", "https://")):  # to post something to a web server is no question
        return {"writable": False, "problem": "a web server is read only"}
    probe = f".reelmae-probe-{secrets.token_hex(16)}"
    try:
        store.publish_bytes(b"probe", probe)
    except NotImplementedError:  # how file systems of fsspec that are read only, such as an archive, answer a write
        return {"writable": False, "problem": "this kind of file system is read only"}
    except (StorageError, InputError, OSError) as e:  # what it answers is the fact that is told
        return {"writable": False, "problem": str(e)}
    facts: dict[str, Any] = {"writable": True}
    try:
        facts["checksum"] = store.look(probe).algorithm or "none"
        facts["exclusive_create"] = store.creates_exclusively
        store.remove(probe)
    except (StorageError, InputError, OSError) as e:  # such as no right to remove
        facts["problem"] = str(e)
    return facts


def _store_warnings(store: dict[str, Any]) -> list[str]:
    if not store:
        return []
    url = store["url"]
    if not store["reachable"]:
        return [f"cannot be reached: {store['problem']}"]
    lacks = [name for name in STORE_MEANING if store.get(name) in (False, "none")]
    found = [f"{url} {STORE_MEANING[name]}" for name in lacks]
    if store.get("writable") and "problem" in store:
        found.append(f"what was written to try it may be left there: {store['problem']}")
    if store["retries"]:
        asked = retries_text(store["retries"])
        found.append(f"{url} had to be asked again: {asked}; jobs there are slower, and wait while it fails")
    return found


def _encoders(ffmpeg: str) -> dict[str, bool]:
    """Whether ffmpeg was built with each encoder; for NVENC, whether it encoded a few frames."""
    argv = [ffmpeg, "-hide_banner", "-encoders"]
    listed = sandbox.Sandbox().output(argv, limits=sandbox.Limits(wall_s=60), cwd=Path("/"))  # without our keys
    names = {line.split()[1] for line in listed.splitlines() if len(line.split()) > 1}
    built = {name: library in names for name, library in LIBRARIES.items()}
    return built | {f"nvenc_{codec}": _nvenc(ffmpeg, codec) for codec in ("h264", "hevc")}


def _nvenc(ffmpeg: str, codec: str) -> bool:
    try:
        return encoders.has_nvenc(ffmpeg, codec)
    except ChildError:  # it hung, or died
        return False

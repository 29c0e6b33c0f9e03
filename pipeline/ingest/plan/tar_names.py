"""Pure: what names a tar, what names a member of one, and what a list of tars names.

A member's url is `TAR#MEMBER`, that of a second member of the same name `TAR#MEMBER#2`. A name that ends in `#` and
digits itself gets its number always, so a url can be taken apart again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, product

from reelmae.pipeline.errors import InputError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z")
MOST = 1_000_000  # tars that one SRC may name
_NUMBER = re.compile(r"(.*)#([0-9]+)", re.DOTALL)
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.(-?[0-9]+))?")


def is_tar(url: str) -> bool:
    """Whether this is called a tar."""
    return url.lower().endswith(".tar")


def is_compressed(url: str) -> bool:
    """Whether this is called a compressed tar."""
    return url.lower().endswith(COMPRESSED)


def compressed_fault(name: str) -> str:
    """Why a compressed tar is refused."""
    return f"{name!r} is a compressed tar, which cannot be read in parts; unpack it to a .tar and give that"


def names_tars(src: str) -> bool:
    """Whether SRC names tars one by one: one, a brace expansion, or a list with `::`. A folder may be called so too."""
    return all(is_tar(name) or is_compressed(name) for name in src.split("::"))


def expand_tars(src: str) -> list[str]:
    """The tars that SRC names, each once, as webdataset reads it: `{000..999}`, `{a,b}`, `::` between two of them.

    InputError where one is compressed, is no name, or where they are too many.
    """
    found: dict[str, None] = {}
    for name in src.split("::"):
        if name.startswith("pipe:"):
            raise InputError(f"{src}: commands are not run; give the URL or path of the tar itself")
        for tar in _expand(name):
            if is_compressed(tar):
                raise InputError(compressed_fault(tar))
            if not is_tar(tar):
                raise InputError(f"{src}: names {tar!r}, which is no .tar; list tars alone")
            found[tar] = None
            if len(found) > MOST:
                raise InputError(f"{src}: names more than {MOST} tars; give their folder, or a manifest of them")
    return list(found)


def _expand(text: str) -> Iterator[str]:
    """A brace expansion, outer braces first. Braces without a comma or a range stand for themselves."""
    start = text.find("{")
    while start >= 0:
        end = _closing(text, start)
        if end < 0:
            break
        inner = text[start + 1 : end]
        options = _options(inner)
        if options is not None:
            yield from (
                text[:start] + a + b for a, b in product(options, list(islice(_expand(text[end + 1 :]), MOST + 1)))
            )
            return
        start = text.find("{", start + 1)
    yield text


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return -1


def _options(inner: str) -> list[str] | None:
    """What stands between braces: a range of numbers, or parts between commas; None where it is neither."""
    if numbers := _RANGE.fullmatch(inner):
        first, last, step = numbers.groups()
        begin, end = int(first), int(last)
        stride = max(1, abs(int(step or 1)))
        if abs(end - begin) // stride >= MOST:
            raise InputError(f"{{{inner}}}: names more than {MOST} tars; give their folder, or a manifest of them")
        padded = any(len(n.lstrip("-")) > 1 and n.lstrip("-").startswith("0") for n in (first, last))
        width = max(len(first), len(last)) if padded else 0
        run = range(begin, end + 1, stride) if begin <= end else range(begin, end - 1, -stride)
        return [f"{n:0{width}d}" for n in run]
    parts, depth, at = [], 0, 0
    for i, c in enumerate(inner):
        depth += (c == "{") - (c == "}")
        if c == "," and not depth:
            parts.append(inner[at:i])
            at = i + 1
    if not parts:
        return None
    return [option for part in [*parts, inner[at:]] for option in _expand(part)]


def member_url(tar: str, name: str) -> str:
    """Url of the first member of this name."""
    return f"{tar}#{name}#1" if _NUMBER.fullmatch(name) else f"{tar}#{name}"


def repeat_url(url: str, number: int) -> str:
    """Url of the member of this number, from 2 on, among those of one name; `url`: that of the first."""
    return f"{url.removesuffix('#1')}#{number}"


def member_of(url: str, tar: str) -> tuple[str, int]:
    """The name of the member that a url names, and its number, from 1, among those of this name in its tar."""
    name = url[len(tar) + 1 :]
    numbered = _NUMBER.fullmatch(name)
    return (numbered.group(1), int(numbered.group(2))) if numbered else (name, 1)

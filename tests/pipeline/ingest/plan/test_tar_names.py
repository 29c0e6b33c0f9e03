"""Names of tars and of their members, and what a list of tars names."""

from __future__ import annotations

import pytest

from reelmae.pipeline.ingest.plan.tar_names import (
    expand_tars,
    is_compressed,
    is_tar,
    member_of,
    member_url,
    names_tars,
    repeat_url,
)


@pytest.mark.parametrize(
    ("src", "tars"),
    [
        ("x.tar", ["x.tar"]),
        ("s3://b/{008..011}.TAR", ["s3://b/008.TAR", "s3://b/009.TAR", "s3://b/010.TAR", "s3://b/011.TAR"]),
        ("{9..11}.tar", ["9.tar", "10.tar", "11.tar"]),
        ("{3..1}.tar::{0..9..4}.tar", ["3.tar", "2.tar", "1.tar", "0.tar", "4.tar", "8.tar"]),
        ("{a,b{1,2}}/{x,}y.tar", ["a/xy.tar", "a/y.tar", "b1/xy.tar", "b1/y.tar", "b2/xy.tar", "b2/y.tar"]),
        ("{a}/{}/{b.tar", ["{a}/{}/{b.tar"]),
        ("a.tar::{a,b}.tar", ["a.tar", "b.tar"]),
    ],
)
def test_a_list_names_tars_as_webdataset_reads_it(src: str, tars: list[str]) -> None:
    assert names_tars(src)
    assert expand_tars(src) == tars


@pytest.mark.parametrize("src", ["folder", "s3://b/p", "list.csv", "a.tar::folder", "x.tar/", "x.mp4"])
def test_what_names_no_tar(src: str) -> None:
    assert not names_tars(src)


def test_compressed_tars_are_known_by_their_names() -> None:
    for name in ("a.tar.gz", "A.TGZ", "a.tar.zst", "a.tar.bz2", "a.txz"):
        assert is_compressed(name)
        assert not is_tar(name)


@pytest.mark.parametrize("name", ["a.mp4", "a#b/c.mp4", "x#2", "x#", "#3", "", "a\nb.mp4#1", "é\\xff"])
@pytest.mark.parametrize("tar", ["/d/x.tar", "s3://b/a#1.tar"])
def test_a_members_url_can_be_taken_apart(name: str, tar: str) -> None:
    url = member_url(tar, name)
    assert url.startswith(f"{tar}#")
    assert member_of(url, tar) == (name, 1)
    assert member_of(repeat_url(url, 12), tar) == (name, 12)
    assert repeat_url(url, 12) != url

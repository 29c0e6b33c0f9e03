"""The links of the README of sharding. Its reasons are held by tests/pipeline/test_schema.py."""

import re
from pathlib import Path

import reelmae.pipeline.ingest.config as config

FOLDER = Path(config.__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 10
    assert [link for link in links if not (FOLDER / link).exists()] == []

"""The flags that say how a URL's store is reached, as every command takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.storage.access import Access
from reelmae.tools.cli import parse
from reelmae.tools.commands.access import AccessFlags, make_access

SECRET = "hunter2-very-secret"
ONE_URL = (
    ["reconstruct", "runs/a", "s3://b/shards"],
    ["features", "runs/a", "s3://b/shards"],
    ["report", "s3://b/shards"],
    ["verify", "s3://b/shards"],
    ["inspect", "s3://b/shards"],
    ["doctor", "s3://b/raw"],
)


@pytest.mark.parametrize("command", ONE_URL, ids=lambda c: c[0])
def test_every_command_with_a_url_takes_options_and_patience(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"secret": SECRET}))
    parsed = parse([*command, "--storage-options", f"@{file}", "--patience", "0.5"])
    [flags] = (value for value in vars(parsed).values() if isinstance(value, AccessFlags))
    assert flags.access() == Access({"secret": SECRET}, patience_s=30)
    [usual] = (value for value in vars(parse(command)).values() if isinstance(value, AccessFlags))
    assert usual.access().options == {}


def test_a_wrong_option_is_named_by_its_flag_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--src-storage-options: storage options: is not a JSON object") as e:
        make_access(f'{{"secret": "{SECRET}"', 10, flag="--src-storage-options")
    assert SECRET not in str(e.value)
    with pytest.raises(ConfigError, match=r"^--storage-options: .*nowhere\.json: cannot be read"):
        make_access(f"@{tmp_path / 'nowhere.json'}", 10)
    for patience in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"^--patience {patience:g}: give minutes, 0 or more"):
            make_access(None, patience)

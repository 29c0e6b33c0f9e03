"""`reelmae report`: writes one self-contained page about a demo, a training run or a shard dataset.

Properties that hold: the page asks for no other file and no address, and runs no script; what is missing is named on
the page together with the command that makes it; the page appears whole or not at all.
"""

from __future__ import annotations

from pathlib import Path

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import whole_file
from reelmae.tools.report.facts import gather, is_url
from reelmae.tools.report.page import page


def write_report(run_dir: str | Path, out: Path | None = None, *, access: Access | None = None) -> Path:
    """Write the page about the demo, training run or shard dataset at `run_dir`; RUN/report.html unless `out`.

    `run_dir`: a folder, or the URL of a shard dataset. `access`: how the dataset is reached; without options, those count
    that the config of a training run names. Raises ConfigError where `run_dir` is a URL and `out` is not given, InputError where `run_dir` is none of
    the three, DatasetError where one of its files is damaged.
    """
    if is_url(run_dir) and out is None:
        raise ConfigError(f"{run_dir}: is a URL; give the page a place with --out report.html")
    facts = gather(run_dir, access)
    final = Path(out) if out is not None else Path(run_dir) / "report.html"
    with whole_file(final) as part:
        part.write_text(page(facts), encoding="utf-8")
    return final

"""The demo's resume contract and its two outputs, on a bucket of a few videos."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from reelmae.pipeline.errors import InputError
from reelmae.tools.demo import OURS, DemoConfig, demo
from reelmae.tools.report.facts import BENCH, RECONSTRUCTION, SHARDS, TRAIN, VERIFY
from reelmae.tools.synth.bucket import make_bucket

WANTED = {
    "sources",
    "clips",
    "shards",
    "bytes",
    "rejected",
    "shard_seconds",
    "steps",
    "loss_first",
    "loss_last",
    "clips_per_s",
    "wait_share",
    "step_ms",
    "speedup",
    "model",
    "machine",
    "versions",
}


@dataclass(frozen=True)
class ShortDemo(DemoConfig):
    """A demo of a few training steps, with a smaller model to time: everything else is the demo's own."""

    steps = 4  # type: ignore[assignment]
    model_to_time = "vit_t"  # type: ignore[assignment]


@pytest.fixture(scope="module")
def few_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    make_bucket(folder, videos=5, broken=4, seconds=1.2, seed=11)
    return folder


@pytest.fixture(scope="module")
def finished(few_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ShortDemo, dict[str, object]]:
    """A demo of a bucket with fewer clips than a batch."""
    config = ShortDemo(src=str(few_videos), out=str(tmp_path_factory.mktemp("demos") / "demo"), quick=True)
    return config, demo(config)


def test_a_small_bucket_of_ones_own_gives_a_report_and_a_summary(finished: tuple[ShortDemo, dict]) -> None:
    config, summary = finished
    out = Path(config.out)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary, default=str))
    assert set(summary) >= WANTED
    assert summary["sources"] == 9
    assert summary["sources"] == summary["sources_kept"] + sum(summary["rejected"].values())
    assert summary["clips"] >= summary["sources_kept"] == 5
    assert summary["steps"] == 4
    assert set(summary["step_ms"]) == {"dense", "sparse"}
    assert {"compute", "load_compute"} <= set(summary["speedup"])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "Not in this report" not in text
    assert "Dense against sparse" in text


def test_a_finished_demo_is_not_done_again(finished: tuple[ShortDemo, dict], capfd: pytest.CaptureFixture[str]) -> None:
    config, summary = finished
    kept = [Path(config.out, name) for name in (VERIFY, BENCH, "report.html")]
    kept += [*Path(config.out, TRAIN).rglob("*.pt"), *Path(config.out, RECONSTRUCTION).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = demo(config)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert again == summary | {key: again[key] for key in ("machine", "versions")}
    assert capfd.readouterr().err.count("done before") == 6


def test_a_stage_without_its_record_is_done_again(finished: tuple[ShortDemo, dict]) -> None:
    config, summary = finished
    out = Path(config.out)
    (out / "stages" / "reconstruct.json").unlink()
    (out / RECONSTRUCTION / "reconstruction.png").unlink()
    (out / "summary.json").unlink()
    assert demo(config)["loss_last"] == summary["loss_last"]
    assert (out / RECONSTRUCTION / "reconstruction.png").is_file()
    assert (out / "summary.json").is_file()


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a demo"):
        demo(ShortDemo(out=str(tmp_path)))
    with pytest.raises(InputError, match="is a file"):
        demo(ShortDemo(out=str(tmp_path / "thesis.txt")))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_src_replaces_only_what_the_earlier_demo_made(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    (out / SHARDS).mkdir(parents=True)
    (out / "demo.json").write_text(json.dumps({"src": None, "quick": False}))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="nowhere"):
        demo(ShortDemo(src=str(tmp_path / "nowhere"), out=str(out)))
    assert not (out / SHARDS).exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert SHARDS in OURS

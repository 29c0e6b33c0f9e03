"""The chart of the measured figures: what it shows is what the files of results hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.tools.bench import chart
from reelmae.tools.bench.chart import OWN_RESULTS, draw_chart
from reelmae.tools.bench.config import ChartConfig

STEPS, LOADERS = "Training step: sparse encoder against dense", "Loader against two that a user would write"
ALONE, SHARDING = "Loader alone", "Sharding against bare ffmpeg"


def read(name: str) -> Any:
    return json.loads((OWN_RESULTS / name).read_text(encoding="utf-8"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed results that a test may change."""
    folder = tmp_path / "results"
    folder.mkdir()
    for path in OWN_RESULTS.glob("*.json"):
        shutil.copy(path, folder)
    return folder


def test_the_plotted_values_are_those_of_the_files(tmp_path: Path) -> None:
    found = draw_chart(ChartConfig(out=tmp_path / "a.png"))
    plotted = json.loads(json.dumps(found))["plotted"]
    whole, masked = "whole decoder", "decoder masking, 50% of tokens predicted"
    step = read("step_vit_b_cpu.json")
    assert plotted[STEPS]["MAE-ST ViT-B"] == {
        whole: step["speedup"]["compute"],
        masked: step["decoder_mask"]["speedup"]["compute"],
    }
    assert plotted[STEPS]["MAE-ST ViT-L"] == {whole: read("step_vit_l_cpu.json")["speedup"]["compute"]}
    assert set(plotted[STEPS]) == {
        "MAE-ST ViT-B",
        "MAE-ST ViT-L",
        "MAE-ST ViT-B, bf16",
        "VideoMAE ViT-B",
        "MotionMAE ViT-B",
    }
    rates = {(r["data"], r["loader"]): r["clips_per_cpu_s"] for r in read("loaders_cpu.json")["rows"]}
    assert plotted[LOADERS]["fast-decode, 7.5 fps"] == {
        "reelmae": rates["f7", "reelmae"],
        "webdataset + torchcodec": rates["f7", "webdataset_torchcodec"],
        "MAE-ST style": rates["f7", "mae_st"],
    }
    assert plotted[ALONE]["default, 30 fps, R = 4"] == {
        "one worker": read("load_30fps_r4_1workers_cpu.json")["clips_per_s"],
        "two workers": read("load_30fps_r4_2workers_cpu.json")["clips_per_s"],
    }
    assert plotted[SHARDING] == {
        "127 files, 26 min": {"sharding": read("shard_uncurated_cpu.json")["ratio"]},
        "1,000 files of 2 s": {"sharding": read("shard_small_files_cpu.json")["ratio"]},
    }
    assert found["machines"] == [{"cpu": "AMD EPYC", "cores": 2, "gpu": None}]
    assert "step_vit_b_loaded_cpu.json" in found["skipped"] and "load_soak_cpu.json" in found["skipped"]
    assert not set(found["files"]) & set(found["skipped"])


def test_every_plotted_value_is_a_bar_with_its_number() -> None:
    results = chart._Results(OWN_RESULTS)
    panels = [panel for make in chart.PANELS if (panel := make(results)) is not None]
    figure = chart._draw(panels, results.machines)
    bars = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    values = [v for panel in panels for group in panel.groups.values() for v in group if v is not None]
    assert sorted(bars) == sorted(values)
    numbers = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(numbers) == len(values)
    for number in ("4.6×", "6.5×", "51", "253", "0.85", "0.79"):
        assert number in numbers
    words = " ".join(text.get_text() for text in figure.texts)
    assert "2 cores of AMD EPYC" in words and "Nothing here was measured on a GPU" in words
    for text in [*figure.texts, *(label for axes in figure.axes for label in axes.get_yticklabels())]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, text.get_text()


def test_the_same_files_give_the_same_picture(tmp_path: Path) -> None:
    for kind in ("png", "svg"):
        paths = [tmp_path / f"{name}.{kind}" for name in "ab"]
        for path in paths:
            draw_chart(ChartConfig(out=path))
        assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1500, 1050)


def test_what_is_missing_or_broken_is_left_out_and_said(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "loaders_cpu.json").unlink()
    (results / "step_vit_l_cpu.json").write_text("{}")
    (results / "shard_small_files_cpu.json").write_text("[1, 2")
    (results / "load_30fps_r1_1workers_cpu.json").unlink()
    found = draw_chart(ChartConfig(results=results, out=tmp_path / "a.svg"))
    assert set(found["plotted"]) == {STEPS, ALONE, SHARDING}
    assert "MAE-ST ViT-L" not in found["plotted"][STEPS] and len(found["plotted"][SHARDING]) == 1
    assert "default, 30 fps, R = 1" not in found["plotted"][ALONE]
    said = capsys.readouterr().err
    for name in (
        "loaders*.json",
        "step_vit_l_cpu.json",
        "shard_small_files_cpu.json",
        "load_30fps_r1_2workers_cpu.json",
    ):
        assert name in found["skipped"] and name in said


def test_a_gpu_among_the_machines_is_named(results: Path, tmp_path: Path) -> None:
    step = read("step_vit_l_cpu.json")
    step["machine"]["gpu"] = "NVIDIA H100"
    (results / "step_vit_l_cpu.json").write_text(json.dumps(step))
    machines = draw_chart(ChartConfig(results=results, out=tmp_path / "a.png"))["machines"]
    assert {machine["gpu"] for machine in machines} == {None, "NVIDIA H100"}
    assert "NVIDIA H100" in chart._machines_text(machines)
    assert "Nothing here" not in chart._machines_text(machines)


def test_a_result_of_today_is_drawn(results: Path, tmp_path: Path) -> None:
    """Newer results hold the sample's settings in a group of their own."""
    for name in ("load_30fps_r1_1workers_cpu.json", "load_30fps_r1_2workers_cpu.json"):
        found = read(name)
        config = found["config"]
        config["sample"] = {key: config.pop(key) for key in ("frames", "size", "fps")}
        config["data"] = "mine"
        (results / name).write_text(json.dumps(found))
    plotted = draw_chart(ChartConfig(results=results, out=tmp_path / "a.png"))["plotted"]
    assert set(plotted[ALONE]["mine, R = 1"]) == {"one worker", "two workers"}


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no result"):
        draw_chart(ChartConfig(results=tmp_path, out=tmp_path / "a.png"))
    with pytest.raises(InputError, match="no such folder"):
        draw_chart(ChartConfig(results=tmp_path / "nowhere", out=tmp_path / "a.png"))
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        draw_chart(ChartConfig(out=tmp_path / "a.jpg"))
    assert list(tmp_path.iterdir()) == []

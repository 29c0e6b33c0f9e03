"""compose.yaml: what it says, and its services as processes of one machine, with the demo end to end on s3://."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from images import DOCKERFILE, PREFIX, ROOT, read_dockerfile
from services import DOCKER, isolated, read_compose

from reelmae.tools.bench.seaweed import find_weed

SERVICES = Path(__file__).with_name("services.py")
OURS = ("ray-head", "ray-worker", "driver", "demo")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read_compose()


def test_every_image_is_pinned_and_every_target_exists(compose: dict[str, Any]) -> None:
    services = compose["services"]
    targets = {step.rest.split()[-1] for step in read_dockerfile() if step.word == "FROM"}
    assert re.fullmatch(r".+:\d+\.\d+", services["s3"]["image"])
    for name in OURS:
        build = services[name]["build"]
        assert build["target"] in targets and services[name]["image"] == f"reelmae:{build['target']}"
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE


def test_nothing_is_published_beyond_this_machine(compose: dict[str, Any]) -> None:
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert published == {"s3": ["127.0.0.1:8333:8333"], **{name: [] for name in OURS}}
    assert compose["networks"]["inside"] == {"internal": True}
    assert all(compose["services"][name]["networks"] == ["inside"] for name in OURS)
    assert not any("network_mode" in service or "privileged" in service for service in compose["services"].values())


def test_nobody_is_told_what_runs_here(compose: dict[str, Any]) -> None:
    assert "-master.telemetry=false" in compose["services"]["s3"]["command"]
    for name in OURS:
        assert compose["services"][name]["environment"]["RAY_USAGE_STATS_ENABLED"] == "0"
        assert compose["services"][name]["environment"]["RAY_AUTH_MODE"] == "token"
    script = (DOCKER / "ray.sh").read_text()
    assert "--include-dashboard=false" in script and "RAY_USAGE_STATS_ENABLED=0" in script


def test_services_wait_for_those_that_they_need(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all(service["healthcheck"]["test"][0] == "CMD" for service in services.values())
    needs = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert {need["condition"] for all_of in needs.values() for need in all_of.values()} == {"service_healthy"}
    assert {name: set(all_of) for name, all_of in needs.items()} == {
        "s3": set(),
        "ray-head": set(),
        "ray-worker": {"ray-head", "s3"},
        "driver": {"ray-worker", "s3"},
        "demo": {"ray-worker", "s3"},
    }
    assert services["ray-worker"]["deploy"] == {"replicas": 2}


def test_what_services_run_is_in_the_image(compose: dict[str, Any]) -> None:
    copied = {word for step in read_dockerfile() if step.word == "COPY" for word in step.rest.split()}
    words = [w for s in compose["services"].values() for w in (*s.get("entrypoint", []), *s["healthcheck"]["test"])]
    scripts = {word.removeprefix(f"{PREFIX}/") for word in words if word.startswith(PREFIX)}
    assert scripts == {"docker/ray.sh", "docker/demo.sh"} <= copied
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK)
        subprocess.run(["sh", "-n", str(ROOT / script)], check=True)


def test_the_gpu_file_changes_images_devices_and_cores_only(compose: dict[str, Any]) -> None:
    over = read_compose(DOCKER / "compose.gpu.yaml")["services"]
    assert set(over) == set(OURS)
    for service in over.values():
        assert (service["image"], service["build"]) == ("reelmae:gpu", {"target": "gpu"})
        assert set(service) <= {"image", "build", "deploy", "environment"}
    assert "--num-cpus" not in over["ray-worker"]["environment"]["RAY_START_ARGS"]  # a task on a GPU has four


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of the demo with every service of compose.yaml as a process."""
    tried = subprocess.run(isolated("true"), capture_output=True, text=True, check=False)
    if tried.returncode or find_weed() is None or not (shutil.which("wget") and shutil.which("ss")):
        pytest.skip(f"namespaces, SeaweedFS, wget and ss are needed: {tried.stderr.strip()}")
    folder = tmp_path_factory.mktemp("demo")
    small = ("DEMO_VIDEOS=4", "DEMO_SECONDS=1", "DEMO_STEPS=2", f"DEMO_OUT={folder}/run")
    settings = ("loader.batch_videos=2", "model.depth=1", "model.decoder_depth=1", "loader.workers=0")
    argv = isolated(sys.executable, str(SERVICES), str(folder), *small, *settings)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr[-3000:]}"
    return json.loads((folder / "result.json").read_text()) | {"folder": folder}


def test_the_demo_runs_end_to_end_on_s3(demo: dict[str, Any]) -> None:
    assert demo["status"] == 0, demo["said"]
    said = demo["said"]
    steps = [line.split()[1:3] for line in said.splitlines() if line.startswith("== ")]
    ours = [step for step in steps if step[0] == "reelmae"]
    assert ours == [["reelmae", name] for name in ("doctor", "shard", "verify", "pretrain")]
    assert "s3://raw/demo: 4 videos" in said and "ok: True" in said
    assert list((demo["folder"] / "run").rglob("*.pt"))


def test_a_head_two_workers_and_a_driver_were_one_cluster(demo: dict[str, Any]) -> None:
    assert demo["workers"] == [None, None]  # they did not end
    assert demo["nodes"].count(" node_") == 4
    assert re.search(r"/4.0 CPU", demo["nodes"])  # two each; head and driver take no task


def test_no_dashboard_listens(demo: dict[str, Any]) -> None:
    listening = {int(port): program for port, program in demo["listening"].items()}
    assert {8333, 6379} <= set(listening)
    assert 8265 not in listening and not any("dashboard" in program for program in listening.values())

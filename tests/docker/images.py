"""Runs the steps of docker/Dockerfile without a container engine: FROM, ARG, ENV, WORKDIR, COPY, RUN, USER, ENTRYPOINT, CMD.

Each stage is a root folder. Its RUN steps run in it by chroot, in namespaces of their own: /usr and /lib are this
machine's, read only, except that /usr/local is this Python's, as in the official image; /etc is a copy; all else is the
stage's own. COPY takes what .dockerignore lets through. So the steps run as they are written, at the paths that they
name, and what they leave is what the image holds. Not here: the base image and its packages, layers, limits.

    unshare --mount python images.py FOLDER cpu,gpu             installs everything, as an engine would: minutes, some 15 GB
    unshare --mount python images.py FOLDER cpu,gpu PACKAGES    in seconds: what pip would install is in PACKAGES already

The packages of the images' environment are layers of overlayfs. PACKAGES, a site-packages folder, is the lowest of them, which
steps do not change. Then pip has no index: it fails if a requirement or a constraint of the images is
not what is there. Writes FOLDER/result.json: what the entry point and other commands said in each image.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
PREFIX = "/opt/reelmae"
SITE_PACKAGES = f"{PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
METADATA = ("LABEL", "HEALTHCHECK", "EXPOSE", "VOLUME", "STOPSIGNAL")


@dataclass(frozen=True)
class Step:
    """An instruction of a Dockerfile."""

    word: str
    rest: str

    def words(self) -> list[str]:
        """Its arguments; those of the JSON form too."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


def read_dockerfile(path: Path = DOCKERFILE) -> list[Step]:
    """Its instructions, comments left out, continued lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [Step(*line.split(None, 1)) for line in whole.splitlines() if line.strip()]


def context_files(root: Path = ROOT) -> list[Path]:
    """The build context: files of the repository that .dockerignore lets through, the last rule that fits decides."""
    rules = [r for r in (root / ".dockerignore").read_text().splitlines() if r.strip() and not r.startswith("#")]
    named = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}  # everything else is out by `*`
    assert rules[0] == "*", "this reads a .dockerignore that begins with *"
    tops = [root / name for name in sorted(named)]
    files = [f for top in tops for f in ([top] if top.is_file() else top.rglob("*")) if f.is_file()]
    return [f for f in files if not _is_ignored(str(f.relative_to(root)), rules)]


def _is_ignored(name: str, rules: list[str]) -> bool:
    ignored = False
    parts = name.split("/")
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]  # a rule for a folder holds for what is in it
    for rule in rules:
        pattern = rule.removeprefix("!")
        any_depth = pattern.removeprefix("**/")
        if any(fnmatch.fnmatchcase(p, pattern) and p.count("/") == pattern.count("/") for p in paths) or (
            any_depth != pattern and any(fnmatch.fnmatchcase(part, any_depth) for part in parts)
        ):
            ignored = not rule.startswith("!")
    return ignored


@dataclass
class Stage:
    """What a stage has come to: its root, and what its next step runs with. `packages` are overlayfs' layers, top first."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    folder: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    packages: list[Path] = field(default_factory=list)


class Build:
    """Runs the stages that a target needs. To be used in mount namespaces of its own."""

    def __init__(
        self, folder: Path, packages: Path | None, context: Path = ROOT, dockerfile: Path = DOCKERFILE
    ) -> None:
        self.folder = folder
        self.under = packages
        self.context = context
        self.dockerfile = dockerfile
        self.stages: dict[str, Stage] = {}
        self._arguments: dict[str, str] = {}
        self._n = 0

    def run(self, target: str) -> Stage:
        """The stage of the target, after all of its steps. RuntimeError names the step that fails."""
        made = set(self.stages)
        name = ""
        for step in _needed(read_dockerfile(self.dockerfile), target):
            if step.word == "FROM":
                base, _, name = self._expand(step.rest).split()
                if name not in made:
                    self.stages[name] = self._begin(base, name)
            elif step.word == "ARG":
                key, _, value = step.rest.partition("=")
                self._arguments.setdefault(key, value)
            elif name not in made:
                self._do(self.stages[name], step)
        return self.stages[target]

    def _begin(self, base: str, name: str) -> Stage:
        root = self.folder / name
        if base not in self.stages:  # the official image of Python
            _make_base(root)
            return Stage(root)
        before = self.stages[base]
        subprocess.run(["cp", "-ax", "--reflink=auto", str(before.root), str(root)], check=True)
        return replace(before, root=root, environment=dict(before.environment), packages=self._over(before.packages))

    def _over(self, packages: list[Path]) -> list[Path]:
        """Layers over these: an empty one on top."""
        self._n += 1
        top = self.folder / f"layer-{self._n}"
        top.mkdir()
        return [top, *packages] if packages else []

    def _do(self, stage: Stage, step: Step) -> None:
        if step.word == "ENV":
            stage.environment |= dict(pair.split("=", 1) for pair in shlex.split(self._expand(step.rest, stage)))
        elif step.word == "WORKDIR":
            stage.folder = step.rest
            _inside(stage.root, step.rest).mkdir(parents=True, exist_ok=True)
        elif step.word == "USER":
            stage.user = step.rest
        elif step.word == "COPY":
            self._copy(stage, step.words())
        elif step.word == "RUN":
            self._run(stage, step)
        elif step.word == "ENTRYPOINT":
            stage.entrypoint = step.words()
        elif step.word == "CMD":
            stage.command = step.words()
        elif step.word not in METADATA:
            raise RuntimeError(f"{step.word} {step.rest}: this runner does not know it")

    def _copy(self, stage: Stage, words: list[str]) -> None:
        source = self.stages[words.pop(0).removeprefix("--from=")] if words[0].startswith("--from=") else None
        *names, to = words
        into = _inside(stage.root, os.path.join(stage.folder, to))  # noqa: PTH118
        if source is not None:
            files = _inside(source.root, names[0])
            if self.under is not None and not files.exists():
                return  # pip had nothing to install
            if files.is_file():
                shutil.copy2(files, into)
                return
            into.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-ax", f"{files}/.", f"{into}/"], check=True)
            if names[0] == PREFIX and source.packages:
                stage.packages = self._over(source.packages)
            _raise_packages(stage)
            return
        files = {str(f.relative_to(self.context)): f for f in context_files(self.context)}
        for name in names:
            taken = {n: f for n, f in files.items() if n == name or n.startswith(f"{name}/")}
            if not taken:
                raise RuntimeError(f"COPY {name}: .dockerignore lets nothing of it through")
            for n, file in taken.items():  # a file keeps its base name in a folder; a folder's content goes into it
                path = into / (n.removeprefix(f"{name}/") if n != name else Path(n).name)
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, path)

    def _run(self, stage: Stage, step: Step) -> None:
        make_venv = "-m venv"
        if make_venv not in step.rest:
            self._shell(stage, step.rest)
            return
        first, _, then = step.rest.partition("&&")  # from there on its packages are in layers
        assert make_venv in first, f"make the environment in the first command: {step.rest}"
        self._shell(stage, first)
        if self.under is not None:  # what pip would install is there at once
            stage.packages = self._over([self.under])
            _forget_others(stage, self.under)
        else:
            made = self.folder / "layer-0"
            _inside(stage.root, SITE_PACKAGES).rename(made)
            _inside(stage.root, SITE_PACKAGES).mkdir()
            stage.packages = self._over([made])
        self._shell(stage, then)

    def _shell(self, stage: Stage, command: str) -> None:
        arguments = {
            key: value for key, value in self._arguments.items() if f"${{{key}" in command or f"${key}" in command
        }
        done = in_stage(stage, ["/bin/sh", "-c", command], arguments | ({"PIP_NO_INDEX": "1"} if self.under else {}))
        print(f"RUN {' '.join(command.split())}\n{done.stdout}{done.stderr}", flush=True)
        if done.returncode:
            raise RuntimeError(f"RUN {' '.join(command.split())}: exit status {done.returncode}: {done.stderr[-2000:]}")

    def _expand(self, text: str, stage: Stage | None = None) -> str:
        """With the values of its variables; where a variable has none, it becomes nothing."""
        values = self._arguments | (stage.environment if stage else {})
        for key, value in values.items():
            text = text.replace(f"${{{key}}}", value).replace(f"${key}", value)
        return text


def in_stage(stage: Stage, argv: list[str], more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as the stage's user in its root. Its mounts end with it."""
    mounts = []
    for name in ("usr", "bin", "sbin", "lib", "lib64"):
        host = Path("/", name)
        if not host.is_symlink() and host.exists():
            mounts.append(f"mount --bind {host} {stage.root}/{name} && mount -o remount,bind,ro {stage.root}/{name}")
    python = Path(sys.base_prefix)
    if python == Path("/usr"):  # a distribution's Python, which the base image calls python
        python = stage.root / "run" / "python"
        (python / "bin").mkdir(parents=True, exist_ok=True)
        if not (python / "bin" / "python").is_symlink():
            (python / "bin" / "python").symlink_to("/usr/bin/python3")
    mounts.append(f"mount --bind {python} {stage.root}/usr/local")
    mounts.append(f"mount -o remount,bind,ro {stage.root}/usr/local")
    mounts.append(f"mount --rbind /dev {stage.root}/dev && mount -t proc proc {stage.root}/proc")
    if stage.packages:
        top, *under = stage.packages
        work = top.parent / f"{top.name}-work"
        work.mkdir(exist_ok=True)
        options = f"lowerdir={':'.join(map(str, under))},upperdir={top},workdir={work}"
        mounts.append(f"mount -t overlay overlay -o {options} {_inside(stage.root, SITE_PACKAGES)}")
    variables = stage.environment | (more or {})
    # the network's certificates are this machine's
    variables |= {key: value for key, value in os.environ.items() if key in ("PIP_CERT", "SSL_CERT_FILE")}
    prefix = ["chroot", f"--userspec={stage.user}:{stage.user}", str(stage.root), "/usr/bin/env", "-i"]
    prefix += [f"{key}={value}" for key, value in variables.items()]
    inner = shlex.join([*prefix, "/bin/sh", "-c", 'cd "$0" && exec "$@"', stage.folder, *argv])
    script = " && ".join([*mounts, f"exec {inner}"])
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _needed(steps: list[Step], target: str) -> list[Step]:
    """Those of the stages that the target stands on, in order."""
    starts = [i for i, step in enumerate(steps) if step.word == "FROM"]
    blocks = {steps[a].rest.split()[-1]: steps[a:b] for a, b in zip(starts, [*starts[1:], len(steps)], strict=True)}
    wanted = {target}
    for name in reversed(blocks):
        if name in wanted:
            copies = (step.words()[0] for step in blocks[name] if step.word == "COPY")
            wanted |= {blocks[name][0].rest.split()[0]}
            wanted |= {word.removeprefix("--from=") for word in copies if word.startswith("--from=")}
    return [*steps[: starts[0]], *(step for name, block in blocks.items() if name in wanted for step in block)]


def _make_base(root: Path) -> None:
    """The folders of an empty machine, with the users of this one."""
    for name in ("usr", "dev", "proc", "etc", "home", "opt", "root", "run", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        host = Path("/", name)
        if host.is_symlink():
            (root / name).symlink_to(host.readlink())
        elif host.exists():
            (root / name).mkdir()
    users = ("passwd", "group", "shadow", "gshadow", "login.defs")
    for name in (*users, "hosts", "resolv.conf", "nsswitch.conf", "ld.so.conf"):
        if Path("/etc", name).exists():
            shutil.copy2(Path("/etc", name), root / "etc" / name)
    for name in ("ssl", "ld.so.conf.d", "default", "alternatives", "pam.d", "skel"):
        if Path("/etc", name).exists():
            shutil.copytree(Path("/etc", name), root / "etc" / name, symlinks=True)
    done = in_stage(Stage(root), ["ldconfig"])  # for /usr/local/lib
    if done.returncode:
        raise RuntimeError(f"the base: {done.stderr}")


def requested() -> set[str]:
    """The packages that the images install beside torch and our own: names of requirements and of what those require."""
    step = next(step for step in read_dockerfile() if step.word == "RUN" and "requirements.py" in step.rest)
    extras = step.rest.split("requirements.py")[1].split(">")[0].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    todo = [(Requirement(line), "") for line in lines]
    found = set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        if key in found or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        found.add(key)
        theirs = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        todo += [(r, e) for r in theirs for e in ("", *requirement.extras)]
    return {name for name, *_ in found}


def _forget_others(stage: Stage, packages: Path) -> None:
    """Take what the images do not install, our own package too, out of the packages that are there already."""
    wanted = requested() | {"pip"}
    files: dict[bool, set[str]] = {True: set(), False: set()}
    for distribution in importlib.metadata.distributions(path=[str(packages)]):
        keep = canonicalize_name(distribution.name) in wanted
        files[keep] |= {str(file) for file in distribution.files or () if not str(file).startswith("..")}
    names = _inside(stage.root, "/tmp/others")
    names.write_text("\0".join(sorted(files[False] - files[True])))
    done = in_stage(stage, ["/bin/sh", "-c", f"cd {SITE_PACKAGES} && xargs -0 rm -f < /tmp/others && rm /tmp/others"])
    if done.returncode:
        raise RuntimeError(f"overlayfs: {done.stderr}")


def _raise_packages(stage: Stage) -> None:
    """What was copied into the packages' folder goes into the layer that is mounted over it."""
    copied = _inside(stage.root, SITE_PACKAGES)
    if stage.packages and copied.is_dir():
        subprocess.run(["cp", "-a", f"{copied}/.", f"{stage.packages[0]}/"], check=True)


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


QUESTIONS = ("doctor", "who", "holds", "write", "help", "step", "shard", "node")
TRAIN_A_STEP = """
import json, re, torch, torchvision, timm, ray, cv2, scenedetect, av, awscrt, obstore, pyarrow, webdataset, nvidia.dali.fn
from pathlib import Path
import reelmae.tools
from reelmae.model import MaskedAutoencoder, mae_config
model = MaskedAutoencoder(mae_config("T", size=32, patch=8, frames=4, depth=1, decoder_depth=1))
loss = model(torch.rand(2, 3, 4, 32, 32), torch.arange(4).repeat(2, 1)).loss
loss.backward()
libraries = set(re.findall(r"(/\\S+\\.so\\S*)", Path("/proc/self/maps").read_text()))
print(json.dumps({"loss": loss.item(), "code": reelmae.tools.__file__, "libraries": sorted(libraries)}))
"""


def ask(stage: Stage, asked: Sequence[str]) -> dict[str, Any]:
    """What an image says: its entry point, who it runs as, what its Python can do, what it holds."""
    bucket = "from reelmae.tools.synth.bucket import make_bucket; make_bucket('raw', videos=1, broken=1, seconds=1, workers=1)"
    holds = f"ls {PREFIX}/docker; ls -d {SITE_PACKAGES}/triton {SITE_PACKAGES}/nvidia/cudnn/lib/libcudnn_*"
    commands = {
        "doctor": [*stage.entrypoint, *stage.command, "--json"],
        "help": [*stage.entrypoint, "--help"],
        "who": ["id", "-u"],
        "step": ["python", "-c", TRAIN_A_STEP],
        "shard": ["/bin/sh", "-c", f'python -c "{bucket}" && reelmae shard raw shards --json'],
        "holds": ["/bin/sh", "-c", holds],
        "write": ["/bin/sh", "-c", f"touch {PREFIX}/mine; touch /results/mine && echo written"],
        "node": [f"{PREFIX}/docker/ray.sh", "nonsense"],
    }
    return {name: vars(in_stage(stage, argv)) for name, argv in commands.items() if name in asked}


if __name__ == "__main__":
    where, targets = Path(sys.argv[1]), sys.argv[2].split(",")
    build = Build(where, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    result = {target: ask(build.run(target), QUESTIONS if target == "cpu" else QUESTIONS[:4]) for target in targets}
    where.joinpath("result.json").write_text(json.dumps(result, indent=1))

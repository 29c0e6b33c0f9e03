"""The flags of a command whose tasks can run on a cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from reelmae.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from reelmae.pipeline.runners.runner import Runner


@dataclass(kw_only=True)
class RunnerFlags:
    """Where tasks run. A command holds one as a field with `arg(name="")`, which flattens it."""

    runner: Literal["local", "ray"] = "local"
    """local: on this machine. ray: on a Ray cluster (extra `ray`); every node must reach what this machine reaches."""
    ray_address: Annotated[str | None, arg(metavar="ADDRESS")] = None
    """With --runner ray: HOST:PORT of the cluster, ray://HOST:PORT, or auto. None: RAY_ADDRESS, else a Ray of this machine alone."""

    def open(self, workers: int | None = None, **needs: Any) -> AbstractContextManager[Runner | None]:
        """The runner as a context; None where the command's own workers on this machine do the work.

        workers: the most tasks at a time. needs: what a task needs, as RayRunner has it.
        """
        if self.runner == "local":
            if self.ray_address is not None:
                raise ConfigError(f"--ray-address {self.ray_address}: add --runner ray, or leave it out")
            return nullcontext()
        from reelmae.pipeline.runners.ray import RayRunner

        return RayRunner(self.ray_address, workers, **needs)

"""`reelmae bench …`: one command per benchmark, and the chart of what they measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg, subcommand

from reelmae.tools.bench.config import (
    BenchClusterConfig,
    BenchIndexConfig,
    BenchJoinConfig,
    BenchLoadConfig,
    BenchLoadersConfig,
    BenchPlanConfig,
    BenchPresetsConfig,
    BenchShardConfig,
    BenchStepConfig,
    BenchStorageConfig,
    ChartConfig,
)
from reelmae.tools.commands.access import AccessFlags
from reelmae.tools.commands.command import Command
from reelmae.tools.show import Result


@dataclass
class BenchStep(Command):
    """Time a training step: dense encoder against sparse encoder. With --data also behind the real loader."""

    config: Annotated[BenchStepConfig, arg(name="")] = field(default_factory=BenchStepConfig)
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.step import bench_step

        return bench_step(self.config, self.access.access())


@dataclass
class BenchLoad(Command):
    """Time the loader alone: clips per second and per processor second, seconds of each stage, memory."""

    config: Annotated[BenchLoadConfig, arg(name="")]
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.load import bench_load

        return bench_load(self.config, self.access.access())


@dataclass
class BenchLoaders(Command):
    """Compare the loader with two that a user would write, on one core each: clips per processor second."""

    config: Annotated[BenchLoadersConfig, arg(name="")]
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.loaders import bench_loaders

        return bench_loaders(self.config, self.access.access())


@dataclass
class BenchShard(Command):
    """Compare sharding with bare ffmpeg that does the same encodes; or on Ray with local workers; or out of tars with loose files."""

    config: Annotated[BenchShardConfig, arg(name="")]

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.shard import bench_shard

        return bench_shard(self.config)


@dataclass
class BenchPlan(Command):
    """Measure time and memory of planning, resuming and joining a job of a million generated sources."""

    config: Annotated[BenchPlanConfig, arg(name="")] = field(default_factory=BenchPlanConfig)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.plan import bench_plan

        return bench_plan(self.config)


@dataclass
class BenchJoin(Command):
    """Measure time and memory of the end of a job of ten million clips: joining its commits, marking near repeats."""

    config: Annotated[BenchJoinConfig, arg(name="")] = field(default_factory=BenchJoinConfig)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.join import bench_join

        return bench_join(self.config)


@dataclass
class BenchCluster(Command):
    """Measure the driver of a job on a Ray cluster of which nodes join and leave: seconds, tasks a second, memory."""

    config: Annotated[BenchClusterConfig, arg(name="")] = field(default_factory=BenchClusterConfig)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.cluster import bench_cluster

        return bench_cluster(self.config)


@dataclass
class BenchIndex(Command):
    """Measure time and memory from start to the first batch's draws, with a generated index of ten million clips."""

    config: Annotated[BenchIndexConfig, arg(name="")] = field(default_factory=BenchIndexConfig)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.index import bench_index

        return bench_index(self.config)


@dataclass
class BenchPresets(Command):
    """Compare x264's presets at the settings of a training clip: encoding time, bytes, decoding time, SSIM."""

    config: Annotated[BenchPresetsConfig, arg(name="")]

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.presets import bench_presets

        return bench_presets(self.config)


@dataclass
class BenchStorage(Command):
    """Compare storage with obstore (reading) and boto3 (writing) on one S3 server: MB/s, processor time, memory."""

    config: Annotated[BenchStorageConfig, arg(name="")] = field(default_factory=BenchStorageConfig)
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.storage import bench_storage, text_of

        result = bench_storage(self.config, self.access.access())
        return result if self.json else text_of(result)


@dataclass
class BenchChart(Command):
    """Draw the measured figures of a folder of results as one picture."""

    config: Annotated[ChartConfig, arg(name="")] = field(default_factory=ChartConfig)

    def run(self) -> Result:
        """Draw."""
        from reelmae.tools.bench.chart import draw_chart

        return draw_chart(self.config)


@dataclass
class Bench:
    """Measure where the time goes."""

    what: (
        Annotated[BenchStep, subcommand("step")]
        | Annotated[BenchLoad, subcommand("load")]
        | Annotated[BenchLoaders, subcommand("loaders")]
        | Annotated[BenchShard, subcommand("shard")]
        | Annotated[BenchPlan, subcommand("plan")]
        | Annotated[BenchJoin, subcommand("join")]
        | Annotated[BenchCluster, subcommand("cluster")]
        | Annotated[BenchIndex, subcommand("index")]
        | Annotated[BenchPresets, subcommand("presets")]
        | Annotated[BenchStorage, subcommand("storage")]
        | Annotated[BenchChart, subcommand("chart")]
    )

    def run(self) -> Result:
        """Run the chosen benchmark."""
        return self.what.run()

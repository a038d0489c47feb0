"""`dsnet bench` and `dsnet info`: how fast things are, and what runs them."""

from dataclasses import dataclass, field

from ..experiments.bench.config import BenchConfig


@dataclass(frozen=True)
class Bench:
    """Measure speed, memory and traffic of DSNets beside ResNets, DenseNets and the public form of dense shortcuts."""

    config: BenchConfig = field(default_factory=BenchConfig)

    def run(self, line: str) -> None:
        from ..experiments.bench.run import bench

        bench(self.config, line)


@dataclass(frozen=True)
class Info:
    """Say which versions, devices and compilers are here, and which back end each device uses and why."""

    def run(self, line: str) -> None:
        from ..experiments.environment import info

        print("\n".join(info()))

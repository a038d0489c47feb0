"""The command line: parse, call, print. `dsnet compare`, `train`, `eval`, `models`, `bench`, `info`."""

import argparse
import contextlib
import io
import itertools
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from .bench.config import BenchConfig
from .errors import DenseShortcutError
from .train.config import TrainConfig, read_yaml

COMMANDS = ("compare", "train", "eval", "models")


@dataclass(frozen=True)
class Run:
    """What `compare` and `train` take."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    recipe: Path | None = None
    """YAML file with settings; flags given beside it have the last word."""
    resume: Path | None = None
    """Folder of a run to go on with; nothing else is given beside it."""


@dataclass(frozen=True)
class Compare(Run):
    """Train a residual network and its DSNet twin on the same images with the same seed, and say which one won."""


@dataclass(frozen=True)
class Train(Run):
    """Train one network."""


@dataclass(frozen=True)
class Eval:
    """Score a checkpoint on the test images of its run, or on others with the same classes."""

    checkpoint: tyro.conf.Positional[Path]
    """A network's folder in a run, or the model.safetensors in it."""
    data: str | None = None
    """digits, cifar100 or imagefolder; None is what it was trained on."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    limit_test: int | None = None
    """Use only so many test images; None is the run's own."""
    batch_size: int | None = None
    """Images at a time; None is the run's own."""
    workers: int | None = None
    """Worker processes that prepare images; None is the run's own."""


@dataclass(frozen=True)
class Models:
    """List the DSNets."""

    pattern: tyro.conf.Positional[str] = ""
    """A wildcard such as 'ds2*'."""


@dataclass(frozen=True)
class Bench:
    """Measure speed, memory and traffic of DSNets beside ResNets, DenseNets and the public form of dense shortcuts."""

    config: tyro.conf.OmitArgPrefixes[BenchConfig] = field(default_factory=BenchConfig)


@dataclass(frozen=True)
class Info:
    """Say which versions, devices and compilers are here, and which back end each device uses and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for an error of the caller, 130 or 143 for an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(arguments)
    except DenseShortcutError as error:
        print(f"dsnet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\ndsnet: interrupted: {advice(interruption, arguments)}", file=sys.stderr)
        return 128 + caught[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def advice(interruption: KeyboardInterrupt, arguments: list[str]) -> str:
    """What to do after an interruption."""
    from .train.run import RunInterrupted

    if isinstance(interruption, RunInterrupted):
        return f"go on with `dsnet {arguments[0]} --resume {shlex.quote(str(interruption.folder))}`."
    if arguments[:1] == ["bench"]:
        return "comparisons that were finished are in the output folder."
    return "nothing was begun."


def run(arguments: list[str]) -> None:
    """Parse and call."""
    command: Any = parse(arguments)
    if isinstance(command, Models):
        from .models import list_models

        print("\n".join(list_models(command.pattern)))
        return
    if isinstance(command, Info):
        from .machine import info

        print("\n".join(info()))
        return
    if isinstance(command, Bench):
        from .bench.run import bench

        bench(command.config, shlex.join(["dsnet", *arguments]))
        return
    from .train import run as runs

    if isinstance(command, Eval):
        print_figures(runs.evaluate(**vars(command)))
    elif command.resume is not None:
        runs.resume(command.resume, arguments[0])
    elif isinstance(command, Compare):
        runs.compare(command.config)
    else:
        runs.train(command.config)


def parse(arguments: list[str]) -> Compare | Train | Eval | Models | Bench | Info:
    """The command with its settings; a recipe gives the defaults that the other flags change.

    Raises:
        DenseShortcutError: a bad recipe, flag or value, or other flags beside --resume.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", type=Path)
    first.add_argument("--resume", type=Path)
    try:
        known, rest = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise DenseShortcutError(f"{error}: give the path behind it.") from error
    if known.resume is not None and (known.recipe is not None or len(rest) > 1):
        raise DenseShortcutError("--resume goes on with the run's own settings: give no other flag beside it.")
    config = read_yaml(known.recipe) if known.recipe is not None else TrainConfig()
    commands: Any = (
        Annotated[Compare, tyro.conf.subcommand("compare", default=Compare(config))]
        | Annotated[Train, tyro.conf.subcommand("train", default=Train(config))]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Models, tyro.conf.subcommand("models")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                commands, prog="dsnet", description="Dense shortcuts for residual networks.", args=arguments
            )
    except SystemExit as refusal:
        if not refusal.code:  # --help, which went to stdout
            raise
        raise DenseShortcutError(refused(told.getvalue(), arguments)) from None


def refused(box: str, arguments: list[str]) -> str:
    """One sentence from the box in which tyro says why it refuses the arguments: what stands above its first rule."""
    # In colour on a terminal; with "│" and "─" where stdout is UTF-8, else with "-" alone; the title is the first line.
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines()][1:]
    rule = re.compile("[─-]{4,}|╰.*")
    if lines and rule.fullmatch(lines[0]):
        lines = lines[1:]
    reason = " ".join(itertools.takewhile(lambda line: not rule.fullmatch(line), lines)).rstrip(". ")
    near = re.search(r"(?:perhaps you meant|similar to)[^\n]*\n(--[\w-]+)", "\n".join(lines), re.IGNORECASE)
    meant = f"did you mean {near[1]}? " if near else ""
    command = f"{arguments[0]} " if arguments and arguments[0] in COMMANDS else ""
    return f"{reason[:1].lower()}{reason[1:]}: {meant}`dsnet {command}--help` lists what there is."


def print_figures(figures: dict[str, Any]) -> None:
    """One line with the scores."""
    top5 = f", top-5 {figures['top5']:.2f} %" if "top5" in figures else ""
    print(
        f"{figures['checkpoint']} ({figures['model']}): accuracy {figures['top1']:.2f} %{top5}, "
        f"loss {figures['loss']:.4f} on {figures['images']:,} test images"
    )


if __name__ == "__main__":
    sys.exit(main())

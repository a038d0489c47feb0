"""The command line: parse a command, run it, turn what goes wrong into one line and an exit code."""

import argparse
import contextlib
import io
import itertools
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Union

import tyro

from .commands import COMMANDS
from .errors import DenseShortcutError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for an error of the caller, 130 or 143 for an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        parse(arguments).run(shlex.join(["dsnet", *arguments]))
        leave_processes()
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


def leave_processes() -> None:
    """Take leave of the other processes of a run, where `torchrun` or the like started several."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def advice(interruption: KeyboardInterrupt, arguments: list[str]) -> str:
    """What to do after an interruption."""
    from .experiments.train.run import RunInterrupted

    if arguments[:1] in (["sweep"], ["rerun"], ["support"]):
        return "the same command goes on."
    if isinstance(interruption, RunInterrupted) and arguments[:1] in (["prune"], ["renorm"]):
        return f"{interruption.folder} was not trained to its end: remove it, or take another --name."
    if isinstance(interruption, RunInterrupted):
        return f"go on with `dsnet {' '.join(words(arguments))} --resume {shlex.quote(str(interruption.folder))}`."
    if arguments[:1] == ["bench"]:
        return "comparisons that were finished are in the output folder."
    return "nothing was begun."


def parse(arguments: list[str]) -> Any:
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
    if known.resume is not None and (known.recipe is not None or len(rest) > len(words(rest))):
        raise DenseShortcutError("--resume goes on with the run's own settings: give no other flag beside it.")
    commands = union(COMMANDS, words(rest), known.recipe)
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


def words(arguments: Sequence[str]) -> list[str]:
    """The words that name a command at the head of the arguments, such as ["detect", "train"]."""
    found: list[str] = []
    level: Any = COMMANDS
    for argument in arguments:
        if not isinstance(level, dict) or argument not in level:
            break
        found.append(argument)
        level = level[argument]
    return found


def union(commands: dict[str, Any], chosen: list[str], recipe: Path | None) -> Any:
    """The commands for tyro; the chosen one begins from the recipe's settings."""
    kinds = []
    for name, entry in commands.items():
        here = chosen[:1] == [name]
        if isinstance(entry, dict):
            nested = union(entry, chosen[1:] if here else [], recipe)
            kinds.append(Annotated[nested, tyro.conf.subcommand(name, description=f"{', '.join(entry)}.")])
        elif here and recipe is not None and hasattr(entry, "read_recipe"):
            kinds.append(Annotated[entry, tyro.conf.subcommand(name, default=entry(entry.read_recipe(recipe)))])
        else:
            kinds.append(Annotated[entry, tyro.conf.subcommand(name)])
    return Union[tuple(kinds)]  # noqa: UP007


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
    command = "".join(f"{word} " for word in words(arguments))
    return f"{reason[:1].lower()}{reason[1:]}: {meant}`dsnet {command}--help` lists what there is."


if __name__ == "__main__":
    sys.exit(main())

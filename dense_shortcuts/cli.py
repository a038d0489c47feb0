"""The command line: parse a command, run it, turn what goes wrong into one line and an exit code."""

import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from . import recipes
from .commands import COMMANDS
from .commands.arguments import build, read
from .errors import DenseShortcutError
from .experiments.command import dsnet


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
        return f"go on with `{dsnet(*words(arguments), '--resume', interruption.folder)}`."
    if arguments[:1] == ["bench"]:
        return "comparisons that were finished are in the output folder."
    return "nothing was begun."


def parse(arguments: Sequence[str]) -> Any:
    """The command with its settings; a recipe gives the defaults that the other flags change.

    Raises:
        DenseShortcutError: a bad recipe, flag or value, or other flags beside --resume.
    """
    command, given = read(arguments, COMMANDS)
    if given.get("resume") is not None and len(given) > 1:
        raise DenseShortcutError("--resume goes on with the run's own settings: give no other flag beside it.")
    recipe = given.get("recipe")
    return build(command, given, config=None if recipe is None else command.read_recipe(recipes.find(recipe)))


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


if __name__ == "__main__":
    sys.exit(main())

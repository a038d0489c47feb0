"""The commands of `dsnet`: one file a subject, one dataclass a command, whose fields are its flags.

A command is a frozen dataclass with a method `run(line)`, where `line` is the command as it was typed; its docstring is
what `--help` says. What it needs is imported when it runs, so that `dsnet --help` stays quick.
"""

from .bench import Bench, Info
from .networks import Models
from .scaling import Scaling
from .support import Support
from .training import Compare, Eval, Train

COMMANDS = {
    "compare": Compare,
    "train": Train,
    "eval": Eval,
    "models": Models,
    "bench": Bench,
    "info": Info,
    "support": Support,
    "scaling": Scaling,
}

"""The commands of `dsnet`: one file a subject, one dataclass a command, whose fields are its flags.

A command is a frozen dataclass with a method `run(line)`, where `line` is the command as it was typed; its docstring is
what `--help` says. What it needs is imported when it runs, so that `dsnet --help` costs no more than importing the
package, which imports timm to register its networks.
"""

from .bench import Bench, Info
from .demo import Demo
from .detect import DetectCompare, DetectEval, DetectPredict, DetectTrain
from .explain import Cam, Shortcuts
from .export import Export
from .networks import Models
from .prune import Prune, Renorm
from .rerun import Rerun
from .scaling import Scaling
from .support import Support
from .sweep import Sweep
from .training import Compare, Eval, Train

# A command by its word; a word with commands of its own leads to a dictionary of them.
COMMANDS: dict[str, type | dict[str, type]] = {
    "compare": Compare,
    "train": Train,
    "eval": Eval,
    "sweep": Sweep,
    "rerun": Rerun,
    "models": Models,
    "prune": Prune,
    "renorm": Renorm,
    "export": Export,
    "bench": Bench,
    "info": Info,
    "cam": Cam,
    "shortcuts": Shortcuts,
    "demo": Demo,
    "support": Support,
    "scaling": Scaling,
    "detect": {"train": DetectTrain, "eval": DetectEval, "predict": DetectPredict, "compare": DetectCompare},
}

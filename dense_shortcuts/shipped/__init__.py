"""The small trained network that comes with the package: DSNet-20 on CIFAR-100, from the recipe `shipped`.

It is laid out as a run's folder is, so that whatever reads one reads it: `dsnet eval shipped`.
"""

from pathlib import Path

NAME = "shipped"  # what the commands take in place of a path


def folder() -> Path:
    """The network's folder, for `read_model`: weights, card and metrics; the files of its run lie in the one above."""
    return Path(__file__).parent / "stage-group"


def checkpoint(path: Path) -> Path:
    """A checkpoint's path; the name `shipped` stands for the network of the package, unless there is such a file."""
    return folder() if path == Path(NAME) and not path.exists() else path

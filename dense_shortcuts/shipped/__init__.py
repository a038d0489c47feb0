"""What comes with the package beside code: a small trained network, and images of Fashion-MNIST to train on.

The network is DSNet-20 on CIFAR-100, from the recipe `shipped`, laid out as a run's folder is, so that whatever reads
one reads it: `dsnet eval shipped`.
"""

from pathlib import Path

FASHION = Path(__file__).parent / "fashion"  # train.png and test.png, from scripts/embed_fashion.py
NAME = "shipped"  # what the commands take in place of a path


def folder() -> Path:
    """The network's folder, for `read_model`: weights, card and metrics; the files of its run lie in the one above."""
    return Path(__file__).parent / "stage-group"


def checkpoint(path: Path) -> Path:
    """A checkpoint's path; the name `shipped` stands for the network of the package, unless there is such a file."""
    return folder() if path == Path(NAME) and not path.exists() else path

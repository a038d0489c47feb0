"""Training: one configuration, one loop, one run folder. The command line is `dsnet` (`dense_shortcuts.cli`)."""

from .config import TrainConfig

__all__ = ["TrainConfig"]

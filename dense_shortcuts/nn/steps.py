"""One step of a pass over a dense stage: a block in a form that its host may call."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .features import StageState
from .residual_add import BlockContext

if TYPE_CHECKING:
    from .stage import DenseStage


class Step:
    """Block n in one pass over a stage: x -> its output, where `states[n]` is the state before it.

    Called again, as activation checkpointing does, it starts from the same state.
    """

    def __init__(self, stage: "DenseStage", n: int, context: BlockContext, states: list[StageState]) -> None:
        self.stage, self.n, self.context, self.states = stage, n, context, states

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, self.states[self.n + 1] = self.stage.step(self.context, x, self.states[self.n], *args, **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        """Always fails: a host that calls other methods of its block would bypass the shortcuts.

        Raises:
            AttributeError: always; `getattr` with a default returns the default.
        """
        raise AttributeError(
            f"the blocks of a dense stage can only be called, but the host reads {name}: unplug the network first."
        )

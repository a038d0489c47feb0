"""A block of a dense stage as something that its host may call, one step of one pass over the stage."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .features import StageState
from .residual_add import BlockContext

if TYPE_CHECKING:
    from .stage import DenseStage


class Step:
    """Block n in one pass over a stage: x -> its output, where `states[n]` is what the stage keeps before it.

    Run again, as a checkpoint does, it starts from the same state.
    """

    def __init__(self, stage: "DenseStage", n: int, context: BlockContext, states: list[StageState]) -> None:
        self.stage, self.n, self.context, self.states = stage, n, context, states

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, self.states[self.n + 1] = self.stage.step(self.context, x, self.states[self.n], *args, **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        """Never anything, for a host may use its block's own methods in place of a call, past the shortcuts.

        Raises:
            AttributeError: always; `getattr` with a default gives the default.
        """
        raise AttributeError(
            f"the blocks of a dense stage can only be called, and the host asks for {name}: unplug the network first."
        )

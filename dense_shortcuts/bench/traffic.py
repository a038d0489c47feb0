"""Feature maps that shortcuts read and write: the least that must move, from shapes, and what an operator run moves."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..adapters import read
from ..stage import DenseStage
from ..tiling import Tiling
from .public_form import PublicStage


class Traffic(NamedTuple):
    """Feature maps moved by the shortcuts of a stage, one unit a map read or written.

    pairs counts maps read as terms of sums, and partial sums written and read back; forward and backward count all.
    """

    pairs: int
    forward: int
    backward: int


def least_traffic(depth: int, tile: int | None = None) -> Traffic:
    """The feature maps that the shortcuts of one stage must move in a training step.

    Untiled, block l reads its branch and l earlier maps and writes its output: L(L+1)/2 pair reads. In groups of g
    blocks the maps before a group are read once for all of its g sums, which leaves g partial sums to write and to read
    back (`tiling.Tiling.traffic`).

    Backward, the gradient of X_i is pulled from the gradients of the later sums: the same pairs the other way round,
    and X_i read, its incoming gradient read and its gradient written, for X_0 .. X_L; the products <G_l, X_i> that give
    the weights' gradients come from the same reads. In tiles, which are cut from the last map on, X_i is read once more
    for the sums outside its own tile.

    Statistics are taken while a map is written. Partial sums count as maps of the same dtype.

    Args:
        depth: number of blocks L.
        tile: blocks g in a tile, or None for untiled.
    """
    tiling = Tiling(depth, depth if tile is None else tile)
    again = depth - min(tiling.size, depth)
    return Traffic(
        tiling.traffic, forward=tiling.traffic + 2 * depth, backward=tiling.traffic + again + 3 * (depth + 1)
    )


def best_tile(depth: int) -> int | None:
    """Blocks in a group as the package cuts a stage of this depth, or None where it does not."""
    size = Tiling.best(depth).size
    return size if size < depth else None


def host_traffic(depth: int, projection: bool) -> int:
    """Feature maps that a host moves for the shortcuts and activations of one stage in an eager training step.

    For each block the add in place takes 3, ReLU in place 2 and its gradient 3; the sum of a map's two gradients takes
    3, but X_0 has one gradient only where a projection makes it.
    """
    return 11 * depth - 3 * projection


class ShortcutBytes(NamedTuple):
    """Bytes of a training step's shortcuts: moved, the least (in tiles where they gain), the least untiled."""

    moved: int
    least: int
    untiled: int


def shortcut_bytes(network: nn.Module, host: nn.Module, step: Callable[[nn.Module], Any]) -> ShortcutBytes | None:
    """Bytes that a network's shortcuts move, forward and backward, activation included; None where it has none.

    What is moved is what the operators of a step read and write, less those of the same step of the host, plus the
    host's own shortcuts (`host_traffic`). An operator counts each of its tensors once, whatever it does inside.

    Args:
        network: a plugged network or a public form.
        host: the network that it was made from.
        step: forward and backward pass of a network, eager.
    """
    stages: list[Any] = [m for m in network.modules() if isinstance(m, DenseStage | PublicStage)]
    if not stages:
        return None
    sizes: dict[int, int] = {}  # of a map in bytes, by the stage's place
    hooks = [
        stage.register_forward_hook(lambda _, __, y, place=place: sizes.__setitem__(place, y.nbytes))
        for place, stage in enumerate(stages)
    ]
    try:
        moved = operators(lambda: step(network)).bytes - operators(lambda: step(host)).bytes
    finally:
        for hook in hooks:
            hook.remove()
    untiled = least = 0
    for place, stage in enumerate(stages):
        depth, size = len(stage), sizes[place]
        untiled += size * sum(least_traffic(depth)[1:])
        least += size * sum(least_traffic(depth, best_tile(depth))[1:])
        moved += size * host_traffic(depth, read(stage.blocks[0]).projects())
    return ShortcutBytes(moved, least, untiled)


class Operators(TorchDispatchMode):
    """Counts what a call asks PyTorch to run: operators, and the bytes of all tensors that they take and give.

    Views and empty tensors run nothing. What an operator calls inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if not function.is_view and not function.name().startswith(("aten::empty", "aten::new_empty")):
            self.calls += 1
            self.bytes += sum(map(_bytes, _tensors((args, kwargs, output))))
        return output


def operators(call: Callable[[], Any]) -> Operators:
    """The operators of an eager call."""
    with Operators() as counter:
        call()
    return counter


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(x: Tensor) -> int:
    """Bytes in memory: those of an expanded tensor are the ones that it stands on."""
    return min(x.nbytes, x.untyped_storage().nbytes())

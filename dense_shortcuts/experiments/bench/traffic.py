"""Feature maps that the ends of blocks read and write: the least that must move, and what an operator run moves.

Both are of one region: from the output of a branch's last convolution, and of the projection's, to the stage's maps
X_l. In it are the batch norms behind these convolutions, the shortcuts, the sum and the activation, for the operator
makes them one sum, and what it saves of one must not be credited to another.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...adapters import read
from ...nn.stage import DenseStage
from ...nn.tiling import Tiling
from .public_form import PublicStage


class Traffic(NamedTuple):
    """Feature maps moved by the ends of a stage's blocks, one unit a map read or written.

    pairs counts maps read as terms of sums, and partial sums written and read back; forward and backward count all.
    """

    pairs: int
    forward: int
    backward: int


def least_traffic(depth: int, tile: int | None = None, *, projection: bool = False, norms: bool = True) -> Traffic:
    """The feature maps that the ends of one stage's blocks must move in a training step.

    Forward, block l reads its branch and l earlier maps and writes its output: L(L+1)/2 pair reads and 2L. In groups of
    g blocks the maps before a group are read once for all of its g sums, which leaves g partial sums to write and to
    read back (`tiling.Tiling.traffic`). Statistics are taken while a map is written, by whatever writes it.

    Backward, the gradient of X_i is pulled from the gradients of the later sums: the same pairs the other way round,
    and X_i read, its incoming gradient read and its gradient written, for X_0 .. X_L; the products <G_l, X_i> that give
    the weights' gradients come from the same reads. X_0 has no incoming gradient where a projection makes it, for only
    shortcuts use it then. Through a batch norm the gradient of the branch is another one than that of its sum, and
    needs the branch: one more read and write a block. In tiles, which are cut from the last map on, X_i is read once
    more for the sums outside its own tile. Partial sums count as maps of the same dtype.

    Args:
        depth: number of blocks L.
        tile: blocks g in a tile, or None for untiled.
        projection: whether a projection makes X_0.
        norms: whether the branches end in batch norms.
    """
    tiling = Tiling(depth, depth if tile is None else tile)
    again = depth - min(tiling.size, depth)
    own = 3 * (depth + 1) - projection + 2 * depth * norms
    return Traffic(tiling.traffic, forward=tiling.traffic + 2 * depth, backward=tiling.traffic + again + own)


def best_tile(depth: int) -> int | None:
    """Blocks in a group as the package cuts a stage of this depth, or None where it does not."""
    size = Tiling.best(depth).size
    return size if size < depth else None


def host_traffic(depth: int, projection: bool, norms: int) -> tuple[int, int]:
    """Feature maps that a host moves in the same region of one stage in an eager step, forward and backward.

    For each block the add in place takes 3, ReLU in place 2 and its gradient 3; the sum of a map's two gradients takes
    3, but X_0 has one gradient only where a projection makes it. Each of the batch norms that end a branch or a
    projection, `norms` in number, takes 2 and its gradient 3.
    """
    return 5 * depth + 2 * norms, 6 * depth - 3 * projection + 3 * norms


class ShortcutBytes(NamedTuple):
    """Bytes of the ends of blocks in a step: moved, the least (in tiles where they gain), the least untiled."""

    moved: int
    least: int
    untiled: int


def shortcut_bytes(
    network: nn.Module, host: nn.Module, step: Callable[[nn.Module], Any], *, trains: bool = True
) -> ShortcutBytes:
    """Bytes that a network moves for shortcuts, sums, activations and the norms before them.

    What is moved is what the operators of a step read and write, less those of the same step of the host, plus what the
    host moves in the region itself (`host_traffic`). An operator counts each of its tensors once, whatever it does
    inside. Nothing moves less than `least`, which bounds the same region.

    Args:
        network: a plugged ResNet, or its public form.
        host: the network that it was made from.
        step: forward and backward pass of a network, eager, or the forward pass alone.
        trains: whether there is a backward pass.
    """
    stages: list[Any] = [m for m in network.modules() if isinstance(m, DenseStage | PublicStage)]
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
        blocks: list[Any] = list(stage.blocks)
        projection, ends = read(blocks[0]).projects(), sum(map(_ends_in_norm, blocks))
        known: dict[str, Any] = {"projection": projection, "norms": ends == depth}
        whole, tiled = least_traffic(depth, **known), least_traffic(depth, best_tile(depth), **known)
        untiled += size * (whole.forward + trains * whole.backward)
        least += size * (tiled.forward + trains * tiled.backward)
        forward, backward = host_traffic(depth, projection, ends + sum(map(_projects_by_norm, blocks)))
        moved += size * (forward + trains * backward)
    return ShortcutBytes(moved, least, untiled)


def _ends_in_norm(block: Any) -> bool:
    """Whether a batch norm follows the last convolution of a block's branch and ends it."""
    reading = read(block)
    end = reading.last_conv()
    followers = [norm for conv, norm in reading.conv_norms() if block.get_submodule(conv) is end]
    return any(type(block.get_submodule(norm)) is nn.BatchNorm2d for norm in followers)


def _projects_by_norm(block: Any) -> bool:
    layers = block.downsample if isinstance(getattr(block, "downsample", None), nn.Sequential) else []
    return len(layers) > 0 and type(layers[-1]) is nn.BatchNorm2d


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

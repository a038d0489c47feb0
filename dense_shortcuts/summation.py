"""The unified view: a convolution over a concatenation is a sum of convolutions, so a DenseNet is a dense summation.

W * [X_0; ..; X_{l-1}] = sum_{i<l} W_i * X_i, with W split along its input channels (Sec. 3 of the paper). Batch norm
and ReLU before the convolution act per channel and split the same way, so the concatenation is never needed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm.models.densenet
import torch
import torch.nn.functional as F
import torchvision.models.densenet
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import DenseShortcutError

HOSTS = (timm.models.densenet.DenseNet, torchvision.models.densenet.DenseNet)
_BLOCKS = (timm.models.densenet.DenseBlock, torchvision.models.densenet._DenseBlock)
_TRANSITIONS = (timm.models.densenet.DenseTransition, torchvision.models.densenet._Transition)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_POOLS = ("avg", "max", "avgmax")  # those whose result has one number per channel, in order


def sum_of_convolutions(conv: nn.Conv2d, maps: Sequence[Tensor]) -> Tensor:
    """conv(torch.cat(maps, 1)) as the equal sum of convolutions, without the concatenation.

    Args:
        conv: a convolution with one group.
        maps: (N, C_i, H, W) each; the C_i add up to the input channels.

    Returns:
        (N, C_out, H', W'), equal up to rounding, because terms are added in another order.

    Raises:
        DenseShortcutError: a grouped convolution, or maps with a wrong total number of channels.
    """
    if conv.groups != 1:
        raise DenseShortcutError(f"a convolution with {conv.groups} groups cannot be split: use one with groups=1.")
    return _sum(conv, maps, lambda x, cut: x, recompute=False)


def layer_of_sums(layer: nn.Module, maps: Sequence[Tensor], *, recompute: bool = False) -> Tensor:
    """The new map of a DenseNet layer from the list of all earlier maps, without their concatenation.

    Args:
        layer: a layer of timm's or torchvision's DenseNet, with norm1, conv1, norm2 and conv2.
        maps: (N, C_i, H, W) each, in the order in which the host concatenates them.
        recompute: whether to recompute the terms of the sum in the backward pass instead of keeping them.

    Returns:
        (N, growth, H, W), equal to the host's up to rounding. In training, running statistics are updated as in the
        host.
    """
    host: Any = layer
    hidden = _norm_act_conv(host.norm1, getattr(host, "relu1", None), host.conv1, maps, recompute)
    new = host.norm2(hidden)
    new = host.conv2(host.relu2(new) if hasattr(host, "relu2") else new)
    return F.dropout(new, host.drop_rate, layer.training) if host.drop_rate else new


def split(host: nn.Module, *, recompute: bool | None = None) -> "SplitDenseNet":
    """The same DenseNet as a dense summation, which trains and runs without ever concatenating feature maps.

    Args:
        host: a DenseNet of timm or torchvision. It stays unchanged, and shares every parameter and buffer with the
            result, under the same state-dict keys: training one trains the other.
        recompute: whether to recompute normalised maps in the backward pass instead of keeping them, so that memory
            grows linearly with depth; None means the host's own `memory_efficient`.

    Raises:
        DenseShortcutError: another network, or one with norms, convolutions or a pooling that cannot be split.
    """
    if not isinstance(host, HOSTS):
        raise DenseShortcutError(f"{type(host).__name__} is not a DenseNet of timm or torchvision: give one of those.")
    for name, module in host.features.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) and type(module) not in _NORMS:
            raise DenseShortcutError(
                f"features.{name} is {type(module).__name__}, which cannot be split: use BatchNorm2d."
            )
    pool: Any = getattr(host, "global_pool", None)
    if pool is not None and pool.pool_type not in _POOLS:
        raise DenseShortcutError(f"global_pool={pool.pool_type!r} cannot be split: choose one of {', '.join(_POOLS)}.")
    return SplitDenseNet(host, _recomputes(host) if recompute is None else recompute)


class SplitDenseNet(nn.Module):
    """A DenseNet that works on lists of maps. Made by `split`; its children are the host's."""

    def __init__(self, host: nn.Module, recompute: bool) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.recompute = recompute
        self.train(host.training)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The last feature maps, after norm and activation, (N, C_i, H', W') each, from images (N, 3, H, W)."""
        maps = [x]
        features: Any = self.features
        for module in features:
            maps = self._forward(module, maps)
        return [F.relu(x) for x in maps]

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (N, classes), from images (N, 3, H, W)."""
        pool: Any = getattr(self, "global_pool", partial(F.adaptive_avg_pool2d, output_size=1))
        x = torch.cat([pool(x).flatten(1) for x in self.forward_maps(x)], 1)  # one number per channel, not feature maps
        head: Any = self
        return head.classifier(head.head_drop(x) if hasattr(self, "head_drop") else x)

    def _forward(self, module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
        """The output of a child of `features` for a list of maps."""
        if isinstance(module, _BLOCKS):
            for layer in module.values():
                maps = [*maps, layer_of_sums(layer, maps, recompute=self.recompute)]
            return maps
        if isinstance(module, _TRANSITIONS):
            host: Any = module
            summed = _norm_act_conv(host.norm, getattr(host, "relu", None), host.conv, maps, self.recompute)
            return [host.pool(summed)]
        if len(maps) > 1:  # the norm after the last block
            part = _CutNorm(module)
            return [part(x, cut) for x, cut in zip(maps, _slices([x.shape[1] for x in maps]), strict=True)]
        return [module(maps[0])]

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


def _recomputes(host: nn.Module) -> bool:
    """Whether the host recomputes its concatenations: torchvision's `memory_efficient`, timm's `grad_checkpointing`."""
    layers = [layer for block in host.modules() if isinstance(block, _BLOCKS) for layer in block.values()]
    return any(getattr(layer, "memory_efficient", getattr(layer, "grad_checkpointing", False)) for layer in layers)


def _norm_act_conv(
    norm: nn.Module, act: nn.Module | None, conv: nn.Conv2d, maps: Sequence[Tensor], recompute: bool
) -> Tensor:
    """conv(act(norm(torch.cat(maps, 1)))) as a sum over the maps."""
    part = _CutNorm(norm, act)
    total = _sum(conv, maps, part, recompute and torch.is_grad_enabled())
    part.step = 0.0
    return total


def _sum(conv: nn.Conv2d, maps: Sequence[Tensor], part: Callable[[Tensor, slice], Tensor], recompute: bool) -> Tensor:
    """sum_i W_i * part(maps[i]), plus the bias."""
    widths = [x.shape[1] for x in maps]
    if sum(widths) != conv.in_channels:
        raise DenseShortcutError(
            f"the maps have {sum(widths)} channels and the convolution takes {conv.in_channels}: give all of them."
        )

    def term(x: Tensor, cut: slice) -> Tensor:
        bias = conv.bias if cut.start == 0 else None
        return conv._conv_forward(part(x, cut), conv.weight[:, cut], bias)

    total = None
    for x, cut in zip(maps, _slices(widths), strict=True):
        y = checkpoint(term, x, cut, use_reentrant=False) if recompute else term(x, cut)
        total = y if total is None else total.add_(y)  # in place: the backward pass of a sum needs none of its terms
    assert total is not None
    return total


class _CutNorm:
    """A batch norm over a concatenation, and the activation after it, for one map at a time.

    Both act per channel, so they split as the maps do. A batch updates the running statistics once: not again when the
    backward pass recomputes the maps.
    """

    def __init__(self, norm: Any, act: nn.Module | None = None) -> None:
        self.norm = norm
        inner = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]  # of timm's BatchNormAct2d
        self.after = [*inner, *([act] if act is not None else [])]
        self.step: float = 0.0 if self.norm.momentum is None else self.norm.momentum
        if self.norm.training and self.norm.track_running_stats:
            self.norm.num_batches_tracked.add_(1)
            if self.norm.momentum is None:  # the cumulative average, as in PyTorch
                self.step = 1.0 / float(self.norm.num_batches_tracked)

    def __call__(self, x: Tensor, cut: slice) -> Tensor:
        """The normalised map for the channels `cut` of the concatenation, (N, C_i, H, W)."""
        norm = self.norm
        buffers = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, var, weight, bias = (t if t is None else t[cut] for t in buffers)
        x = F.batch_norm(x, mean, var, weight, bias, norm.training or mean is None, self.step, norm.eps)
        for module in self.after:
            x = module(x)
        return x


def _slices(widths: Sequence[int]) -> Iterator[slice]:
    """The slice of each of these widths in their concatenation."""
    for start, end in itertools.pairwise([0, *itertools.accumulate(widths)]):
        yield slice(start, end)

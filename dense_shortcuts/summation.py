"""The unified view: a convolution over a concatenation is a sum of convolutions, so a DenseNet is a dense summation.

W * [X_0; ..; X_{l-1}] = sum_{i<l} W_i * X_i, with W cut along its input channels (Sec. 3 of the paper). Batch norm and
ReLU in front of the convolution go by the channel and cut the same way, so the concatenation is never needed.
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
_POOLS = ("avg", "max", "avgmax")  # those whose result has one number a channel, in the channels' order


def sum_of_convolutions(conv: nn.Conv2d, maps: Sequence[Tensor]) -> Tensor:
    """conv(torch.cat(maps, 1)) as the equal sum of convolutions, without the concatenation.

    Args:
        conv: a convolution with one group.
        maps: (N, C_i, H, W) each; the C_i add up to the input channels.

    Returns:
        (N, C_out, H', W'), the same to rounding, since the terms are added in another order.

    Raises:
        DenseShortcutError: a grouped convolution, or maps whose channels do not add up.
    """
    if conv.groups != 1:
        raise DenseShortcutError(f"a convolution with {conv.groups} groups mixes no maps: cut one with groups=1.")
    return _sum(conv, maps, lambda x, cut: x, recompute=False)


def layer_of_sums(layer: nn.Module, maps: Sequence[Tensor], *, recompute: bool = False) -> Tensor:
    """A DenseNet layer's new maps from the list of all earlier ones, without their concatenation.

    Args:
        layer: a layer of timm's or torchvision's DenseNet, with norm1, conv1, norm2 and conv2.
        maps: (N, C_i, H, W) each, in the order in which the host concatenates them.
        recompute: keep nothing of a pair (layer, map) for the backward pass but its sources, and form it again there.

    Returns:
        (N, growth, H, W), equal to the host's to rounding. In training the running statistics move as the host's do.
    """
    host: Any = layer
    hidden = _norm_act_conv(host.norm1, getattr(host, "relu1", None), host.conv1, maps, recompute)
    new = host.norm2(hidden)
    new = host.conv2(host.relu2(new) if hasattr(host, "relu2") else new)
    return F.dropout(new, host.drop_rate, layer.training) if host.drop_rate else new


def split(host: nn.Module, *, recompute: bool | None = None) -> "SplitDenseNet":
    """The same DenseNet as a dense summation: trains and runs without ever building a concatenation of feature maps.

    Args:
        host: a DenseNet of timm or torchvision. It is left as it is and shares every parameter and buffer with the
            result, under the same state-dict keys: what trains one has trained the other.
        recompute: form normalised maps again in the backward pass instead of keeping them, which makes memory grow
            linearly with depth; None takes the host's own `memory_efficient`.

    Raises:
        DenseShortcutError: another network, or one with norms, convolutions or a pooling that do not cut.
    """
    if not isinstance(host, HOSTS):
        raise DenseShortcutError(f"{type(host).__name__} is no DenseNet of timm or torchvision: give one of those.")
    for name, module in host.features.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) and type(module) not in _NORMS:
            raise DenseShortcutError(
                f"features.{name} is {type(module).__name__}, which does not cut: use BatchNorm2d."
            )
    pool: Any = getattr(host, "global_pool", None)
    if pool is not None and pool.pool_type not in _POOLS:
        raise DenseShortcutError(f"global_pool={pool.pool_type!r} does not cut: take one of {', '.join(_POOLS)}.")
    return SplitDenseNet(host, _recomputes(host) if recompute is None else recompute)


class SplitDenseNet(nn.Module):
    """A DenseNet that passes lists of maps along. Made by `split`; its children are the host's own."""

    def __init__(self, host: nn.Module, recompute: bool) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.recompute = recompute
        self.train(host.training)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The last feature maps behind norm and activation, (N, C_i, H', W') each, from images (N, 3, H, W)."""
        maps = [x]
        features: Any = self.features
        for module in features:
            maps = self._forward(module, maps)
        return [F.relu(x) for x in maps]

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (N, classes), from images (N, 3, H, W)."""
        pool: Any = getattr(self, "global_pool", partial(F.adaptive_avg_pool2d, output_size=1))
        x = torch.cat([pool(x).flatten(1) for x in self.forward_maps(x)], 1)  # a number a channel: no feature map
        head: Any = self
        return head.classifier(head.head_drop(x) if hasattr(self, "head_drop") else x)

    def _forward(self, module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
        """What a child of `features` makes of a list of maps."""
        if isinstance(module, _BLOCKS):
            for layer in module.values():
                maps = [*maps, layer_of_sums(layer, maps, recompute=self.recompute)]
            return maps
        if isinstance(module, _TRANSITIONS):
            host: Any = module
            summed = _norm_act_conv(host.norm, getattr(host, "relu", None), host.conv, maps, self.recompute)
            return [host.pool(summed)]
        if len(maps) > 1:  # the norm behind the last block
            part = _CutNorm(module)
            return [part(x, cut) for x, cut in zip(maps, _slices([x.shape[1] for x in maps]), strict=True)]
        return [module(maps[0])]

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


def _recomputes(host: nn.Module) -> bool:
    """Whether the host recomputes its concatenations, as torchvision and timm call it."""
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
        total = y if total is None else total.add_(y)  # in place: a sum keeps none of its terms for the backward pass
    assert total is not None
    return total


class _CutNorm:
    """A batch norm over a concatenation, and the activation behind it, for one map at a time.

    Both go by the channel, so they cut as the maps do. A batch moves the running statistics once: not again where a
    backward pass forms the maps a second time.
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
    """Where each of some widths lies when they stand side by side."""
    for start, end in itertools.pairwise([0, *itertools.accumulate(widths)]):
        yield slice(start, end)

"""Folding for inference: norms that scale and shift by constants are merged into the convolutions before them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..adapters import read
from ..adapters.tracing.traced import Reading
from ..errors import DenseShortcutError
from ..nn.affine_form import has_affine_form, uses_running_stats
from ..nn.connectivity import Segment
from ..nn.shortcut import DenseShortcut
from ..nn.stage import DenseStage
from ..ops.affine import affine_from_running
from ..surgery.plug import dense_stages
from .conv_bn import Seen, is_bare, watch


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a plugged network for inference only, with the same output up to rounding and fewer passes over memory.

    Batch norms that directly take a convolution's output are folded into its weights (`conv_bn.py`): in the branches,
    the projection shortcuts, and the rest of the network as far as torch.fx can trace it. Modules that have hooks or
    parametrizations, are shared or are used twice stay as they are. Batch norms of the dense shortcuts are folded too:
    their scale into the shortcut's weights, and their shift into the bias of the branch's last convolution, if a branch
    ends in one. Group, layer and instance norm depend on the image and stay as they are.

    Args:
        model: a network that `plug_in` changed. It is left as it is.

    Returns:
        the copy, in evaluation mode, with gradients off for all parameters. It cannot be unplugged.

    Raises:
        DenseShortcutError: the network is not plugged in, or is fused already.
    """
    if not dense_stages(model):
        raise DenseShortcutError("the network is not plugged in: call dense_shortcuts.plug_in(model) before fuse.")
    if is_fused(model):
        raise DenseShortcutError("the network is fused already: fuse the one it was made from.")
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    seen = watch(fused)
    for conv, norm in seen.pairs:
        _fold(fused, conv, norm, seen)
    for stage in dense_stages(fused).values():
        for segment in stage.segments:
            for block in stage.blocks[segment.first : segment.stop]:
                _trace_anew(block)
            _fold_shortcut(stage, segment, seen)
        stage.fused = True
    return fused


def is_fused(model: nn.Module) -> bool:
    """Whether a network is a result of `fuse`."""
    return any(stage.fused for stage in dense_stages(model).values())


def _trace_anew(block: Any) -> None:
    """Trace a traced block again after its layers were replaced; under a compiler this would be too late."""
    reading: Any = read(block)
    if isinstance(reading, Reading):
        traced = reading.traced
        dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), traced.layout.dtype)
        traced.layout = traced.layout._replace(dtype=dtype)  # which may have changed since the block was plugged in
        reading.conv_norms()


def _fold(model: nn.Module, conv: str, norm: str, seen: Seen) -> None:
    """Fold a batch norm into the convolution that it follows, if nothing else uses either."""
    before, after = model.get_submodule(conv), model.get_submodule(norm)
    if type(before) is not nn.Conv2d or type(after) is not nn.BatchNorm2d or not uses_running_stats(after):
        return
    if before.training or not (seen.is_own(before) and seen.is_own(after)):
        return
    folded = fuse_conv_bn_eval(before, after).requires_grad_(False)
    seen.replace(before, folded)
    model.set_submodule(conv, folded)
    model.set_submodule(norm, nn.Identity())


@torch.no_grad()
def _fold_shortcut(stage: DenseStage, segment: Segment, seen: Seen) -> None:
    """Fold scales of batch norms into the shortcut's weights, shifts into the bias of the branch's last convolution."""
    shortcut = stage.shortcuts[segment]
    if type(shortcut) is not DenseShortcut or not shortcut.normalised or stage.aggregate == "block":
        return
    if shortcut.weighting == "attention":  # its weights depend on the image
        return
    norms = {i: norm for maps in shortcut.sources for i in maps if (norm := shortcut.norm(i)) is not None}
    known = [has_affine_form(norm) and uses_running_stats(norm) and is_bare(norm) for norm in norms.values()]
    blocks = stage.blocks[segment.first : segment.stop]
    summing = shortcut.summing
    ends = [_end(blocks[k], seen) for k in summing]
    if not all(known) or (shortcut.center and None in ends):
        return
    folded = []
    for k, end in zip(summing, ends, strict=True):
        weight = shortcut.weight(k)
        affine = [_running_form(norms[i]) for i in shortcut.sources[k]]
        scales, shifts = (torch.cat(parts) for parts in zip(*affine, strict=True))
        if shortcut.center:  # otherwise all shifts are zero
            end.bias.add_((weight * shifts).sum(0))
        folded.append(nn.Parameter(weight * scales, requires_grad=False))
    shortcut.weights, shortcut.weighting = nn.ParameterList(folded), "channel"
    shortcut.norms = nn.ModuleList()


def _running_form(norm: Any) -> tuple[Tensor, Tensor]:
    return affine_from_running(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)


def _end(block: Any, seen: Seen) -> Any:
    """The convolution with a bias that ends a block's branch and has no other use; None if there is none."""
    reading = read(block)
    end = reading.last_conv()
    if type(end) is not nn.Conv2d or end.bias is None or not seen.is_own(end):
        return None
    if isinstance(reading, Reading):
        norms = [parts.norm for (training, _), parts in reading.traced.parts.items() if not training]
        return end if not any(norms) else None
    behind = [block.get_submodule(norm) for conv, norm in reading.conv_norms() if block.get_submodule(conv) is end]
    return end if all(type(norm) is nn.Identity and is_bare(norm) for norm in behind) else None

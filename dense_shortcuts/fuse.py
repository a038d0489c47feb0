"""Folding for inference: norms that only scale and shift by constants go into the convolutions before them."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .adapters import read
from .errors import DenseShortcutError
from .norms import is_batch_norm, running_form
from .plug import dense_stages
from .stage import DenseStage, Row


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a plugged network for inference alone, with the same output to rounding and fewer passes over memory.

    Batch norms behind a convolution, in the branches, the projection shortcuts and the stem, go into its weights. So do
    batch norms of the dense shortcuts: their scale goes into the shortcut's weights and their shift into the bias of
    the branch's last convolution, where a branch ends in one. Group, layer and instance norm depend on the image and
    stay as they are.

    Args:
        model: a network that `plug_in` changed. It is left as it is.

    Returns:
        the copy, in evaluation mode, whose parameters ask for no gradient. It cannot be unplugged.

    Raises:
        DenseShortcutError: the network is not plugged in, or is fused already.
    """
    if not dense_stages(model):
        raise DenseShortcutError("the network is not plugged in: call dense_shortcuts.plug_in(model) before fuse.")
    if is_fused(model):
        raise DenseShortcutError("the network is fused already: fuse the one it was made from.")
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    stages = dense_stages(fused).values()
    for stage in stages:
        for row in stage.rows:
            for block in stage.blocks[row.first : row.stop]:
                for conv, norm in read(block).conv_norms():
                    _fold(block, conv, norm)
                read(block).conv_norms()  # a traced block is traced anew here, for no compiler could do so later
            _fold_shortcut(stage, row)
        stage.fused = True
    _fold_sequences(fused)
    if _is_stem(fused):
        _fold(fused, "conv1", "bn1")
    return fused


def is_fused(model: nn.Module) -> bool:
    """Whether a network came out of `fuse`."""
    return any(stage.fused for stage in dense_stages(model).values())


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    """Fold a batch norm, by its name below `parent`, into the convolution before it, if they are such a pair."""
    before, after = parent.get_submodule(conv), parent.get_submodule(norm)
    if type(before) is not nn.Conv2d or type(after) is not nn.BatchNorm2d or after.running_mean is None:
        return
    parent.set_submodule(conv, fuse_conv_bn_eval(before, after).requires_grad_(False))
    parent.set_submodule(norm, nn.Identity())


def _fold_sequences(model: nn.Module) -> None:
    """Every convolution that a batch norm follows in an nn.Sequential, as in projection shortcuts and deep stems."""
    for module in model.modules():
        if type(module) is nn.Sequential:
            names = list(module._modules)
            for conv, norm in pairwise(names):
                _fold(module, conv, norm)


def _is_stem(model: nn.Module) -> bool:
    """Whether the network begins as timm's and torchvision's ResNet do: conv1, then bn1."""
    names = [name for name, _ in model.named_children()]
    return names[:2] == ["conv1", "bn1"]


@torch.no_grad()
def _fold_shortcut(stage: DenseStage, row: Row) -> None:
    """Scales of batch norms into the shortcut's weights, shifts into the bias of the branch's last convolution."""
    shortcut = stage.shortcuts[row]
    if not len(shortcut.norms) or not is_batch_norm(shortcut.norms[0]) or stage.aggregate == "block":
        return
    if shortcut.weighting == "attention":  # its weights are no constants
        return
    blocks = [read(block) for block in stage.blocks[row.first : row.stop]]
    summing = [k for k, maps in enumerate(shortcut.sources) if maps]
    ends = [blocks[k].last_conv() for k in summing]
    if any(end is None or end.bias is None for end in ends):
        return
    norms = {i: norm for maps in shortcut.sources for i in maps if (norm := shortcut.norm(i)) is not None}
    forms = {i: running_form(norm, shortcut.weights[0], "plain") for i, norm in norms.items()}
    folded = []
    for k, end in zip(summing, ends, strict=True):
        rates, shifts = (torch.cat([forms[i][part] for i in shortcut.sources[k]]) for part in (0, 1))
        weight = shortcut.weight(k)
        end.bias.add_((weight * shifts).sum(0))
        folded.append(nn.Parameter(weight * rates, requires_grad=False))
    shortcut.weights, shortcut.weighting = nn.ParameterList(folded), "channel"
    shortcut.norms = nn.ModuleList()

"""The equations of the dense shortcut as plain loops over a host's own blocks; imports nothing from the library.

Symbols are those of the paper (arXiv:2010.12496) and of docs/paper-map.md: F_l is block l's residual branch up to and
including its last norm, s the activation after the add, X_0 the stage's input after its projection shortcut, N a norm
without affine parameters, w and v the learned per-channel weights. Everything is differentiable and runs in the dtype
of its inputs; the tests use float64.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerSampleNorm(nn.Module):
    """Layer norm of one sample over (C, H, W), written with PyTorch's layer_norm and not as a one-group group norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


def default_groups(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32 and leaves four channels a group or more."""
    best = 1
    for g in range(1, channels + 1):
        if channels % g == 0 and g <= 32 and g <= channels // 4:
            best = g
    return best


def real_norm(norm: str | None, channels: int, groups: int | None = None) -> nn.Module:
    """PyTorch's own module for N, float64."""
    if norm is None:
        return nn.Identity()
    if norm == "group":
        return nn.GroupNorm(groups or default_groups(channels), channels, affine=False).double()
    if norm == "batch":
        return nn.BatchNorm2d(channels, affine=False).double()
    if norm == "layer":
        return PerSampleNorm()
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=False).double()
    raise AssertionError(norm)


def column(weight: Tensor) -> Tensor:
    """One number per channel, (C,), as (1, C, 1, 1)."""
    return weight.reshape(1, -1, 1, 1)


def last_steps(block: nn.Module, x: Tensor) -> Tensor:
    """Attention and drop path, which timm's blocks have and torchvision's have not."""
    if getattr(block, "se", None) is not None:
        x = block.se(x)
    if getattr(block, "drop_path", None) is not None:
        x = block.drop_path(x)
    return x


def act(block: nn.Module, position: int, x: Tensor) -> Tensor:
    """The block's activation number `position` on a copy, so that nothing is written in place."""
    module = getattr(block, f"act{position}", None) or block.relu
    return module(x.clone())


def optional(block: nn.Module, name: str, x: Tensor) -> Tensor:
    module = getattr(block, name, None)
    return x if module is None else module(x)


def basic_branch(block: nn.Module, x: Tensor) -> Tensor:
    """F of a basic block (two 3x3)."""
    h = block.bn1(block.conv1(x))
    h = optional(block, "drop_block", h)
    h = act(block, 1, h)
    h = optional(block, "aa", h)
    return last_steps(block, block.bn2(block.conv2(h)))


def bottleneck_branch(block: nn.Module, x: Tensor, v: Tensor | None, inner_norm: nn.Module | None) -> Tensor:
    """F of a bottleneck; with v, H_2 = s(bn2(conv2(H_1)) + v * N(H_1))."""
    h1 = act(block, 1, block.bn1(block.conv1(x)))
    h2 = block.bn2(block.conv2(h1))
    if v is not None:
        h2 = h2 + column(v) * inner_norm(h1)
    h2 = optional(block, "drop_block", h2)
    h2 = act(block, 2, h2)
    h2 = optional(block, "aa", h2)
    return last_steps(block, block.bn3(block.conv3(h2)))


def bottle2neck_branch(block: nn.Module, x: Tensor, v: Tensor | None, inner_norm: nn.Module | None) -> Tensor:
    """F of Res2Net's block; with v, 3x3 piece j gains v[j] * N(H_1)[j], the pass-through piece stays."""
    h1 = act(block, 1, block.bn1(block.conv1(x)))
    normed = inner_norm(h1) if v is not None else None
    first = block.convs[0].stride != (1, 1) or block.downsample is not None
    done: list[Tensor] = []
    for j in range(len(block.convs)):
        channels = slice(j * block.width, (j + 1) * block.width)
        piece = h1[:, channels]
        if j > 0 and not first:
            piece = done[-1] + piece
        piece = block.bns[j](block.convs[j](piece))
        if v is not None:
            piece = piece + column(v[channels]) * normed[:, channels]
        done.append(act(block, 2, piece))
    if block.scale > 1:
        through = h1[:, (block.scale - 1) * block.width :]
        done.append(block.pool(through) if first else through)
    h2 = block.drop_block(torch.cat(done, dim=1))
    return last_steps(block, block.bn3(block.conv3(h2)))


def branch(block: nn.Module, x: Tensor, v: Tensor | None = None, inner_norm: nn.Module | None = None) -> Tensor:
    """F_l(x) for a basic block, bottleneck or Res2Net block of timm or torchvision."""
    if hasattr(block, "convs"):
        return bottle2neck_branch(block, x, v, inner_norm)
    if hasattr(block, "conv3"):
        return bottleneck_branch(block, x, v, inner_norm)
    assert v is None
    return basic_branch(block, x)


def keeps_shape(block: nn.Module) -> bool:
    """Whether DS2 applies: the block has a bottleneck whose 3x3 keeps the shape of H_1."""
    if hasattr(block, "convs"):
        return block.convs[0].stride == (1, 1)
    if hasattr(block, "conv3"):
        return block.conv2.stride == (1, 1) and block.conv2.in_channels == block.conv2.out_channels
    return False


def hidden_width(block: nn.Module) -> int:
    return block.conv1.out_channels


def stage_maps(
    blocks: Sequence[nn.Module],
    x_in: Tensor,
    w: Sequence[Tensor] | None,
    norms: Sequence[Callable[[Tensor], Tensor]],
    *,
    aggregate: str = "stage",
    keep_identity: bool = False,
    v: Sequence[Tensor | None] | None = None,
    inner_norms: Sequence[nn.Module | None] | None = None,
) -> list[Tensor]:
    """[X_0, X_1, .., X_L] of a stage.

    Args:
        blocks: the host's blocks 1..L.
        x_in: the stage's input, (N, C_in, H, W).
        w: w[l - 1] is (l, C), row i is w_{l,i}; None for the dense identity.
        norms: norms[i] is N for map i; each is called once, since N(X_i) does not depend on l.
        aggregate: "stage" sums X_i, "block" sums F_i(X_{i-1}) for i >= 1, "dense_identity" sums X_i as they are.
        v, inner_norms: for DS2, one entry a block, None where DS2 does not apply.
    """
    maps: list[Tensor] = []
    normed: list[Tensor] = []
    for k in range(len(blocks)):
        block = blocks[k]
        x = x_in if k == 0 else maps[-1]
        f = branch(block, x, None if v is None else v[k], None if inner_norms is None else inner_norms[k])
        if k == 0:
            maps.append(x_in if block.downsample is None else block.downsample(x_in))
            normed.append(norms[0](maps[0]))

        y = f
        if keep_identity:
            y = y + maps[-1]
        for i in range(k + 1):
            y = y + (maps[i] if aggregate == "dense_identity" else column(w[k][i]) * normed[i])

        maps.append(act(block, 3 if hasattr(block, "conv3") else 2, y))
        if k + 1 < len(blocks) and aggregate != "dense_identity":
            normed.append(norms[k + 1](f if aggregate == "block" else maps[-1]))
    return maps


def host_maps(blocks: Sequence[nn.Module], x_in: Tensor) -> list[Tensor]:
    """[X_0, .., X_L] of the identity ResNet: X_l = s(F_l(X_{l-1}) + X_{l-1})."""
    maps = [x_in if blocks[0].downsample is None else blocks[0].downsample(x_in)]
    x = x_in
    for block in blocks:
        y = branch(block, x) + maps[-1]
        maps.append(act(block, 3 if hasattr(block, "conv3") else 2, y))
        x = maps[-1]
    return maps

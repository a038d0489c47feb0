"""The dense shortcut of a stage: one norm for each earlier feature map, one weight per channel for each pair of blocks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import DenseShortcutError
from .norms import Norm, affine_form, has_affine_form, make_norm
from .ops import dense_sum

INITS = ("nearest", "uniform", "ones", "zeros")


class Term(NamedTuple):
    """An earlier feature map as the later sums use it: N(X) = scale * map + shift, the statistics taken once.

    map is (N, C, H, W); scale and shift are (1 or N, C), or None where the map is used as it stands.
    """

    map: Tensor
    scale: Tensor | None
    shift: Tensor | None


def start_weight(init: str, maps: int, channels: int) -> Tensor:
    """w_{l,0} .. w_{l,l-1} at the start, (maps, channels).

    Raises:
        DenseShortcutError: unknown name.
    """
    weight = torch.zeros(maps, channels)
    if init == "nearest":
        weight[-1] = 1.0
    elif init == "uniform":
        weight.fill_(1.0 / maps)
    elif init == "ones":
        weight.fill_(1.0)
    elif init != "zeros":
        raise DenseShortcutError(f"unknown init {init!r}: choose one of {', '.join(INITS)}.")
    return weight


def normalised(norm: nn.Module | None, x: Tensor) -> Term:
    """N(x) as a Term: by its statistics where they are known, else by calling the norm."""
    if norm is None:
        return Term(x, None, None)
    if has_affine_form(norm):
        return Term(x, *affine_form(norm, x))
    return Term(norm(x), None, None)


class DenseShortcut(nn.Module):
    """sum_{i<l} w_{l,i} * N(X_i) for every block l of a stage (Sec. 3 of the paper; `docs/paper-map.md`).

    Args:
        depth: number of blocks L in the stage.
        channels: width C of its feature maps.
        norm, groups: N, see `make_norm`.
        init: start of the weights, see `start_weight`.
        weighted: False leaves norm and weight out: the plain sum of the dense identity control.

    Attributes:
        weights: L parameters; the one at k belongs to block l = k + 1 and has shape (l, C), row i for X_i.
        norms: one norm for each of X_0 .. X_{L-1}.
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        *,
        norm: Norm = "group",
        groups: int | None = None,
        init: str = "nearest",
        weighted: bool = True,
    ) -> None:
        super().__init__()
        self.depth, self.channels, self.init, self.weighted = depth, channels, init, weighted
        starts = [start_weight(init, k + 1, channels) for k in range(depth)] if weighted else []
        self.weights = nn.ParameterList([nn.Parameter(w) for w in starts])
        norms = [make_norm(norm, channels, groups) for _ in range(depth)] if weighted else []
        self.norms = nn.ModuleList([n for n in norms if n is not None])

    @property
    def pairs(self) -> int:
        """Number of pairs (l, i), L(L+1)/2."""
        return self.depth * (self.depth + 1) // 2

    def term(self, i: int, x: Tensor) -> Term:
        """X_i, (N, C, H, W), with the statistics of its norm."""
        return normalised(self.norms[i] if len(self.norms) else None, x)

    def forward(self, k: int, branch: Tensor, terms: tuple[Term, ...]) -> Tensor:
        """branch + sum_i w_{l,i} * N(X_i) for block l = k + 1, before the activation.

        Args:
            k: position of the block in its stage, from 0.
            branch: residual branch, (N, C, H, W).
            terms: the k + 1 earlier maps.
        """
        maps = [t.map for t in terms]
        if not self.weighted:
            return dense_sum(branch, maps, None, None)
        return weighted_sum(branch, terms, self.weights[k])

    def extra_repr(self) -> str:
        return f"depth={self.depth}, channels={self.channels}, pairs={self.pairs}, init={self.init!r}"


def weighted_sum(branch: Tensor, terms: tuple[Term, ...], weight: Tensor) -> Tensor:
    """branch + sum_i weight[i] * N(X_i), with a = w * scale and b = sum_i w_i * shift_i; weight is (maps, C)."""
    maps = [t.map for t in terms]
    scales = [t.scale for t in terms if t.scale is not None]
    shifts = [t.shift for t in terms if t.shift is not None]
    if not scales:
        return dense_sum(branch, maps, weight[:, None], None)
    weight = weight[:, None]
    return dense_sum(branch, maps, weight * torch.stack(scales), (weight * torch.stack(shifts)).sum(0))


class InnerShortcut(nn.Module):
    """v * N(H_1), added to the branch inside a bottleneck before its second activation (DS2).

    Args:
        channels: width of H_1.
        weighted: how many of its first channels pass a 3x3 and get a weight (all but Res2Net's last piece).
        norm, groups: N, see `make_norm`.

    Attributes:
        weight: v, (weighted,). It starts at 0, where DS2 equals DS.
    """

    def __init__(self, channels: int, weighted: int, *, norm: Norm = "group", groups: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weighted))
        self.norm = make_norm(norm, channels, groups)

    def term(self, hidden: Tensor) -> Term:
        """H_1, (N, channels, H, W), with the statistics of its norm."""
        return normalised(self.norm, hidden)

    def forward(self, branch: Tensor, term: Term, start: int = 0) -> Tensor:
        """branch + v * N(H_1) for the channels from `start` on that the branch, (N, C, H, W), stands for."""
        part = slice(start, start + branch.shape[1])
        term = Term(*(t if t is None else t[:, part] for t in term))
        return weighted_sum(branch, (term,), self.weight[None, part])

"""The dense shortcut of a stage: one norm for each earlier feature map, one weight per channel for each pair."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .errors import DenseShortcutError
from .norms import Norm, affine_form, has_affine_form, is_batch_norm, make_norm, uses_running_statistics

INITS = ("nearest", "uniform", "ones", "zeros")


class Term(NamedTuple):
    """An earlier feature map as the later sums use it: N(X) = scale * map + shift, the statistics taken once.

    map is (N, C, H, W); scale and shift are (1 or N, C), or None where the map is used as it stands. links are those of
    the fused operator, two tensors for each later sum in turn (`ops/fused.py`); none on the plain path.
    """

    map: Tensor
    scale: Tensor | None
    shift: Tensor | None
    links: tuple[Tensor, ...] = ()


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


class DenseShortcut(nn.Module):
    """sum_{i<l} w_{l,i} * N(X_i) for every block l of a stage (Sec. 3 of the paper; `docs/paper-map.md`).

    Args:
        depth: number of blocks L in the stage.
        channels: width C of its feature maps.
        norm, groups: N, see `make_norm`.
        init: start of the weights, see `start_weight`.
        weighted: False leaves norm and weight out: the plain sum of the dense identity control.
        backend: form of the operator, see `ops.choose`.

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.depth, self.channels, self.init = depth, channels, init
        self.weighted, self.backend = weighted, backend
        starts = [start_weight(init, k + 1, channels) for k in range(depth)] if weighted else []
        self.weights = nn.ParameterList([nn.Parameter(w) for w in starts])
        norms = [make_norm(norm, channels, groups) for _ in range(depth)] if weighted else []
        self.norms = nn.ModuleList([n for n in norms if n is not None])

    @property
    def pairs(self) -> int:
        """Number of pairs (l, i), L(L+1)/2."""
        return self.depth * (self.depth + 1) // 2

    def enter(self, i: int, x: Tensor) -> Term:
        """X_i, (N, C, H, W), as a map that no sum of this shortcut made."""
        return enter(self._norm(i), x, later=self.depth - i, backend=ops.choose(x, self.backend))

    def forward(
        self, k: int, branch: Tensor, terms: Sequence[Term], relu: bool = False, finish: bool = False
    ) -> tuple[Tensor, Term | None]:
        """branch + sum_i w_{l,i} * N(X_i) for block l = k + 1.

        Args:
            k: position of the block in its stage, from 0.
            branch: residual branch, (N, C, H, W).
            terms: the k + 1 earlier maps.
            relu: whether to apply the activation, ReLU, in the same pass.
            finish: whether the result is X_l itself, whose statistics may then be taken in the same pass.

        Returns:
            the sum, (N, C, H, W), and its Term where `finish` was made use of; else it takes `enter`.
        """
        norm = self._norm(k + 1) if finish else None
        one_pass = finish and (norm is None or has_affine_form(norm))
        joined = weighted_sum(
            branch,
            [t._replace(links=t.links[2 * (k - i) : 2 * (k - i) + 2]) for i, t in enumerate(terms)],
            self.weights[k] if self.weighted else None,
            relu=relu,
            statistics=one_pass and needs_moments(norm),
            later=self.depth - 1 - k if one_pass else 0,
            backend=ops.choose(branch, self.backend),
        )
        return joined.map, as_term(norm, joined) if one_pass else None

    def _norm(self, i: int) -> nn.Module | None:
        return self.norms[i] if len(self.norms) else None

    def extra_repr(self) -> str:
        return f"depth={self.depth}, channels={self.channels}, pairs={self.pairs}, init={self.init!r}"


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

    def enter(self, hidden: Tensor) -> Term:
        """H_1, (N, channels, H, W), with the statistics of its norm."""
        return enter(self.norm, hidden, later=0, backend="plain")

    def forward(self, branch: Tensor, term: Term, start: int = 0) -> Tensor:
        """branch + v * N(H_1) for the channels from `start` on that the branch, (N, C, H, W), stands for."""
        part = slice(start, start + branch.shape[1])
        scale, shift = (t if t is None else t[:, part] for t in (term.scale, term.shift))
        term = Term(term.map[:, part], scale, shift)
        weight = self.weight[None, part]
        return weighted_sum(branch, [term], weight, relu=False, statistics=False, later=0, backend="plain").map


def enter(norm: nn.Module | None, x: Tensor, *, later: int, backend: str) -> Term:
    """x as `later` sums will use it: by its statistics where the norm is a known one, else by calling the norm."""
    if norm is not None and not has_affine_form(norm):
        x, norm = norm(x), None
    rows = 1 if norm is None or is_batch_norm(norm) else x.shape[0]
    joined = ops.enter(x, statistics=needs_moments(norm), later=later, rows=rows, backend=backend)
    return as_term(norm, joined)


def needs_moments(norm: nn.Module | None) -> bool:
    """Whether it takes a map's own moments to normalise it."""
    return norm is not None and not uses_running_statistics(norm)


def as_term(norm: nn.Module | None, joined: ops.Joined) -> Term:
    """A finished map as later sums use it."""
    if norm is None:
        return Term(joined.map, None, None, joined.links)
    # mean and var are None where the norm goes by its running statistics, which do not ask for them
    pixels = joined.map.shape[2] * joined.map.shape[3]
    return Term(joined.map, *affine_form(norm, joined.mean, joined.var, pixels), joined.links)


def weighted_sum(
    branch: Tensor,
    terms: Sequence[Term],
    weight: Tensor | None,
    *,
    relu: bool,
    statistics: bool,
    later: int,
    backend: str,
) -> ops.Joined:
    """s(branch + sum_i weight[i] * N(X_i)), with a = w * scale and b = sum_i w_i * shift_i; weight is (maps, C)."""
    scales = bias = None
    if weight is not None:
        scales = weight[:, None].to(ops.accumulation_dtype(weight.dtype))
        if terms[0].scale is not None:
            bias = (scales * torch.stack([t.shift for t in terms if t.shift is not None])).sum(0)
            scales = scales * torch.stack([t.scale for t in terms if t.scale is not None])
    return ops.join(
        branch,
        [t.map for t in terms],
        [t.links for t in terms],
        scales,
        bias,
        relu=relu,
        statistics=statistics,
        later=later,
        backend=backend,
    )

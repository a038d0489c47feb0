"""The dense shortcut of a stage: one norm for each earlier feature map, one weight per channel for each pair."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import DenseShortcutError
from .connectivity import Sources, Sparse
from .connectivity import sources as all_sources
from .norms import (
    BATCH_NORMS,
    Norm,
    affine_form,
    goes_by_batch,
    has_affine_form,
    is_batch_norm,
    known,
    make_norm,
    move_statistics,
    running_form,
    statistics,
    uses_running_statistics,
)
from .stage_state import Memory, Term
from .tiling import Tiling
from .weighting import start_parameter, weigh


class DenseShortcut(nn.Module):
    """sum_{i<l} w_{l,i} * N(X_i) for every block l of a stage (Sec. 3 of the paper; `docs/paper-map.md`).

    Args:
        depth: number of blocks L in the stage.
        channels: width C of its feature maps.
        norm, groups: N, see `make_norm`.
        init: start of the weights, see `start_weight`.
        weighted: False leaves norm and weight out: the plain sum of the dense identity control.
        weighting: how weights come from parameters, see `weighting.py`.
        backend: form of the operator, see `ops.choose`.
        sources: the maps that each block sums (`pattern.py`); None for all earlier ones.
        tokens: whether maps are tokens, (N, L, C) or (N, H, W, C) in the host; "layer" is then over C alone.

    Attributes:
        weights: the parameters, one for each block that sums any map. With the paper's channel weighting the one of
            block l = k + 1 has a row for each map that it sums: (l, C), row i for X_i, where it sums all.
        norms: one norm for each map that any block sums.
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
        weighting: str = "channel",
        backend: str = "auto",
        sources: Sources | None = None,
        tokens: bool = False,
    ) -> None:
        super().__init__()
        everything = all_sources([True] * depth)
        self.sources = everything if sources is None else sources
        self.depth, self.channels, self.init = depth, channels, init
        # attention looks at all maps that a block sums, so none can be summed ahead
        tiled = self.sources == everything and weighting != "attention"
        self.tiling: Tiling | Sparse = Tiling.best(depth) if tiled else Sparse(self.sources)
        self.weighted, self.weighting, self.backend = weighted, weighting, backend
        if weighting == "attention" and norm not in ("auto", "group", "layer", "instance"):
            if backend not in ("auto", "plain"):
                raise DenseShortcutError(
                    f"the back end {backend!r} has no kernel for attention where a norm is not each image's own: "
                    "take backend='auto' or norm='group'."
                )
            self.backend = "plain"
        self._weight_of = {k: n for n, k in enumerate(self.summing)}
        counts = [len(self.sources[k]) for k in self.summing] if weighted else []
        starts = [start_parameter(weighting, init, count, channels) for count in counts]
        self.weights = nn.ParameterList([nn.Parameter(w) for w in starts])
        used = sorted({i for maps in self.sources for i in maps}) if weighted else []
        norms = [make_norm(norm, channels, groups, tokens=tokens) for _ in used]
        self.norms = nn.ModuleList([n for n in norms if n is not None])
        self._norm_of = {i: n for n, i in enumerate(used)} if len(self.norms) else {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to their start again, as after `to_empty` of a network made on the meta device."""
        summing = [maps for maps in self.sources if maps]
        for weight, maps in zip(self.weights, summing, strict=self.weighted):
            weight.copy_(start_parameter(self.weighting, self.init, len(maps), self.channels))

    @property
    def summing(self) -> list[int]:
        """Positions of the blocks that sum any map."""
        return [k for k, maps in enumerate(self.sources) if maps]

    @property
    def normalised(self) -> bool:
        """Whether maps are normalised before they are summed."""
        return len(self.norms) > 0

    @property
    def pairs(self) -> int:
        """Number of pairs (l, i): L(L+1)/2 where every block sums all earlier maps."""
        return sum(map(len, self.sources))

    @property
    def tiled(self) -> bool:
        """Whether maps are summed ahead for groups of blocks, as in a deep stage."""
        return self.tiling.size < self.depth

    def weight(self, k: int, terms: Sequence[Term] = ()) -> Tensor:
        """w of block l = k + 1 for the maps that it sums: (maps, C), or (maps, N, C) where it depends on them."""
        return weigh(self.weighting, self.weights[self._weight_of[k]], self.channels, [t.map for t in terms])

    def enter(self, i: int, x: Tensor, backend: str, last: nn.Module | None = None) -> Term:
        """X_i, (N, C, H, W), as a map that no sum of this shortcut made.

        With `last`, a norm for which `norms.joins` holds, and where `takes_norm`, X_i is last(x).
        """
        norm, later = self.norm(i), self._later(i)
        if last is None:
            return enter(norm, x, later=later, backend=backend)
        assert norm is not None
        return enter_normalised(norm, last, x, later=later, backend=backend)

    def takes_norm(self, i: int) -> bool:
        """Whether a batch norm that gives X_i may become part of N(X_i), and X_i be left unmade."""
        norm = self.norm(i)
        known = norm is not None and has_affine_form(norm) and statistics(norm)[0] != ops.RAW
        return known and self.weighting != "attention"  # which looks at the maps

    def stream(self, x: Tensor, last: nn.Module | None) -> ops.Stream | None:
        """What runs the row without gradients by the compiled kernels, from X_0 on; None where it may not.

        x and last are as in `enter`.
        """
        if not self.weighted or self.weighting == "attention" or not all(self.sources):
            return None
        if not ops.is_eager(x) or not x.numel() or not ops.is_dense(x):
            return None
        norms = [*map(self.norm, range(self.depth)), last]
        forms = [None if norm is None else known(norm) for norm in norms]
        used = [form for form, norm in zip(forms, norms, strict=True) if norm is not None]
        if not all(form is not None and form.fits(self.channels) for form in used):
            return None
        if len({form.groups == ops.RUNNING for form in forms[:-1] if form is not None}) > 1:  # norms of two kinds
            return None
        tiling, blocks = self.tiling, range(self.depth)
        groups = {k: tiling.blocks(k) for k in blocks if tiling.begins(k)} if isinstance(tiling, Tiling) else {}
        weights, direct = list(map(self.weight, blocks)), list(map(tiling.direct, blocks))
        return ops.Stream(x, forms.pop(), forms, self.sources, weights, direct, groups)

    def plan(self, x: Tensor, rows: int, ends: Sequence[ops.End]) -> ops.Plan | None:
        """What other passes in training may go by, from X_0 and `Plan`'s rows and ends; None where they may not."""
        dtype, norms = ops.accumulation_dtype(x.dtype), [self.norm(i) for i in range(self.depth)]
        if not self.weighted or self.weighting != "channel" or any(map(self.tiling.begins, range(self.depth))):
            return None
        if not all(maps and len(maps) == maps[-1] - maps[0] + 1 for maps in self.sources):
            return None
        if not all(weight.dtype == dtype and weight.is_contiguous() for weight in self.weights):
            return None
        for norm in norms:
            if norm is None or not has_affine_form(norm) or norm.weight is not None:
                return None
            if is_batch_norm(norm) and not goes_by_batch(norm, dtype):
                return None
        if len({is_batch_norm(norm) for norm in norms if norm is not None}) > 1:
            return None
        return ops.Plan(x, rows, self.sources, [statistics(norm) for norm in norms[1:]], ends)

    def sum_ahead(self, k: int, memory: Memory, backend: str) -> Memory:
        """Where block k begins a group of a deep stage: the sums of all maps finished so far, one for each block."""
        if backend == "plain" or not isinstance(self.tiling, Tiling) or not self.tiling.begins(k):
            return memory
        terms, blocks, groups = memory.terms, self.tiling.blocks(k), self.tiling.later_groups(k)
        scales = self._scales_ahead(blocks, terms)
        new = [terms[i].links[-2:] for i in self.tiling.finished(k)]
        links = ops.close(terms[-1].map, new, [len(group) for group in groups], self.rows(memory), backend)
        closed = (*memory.closed, links)
        begun = range(self.tiling.size, k + 1, self.tiling.size)
        # Each `close` links to all groups begun since; of these, the one that begins now comes after full ones.
        skipped = [(k - first) // self.tiling.size * (self.tiling.size + 1) for first in begun]
        mine = [links[n : n + len(blocks) + 1] for n, links in zip(skipped, closed, strict=True)]
        sizes = [len(self.tiling.finished(first)) for first in begun]
        partial = ops.ahead([t.map for t in terms], mine, scales, len(blocks), sizes, backend)
        return memory._replace(partial=tuple(partial), closed=closed)

    def forward(
        self,
        k: int,
        addends: Sequence[Tensor],
        memory: Memory,
        *,
        branch: ops.Branch | None = None,
        norm: nn.Module | None = None,
        relu: bool = False,
        finish: bool = False,
        overwrite: bool = False,
        backend: str = "plain",
    ) -> tuple[Tensor, Term | None]:
        """addends + branch + sum_i w_{l,i} * N(X_i) for block l = k + 1.

        Args:
            k: position of the block in its stage, from 0.
            addends: the residual branch, and what else is added to it, each (N, C, H, W).
            memory: the k + 1 earlier maps.
            branch, norm: the residual branch before its last norm, in place of an addend, and that norm.
            relu: whether to apply the activation, ReLU, in the same pass.
            finish: whether the result is X_l itself, whose statistics may then be taken in the same pass.
            overwrite: whether the residual branch may be overwritten.
            backend: from `ops.choose`.

        Returns:
            the sum, (N, C, H, W), and its Term where `finish` was made use of; else it takes `enter`.
        """
        own = self.norm(k + 1) if finish else None
        one_pass = finish and (own is None or has_affine_form(own))
        summed = [memory.terms[i] for i in self.sources[k]]
        direct = self.sources[k] if backend == "plain" else self.tiling.direct(k)
        terms = [memory.terms[i] for i in direct]
        partial = [memory.partial[k % self.tiling.size]] if memory.partial else []
        groups, eps = statistics(own) if one_pass else (ops.NONE, 0.0)
        weight, rates, shifts = self._forms(k, summed)
        joined = ops.join(
            [*addends, *partial],
            branch,
            [t.map for t in terms],
            [self._link(t, i, k) for i, t in zip(direct, terms, strict=True)],
            weight,
            rates,
            shifts,
            relu=relu,
            groups=groups,
            eps=eps,
            later=self._later(k + 1) if one_pass else 0,
            backend=backend,
            overwrite=overwrite,
        )
        if branch is not None and branch.map is not None and joined.branch_gathered:
            assert isinstance(norm, BATCH_NORMS)
            rate, _, mean, var = joined.branch_gathered
            move_statistics(norm, rate, mean, var, branch.map.numel() // branch.map.shape[1], backend)
        return joined.map, as_term(own, joined, backend) if one_pass else None

    def _forms(self, k: int, summed: Sequence[Term]) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The weight of block k, (maps, C), and rate and shift of N for each map that it sums, where it has them."""
        weight = self.weight(k, summed) if self.weighted and summed else None
        rates = [t.scale for t in summed if t.scale is not None]
        shifts = [t.shift for t in summed if t.shift is not None]
        if weight is None or self.weighting != "attention":
            return weight, rates, shifts
        # a weight for each image goes into the affine form of N, which may have one too
        one = weight.new_ones((len(summed), self.channels))
        scaled = [w * rate for w, rate in zip(weight, rates, strict=True)] if rates else list(weight)
        moved = [w * shift for w, shift in zip(weight, shifts, strict=True)] if shifts else list(0 * weight)
        return one, scaled, moved

    def _link(self, term: Term, i: int, k: int) -> tuple[Tensor, ...]:
        """The link of map X_i to the sum of block k; none on the plain path."""
        return term.links and term.links[2 * self.tiling.users(i).index(k) :][:2]

    @staticmethod
    def rows(memory: Memory) -> int:
        """Rows of the scales of these maps: N where each image has its own, else 1."""
        scale = memory.terms[0].scale
        return 1 if scale is None else scale.shape[0]

    def _later(self, i: int) -> int:
        """Number of users of map i that take a link to it: blocks, and one for all groups that sum it ahead."""
        return len(self.tiling.users(i)) + self.tiling.is_closed(i)

    def _scales_ahead(self, blocks: range, terms: Sequence[Term]) -> Tensor | None:
        """a_{l,i} of some blocks for all of these maps, (len(blocks), len(terms), 1 or N, C); None for ones."""
        if not self.weighted:
            return None
        weight = torch.stack([self.weight(k)[: len(terms)] for k in blocks])[:, :, None]
        weight = weight.to(ops.accumulation_dtype(weight.dtype))
        scales = [t.scale for t in terms if t.scale is not None]
        return weight * torch.stack(scales) if scales else weight

    def norm(self, i: int) -> nn.Module | None:
        """The norm of map X_i; None where no block sums it, or maps are summed as they are."""
        return self.norms[self._norm_of[i]] if i in self._norm_of and len(self.norms) else None

    def extra_repr(self) -> str:
        return f"depth={self.depth}, channels={self.channels}, pairs={self.pairs}, init={self.init!r}"


class InnerShortcut(nn.Module):
    """v * N(H_1), added to the branch inside a bottleneck before its second activation (DS2).

    Args:
        channels: width of H_1.
        weighted: how many of its first channels pass a 3x3 and get a weight (all but Res2Net's last piece).
        norm, groups: N, see `make_norm`.
        start: v at the start; at 0 DS2 equals DS.
        backend: form of the operator, see `ops.choose`.

    Attributes:
        weight: v, (weighted,).
    """

    def __init__(
        self,
        channels: int,
        weighted: int,
        *,
        norm: Norm = "group",
        groups: int | None = None,
        start: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.start, self.backend = start, backend
        self.weight = nn.Parameter(torch.full((weighted,), start))
        self.norm = make_norm(norm, channels, groups)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set v to its start again."""
        self.weight.fill_(self.start)

    def enter(self, hidden: Tensor) -> Term:
        """H_1, (N, channels, H, W), with the statistics of its norm."""
        return enter(self.norm, hidden, later=0, backend=ops.choose(hidden, self.backend))

    def forward(self, branch: Tensor, term: Term, start: int = 0) -> Tensor:
        """branch + v * N(H_1) for the channels from `start` on that the branch, (N, C, H, W), stands for."""
        part = slice(start, start + branch.shape[1])
        scales, bias = self.weight[None, None, part].to(ops.accumulation_dtype(branch.dtype)), None
        if term.scale is not None and term.shift is not None:
            scales, bias = scales * term.scale[:, part], scales[0] * term.shift[:, part]
        return ops.dense_sum([branch], [term.map[:, part]], scales, bias, backend=self.backend)


def enter(norm: nn.Module | None, x: Tensor, *, later: int, backend: str) -> Term:
    """x as `later` sums will use it: by its statistics where the norm is a known one, else by calling the norm."""
    if norm is not None and not has_affine_form(norm):
        x, norm = norm(x), None
    rows = 1 if norm is None or is_batch_norm(norm) else x.shape[0]
    groups, eps = statistics(norm)
    return as_term(norm, ops.enter(x, groups=groups, eps=eps, later=later, rows=rows, backend=backend), backend)


def enter_normalised(norm: nn.Module, last: nn.Module, x: Tensor, *, later: int, backend: str) -> Term:
    """N(last(x)) as `later` sums will use it: an affine form of x, since batch norm and N are affine by the channel.

    The moments of last(x) follow from those of x, so one reading of x, (N, C, H, W), serves both norms.
    """
    assert isinstance(last, BATCH_NORMS)
    rows = 1 if is_batch_norm(norm) else x.shape[0]
    inner, outer = statistics(last), statistics(norm)
    gathers = ops.NONE if inner[0] == outer[0] == ops.NONE else ops.RAW
    entered = ops.enter(x, groups=gathers, eps=0.0, later=later, rows=rows, backend=backend)
    moments = entered.gathered[:2] if gathers == ops.RAW else ()
    if ops.NONE not in (inner[0], outer[0]):
        form = ops.nested_form(moments[0], moments[1], last.weight, last.bias, last.eps, *outer, backend)
        rate, shift, mean, var, *pooled = form
        move_statistics(last, rate, mean, var, x.numel() // x.shape[1], backend)
        rate, shift = affine_form(norm, (rate, shift, *pooled), x, backend)
        return Term(x, rate, shift, entered.links)
    rate, shift = affine_form(last, _form_of(moments, *inner), x, backend)
    moments = (rate * moments[0] + shift, rate.square() * moments[1]) if moments else ()
    own_rate, own_shift = affine_form(norm, _form_of(moments, *outer), x, backend)
    return Term(x, own_rate * rate, own_rate * shift + own_shift, entered.links)


def _form_of(moments: Sequence[Tensor], groups: int, eps: float) -> Sequence[Tensor]:
    """What `affine_form` takes, from the mean and variance of each channel and image; nothing for no statistics."""
    return () if groups == ops.NONE else ops.form(moments[0], moments[1], groups, eps, None, None)


def as_branch(norm: nn.Module, x: Tensor, backend: str) -> ops.Branch:
    """A residual branch before its last norm, one for which `norms.joins` holds; x is (N, C, H, W)."""
    assert isinstance(norm, BATCH_NORMS)
    affine = (norm.weight, norm.bias) if norm.affine else ()
    if not uses_running_statistics(norm):
        return ops.Branch(x, affine, (), norm.eps)
    return ops.Branch(x, (), running_form(norm, x, backend), norm.eps)


def as_term(norm: nn.Module | None, joined: ops.Joined, backend: str) -> Term:
    """A finished map as later sums use it."""
    if norm is None:
        return Term(joined.map, None, None, joined.links)
    form = affine_form(norm, joined.gathered, joined.map, backend)
    return Term(joined.map, form[0], form[1], joined.links)  # by index: a traced graph cannot unpack

"""A row of blocks in training, by the compiled kernels.

`fused.block` tells autograd of every pair of blocks: two links, a rate and a shift. Here the sums of one row share a
tape instead, which autograd does not see. A sum takes the branch and the weights and gives the map; backwards it leaves
G and a_i of its pairs on the tape, with the gradients of rates and shifts, where the sum that made X_i finds them. That
one runs later, for each sum takes the map before it too. Between two convolutions Python is slow, so what the passes
have in common, the words of each call, is worked out once (`Plan`).

The numbers are those of `fused.block`, whose kernels run; it is also what computes where a gradient is to be
differentiated in its turn.
"""

import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _current_graph_task_id

from . import fused
from .compiled import KINDS, Call, LaidOut, behind, bits
from .forms import BATCH, NONE, shapes
from .native import MADE, NO_NORM, NOTHING, values_of
from .operators import is_eager, run_backward
from .reference import accumulation_dtype

# places in the table of a call; 1 and 2 are where the numbers of the pass forward and backward begin
_Y, _BRANCH, _WEIGHT, _SCALE, _BIAS, _RATE, _SHIFT, _MAPS = range(3, 11)
_RUNNING_MEAN, _RUNNING_VAR = 3, 4  # in the table of `Plan.move`
_FORWARD, _BACKWARD = 0, 1
_GIVEN = 6  # places behind the maps of what a backward call takes and gives besides the gradients of later sums


class End(NamedTuple):
    """How a block ends.

    Attributes:
        eps: that of the branch's last norm, a batch norm by the batch at hand; None where the branch is whole.
        relu: whether ReLU follows the sum.
    """

    eps: float | None
    relu: bool


class Plan(LaidOut):
    """What all passes over a row of L blocks have in common.

    Args:
        x: a map of the row, (N, C, H, W), dense in memory.
        rows: 1 or N, those of rates and shifts.
        sources: for each block the maps that it sums, one after the other and all at once.
        norms: for X_1 .. X_{L-1} the norm: a number of groups or BATCH, and eps.
        ends: of each block.
    """

    def __init__(
        self,
        x: Tensor,
        rows: int,
        sources: Sequence[Sequence[int]],
        norms: Sequence[tuple[int, float]],
        ends: Sequence[End],
    ) -> None:
        super().__init__(x)
        self.depth, self.sources, self.ends = len(sources), sources, ends
        self.norms, self.kind, self.dtype = [(NONE, 0.0), *norms], KINDS[x.dtype], accumulation_dtype(x.dtype)
        n, c = x.shape[:2]
        self.pixels, self.item, self.rows, self.each = x.shape[2] * x.shape[3], self.dtype.itemsize, rows, rows * c
        # numbers of the pass forward: rate, shift, pooled mean and variance of each map but X_0, and of each branch
        self.size, self.forms = 0, [[0] * 4]
        for groups, _ in norms:
            form, pooled = shapes(n, c, groups)
            self.forms.append([self._room(math.prod(shape)) for shape in (form, form, pooled, pooled)])
        self.branches = [[self._room(c) for _ in range(4)] for _ in sources]
        # and backward: the gradients of all rates and shifts, then the scales of each sum, that of its branch first
        ends_at = [2 * self.depth * self.each]
        for maps in sources:
            ends_at.append(ends_at[-1] + (1 + len(maps)) * self.each)
        self.scales, self.back_size = ends_at[:-1], ends_at[-1]
        self.forward = [self._forward(k) for k in range(self.depth)]
        self._backward: dict[tuple[int, int, bool, tuple[int, ...]], Call] = {}
        self._moves: dict[tuple[int, float], Call] = {}

    def _room(self, count: int) -> int:
        start, self.size = self.size, self.size + count
        return start

    def scale_at(self, k: int, i: int) -> int:
        """Where a_i of block k stands among the numbers of the pass backward."""
        return self.scales[k] + (i - self.sources[k][0] + (self.ends[k].eps is not None)) * self.each

    def _at(self, place: int, way: int = _FORWARD) -> int:
        """A number of a pass, as the table's words have it (`native.cpp`)."""
        return behind(place * self.item, way)

    def _pairs(self, k: int, scales: int) -> list[int]:
        """The terms of the sum of block k, as `native._paired` writes them."""
        maps = self.sources[k]
        summed = [word for j in range(len(maps)) for word in (_MAPS + j, self.kind)]
        rates, shifts = (
            [given if i == 0 else self._at(self.forms[i][side]) for i in maps]
            for side, given in ((0, _RATE), (1, _SHIFT))
        )
        forms = [len(maps), _WEIGHT, *rates, *shifts]
        if self.ends[k].eps is None:
            return [len(maps), *summed, 0, self.rows, scales, 0, *forms, 0, 0]
        branch = [self._at(place) for place in self.branches[k][:2]]
        return [1 + len(maps), _BRANCH, self.kind, *summed, 1, self.rows, scales, 0, *forms, *branch]

    def _forward(self, k: int) -> Call:
        eps, relu = self.ends[k]
        branch = [1, _BRANCH, self.kind, 0]
        if eps is not None:
            branch = [0, 1, BATCH, bits(eps), _SCALE, _BIAS, *map(self._at, self.branches[k])]
        own = NO_NORM
        if k + 1 < self.depth:
            groups, own_eps = self.norms[k + 1]
            own = [groups, bits(own_eps), 0, 0, *map(self._at, self.forms[k + 1])]
        words = [*self.words, *branch, *self._pairs(k, 0), relu, _Y, self.kind, *own]
        return Call("block", self.dtype, words)

    def backward(self, k: int, fresh: int, has_grad: bool, later: tuple[int, ...]) -> Call:
        """The call for the gradient of block k's map.

        Args:
            fresh: of how many of the maps that it sums, from the first on, the rate and shift have no gradient yet.
            has_grad: whether the map has one from elsewhere.
            later: the blocks that sum the map.
        """
        key = k, fresh, has_grad, later
        if key not in self._backward:
            self._backward[key] = self._pull(*key)
        return self._backward[key]

    def move(self, mean: int, var: int, step: float) -> Call:
        """The call for a step of running statistics by a mean and variance at these places."""
        key = mean, step
        if key not in self._moves:
            count = self.pixels * self.shape[0]
            factors = bits(count / (count - 1)), bits(step)
            words = [1, self.shape[1], self._at(mean), self._at(var), *factors, _RUNNING_MEAN, _RUNNING_VAR]
            self._moves[key] = Call("move", self.dtype, words)
        return self._moves[key]

    def _pull(self, k: int, fresh: int, has_grad: bool, later: tuple[int, ...]) -> Call:
        maps, (eps, relu), i = self.sources[k], self.ends[k], k + 1
        grad, g, to_branch, to_weight, to_scale, to_bias = range(_MAPS + len(maps), _MAPS + len(maps) + _GIVEN)
        own = NOTHING
        if later:
            groups, own_eps = self.norms[i]
            count = values_of(groups, self.shape[0], self.shape[1], self.pixels)
            sums = [self._at((side * self.depth + i) * self.each, _BACKWARD) for side in (0, 1)]
            pooled = map(self._at, self.forms[i][2:])
            own = [MADE, self.rows, groups, bits(own_eps), count, 0, *pooled, *sums, 0, 0]
        pulled = [
            word
            for n, block in enumerate(later)
            for word in (to_bias + 1 + n, self.kind, self._at(self.scale_at(block, i), _BACKWARD), self.rows)
        ]
        given = [_Y, self.kind, *((grad, self.kind) if has_grad else (0, 0)), *own, len(later), *pulled, relu, g]
        forms = [self._at((side * self.depth + maps[0]) * self.each, _BACKWARD) for side in (0, 1)]
        gradients = [0, 0, to_weight, *forms, fresh, 0, 0]
        branch = [*NOTHING, 0]
        if eps is not None:
            statistics = map(self._at, self.branches[k][2:])
            count = self.pixels * self.shape[0]
            branch = [MADE, 1, BATCH, bits(eps), count, _SCALE, *statistics, 0, 0, to_scale, to_bias, to_branch]
        pairs = self._pairs(k, self._at(self.scales[k], _BACKWARD))
        return Call("pull_block", self.dtype, [*self.words, *given, *pairs, *gradients, *branch])


class _Back:
    """What the sums of a pass leave to those before them in one backward pass.

    Attributes:
        later: for each map the sums that read it: the block, its G, and a_i where it is not among `numbers`.
        forms: gradients of rate and shift of a map, where they are not among `numbers`.
        slow: whether they are not, for all has to be seen by autograd or by a dispatch mode.
        lowest: the first map whose rate and shift have gradients among `numbers`; all behind it have them too.
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.slow, self.lowest = is_grad_enabled() or not is_eager(like), plan.depth
        self.later: list[list[tuple[int, Tensor, Tensor | None]]] = [[] for _ in range(plan.depth)]
        self.forms: dict[int, tuple[Tensor, Tensor]] = {}
        self.numbers = like.new_empty(0 if self.slow else plan.back_size)


class _Pass:
    """What the sums of one pass share, which autograd keeps as long as they may be gone back through.

    It refers to no map: a map refers to it, through the function that made it.

    Attributes:
        numbers: of the pass forward, with the statistics of all maps and branches.
        wanted: for each map whether a gradient of it is asked for.
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan, self.numbers = plan, like.new_empty(plan.size)
        self.start = self.numbers.data_ptr()
        self.wanted: list[bool] = []
        self._backs: dict[int, _Back] = {}

    def back(self) -> _Back:
        """For the backward pass under way, of which there may be several at a time."""
        task = _current_graph_task_id()
        back = self._backs.get(task)
        if back is None:
            back = self._backs[task] = _Back(self.plan, self.numbers)

            def forget() -> None:  # at its end, for not every one comes to the first map
                del self._backs[task]

            torch.autograd.Variable._execution_engine.queue_callback(forget)
        return back

    def leave(self, back: _Back, k: int, g: Tensor, scales: Sequence[Tensor | None]) -> None:
        """Leave G of block k to the sums that made the maps it read, with a_i of each or None."""
        for i, scale in zip(self.plan.sources[k], scales, strict=True):
            if self.wanted[i]:
                back.later[i].append((k, g, scale))


class Tape:
    """One pass over a row in training.

    Args:
        plan: the row's; the norms of its maps and branches go by this batch.
        x: X_0, or what its form is one of, (N, C, H, W).
        rate, shift: N(X_0) = rate * x + shift, (1 or N, C) and contiguous, in the accumulation type.
        links: those of `fused.enter` to the blocks that sum X_0.
    """

    def __init__(self, plan: Plan, x: Tensor, rate: Tensor, shift: Tensor, links: Sequence[Tensor]) -> None:
        self.plan, self.form, self.maps, self._pass = plan, (rate, shift), [x], _Pass(plan, rate)
        self._before: Tensor = _Begin.apply(self._pass, rate, shift, *links)
        self._pass.wanted.append(self._before.requires_grad)

    def sum(self, k: int, branch: Tensor, weight: Tensor, *affine: Tensor) -> Tensor:
        """X_l of block l = k + 1, (N, C, H, W).

        Args:
            branch: the residual branch, before its last norm if there is one; one that the plan takes.
            weight: w, a row for each map that the block sums, (maps, C).
            affine: weight and bias of that norm, (C,) each. These and w are contiguous, in the accumulation type.
        """
        sources = self.plan.sources[k]
        read = (*self.form, *self.maps[sources[0] : sources[-1] + 1])
        y: Tensor = _Sum.apply(self._pass, k, read, self._before, branch, weight, *affine)
        self._before = y
        if k + 1 < self.plan.depth:  # no block sums X_L
            self.maps.append(y)
            self._pass.wanted.append(y.requires_grad)
        return y

    def move(self, running: Sequence[Tensor], places: Sequence[int], step: float) -> None:
        """One step of running statistics by a mean and variance that stand at these places in the pass's numbers."""
        mean, var = places
        self.plan.move(mean, var, step)(array("q", [0, self._pass.start, 0, *map(Tensor.data_ptr, running)]))


class _Begin(torch.autograd.Function):
    """Hands what is left for X_0 to the operator that took its statistics."""

    @staticmethod
    def forward(ctx: Any, shared: _Pass, rate: Tensor, shift: Tensor, *links: Tensor) -> Tensor:
        ctx.shared, ctx.links = shared, len(links)
        ctx.set_materialize_grads(False)
        return rate.new_empty(1)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        plan, back = ctx.shared.plan, ctx.shared.back()
        later = {k: (g, a) for k, g, a in back.later[0]}
        back.later[0] = []
        if not later:
            return None, None, None, *[None] * ctx.links

        def number(place: int) -> Tensor:
            c = plan.shape[1]
            return back.numbers.as_strided((plan.rows, c), (c, 1), place)

        forms = back.forms[0] if back.slow else (number(0), number(plan.depth * plan.each))
        users = [k for k, maps in enumerate(plan.sources) if 0 in maps]
        pairs = [later.get(k, (None, None)) for k in users]
        links = [
            t
            for k, (g, a) in zip(users, pairs, strict=True)
            for t in (g, number(plan.scale_at(k, 0)) if a is None and g is not None else a)
        ]
        return None, *forms, *links


class _Sum(torch.autograd.Function):
    """Takes the map before too, though it comes among those that are `read`: so it is gone back through first."""

    @staticmethod
    def forward(
        ctx: Any,
        shared: _Pass,
        k: int,
        read: tuple[Tensor, ...],
        before: Tensor,
        branch: Tensor,
        weight: Tensor,
        *affine: Tensor,
    ) -> Tensor:
        plan, y = shared.plan, torch.empty_like(branch)
        eps, relu = plan.ends[k]
        # what is not looked at has its place in the table all the same
        read = (weight, *(affine or (weight, weight)), *read)
        plan.forward[k](array("q", [0, shared.start, 0, *map(Tensor.data_ptr, (y, branch, *read))]))
        ctx.shared, ctx.k = shared, k
        ctx.set_materialize_grads(False)
        # without ReLU and statistics the map is not looked at again, and may be overwritten by what follows
        looked_at = relu or k + 1 < plan.depth
        ctx.save_for_backward(y if looked_at else weight, weight if eps is None else branch, *read)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        shared, k, taken = ctx.shared, ctx.k, ctx.saved_tensors
        plan, back, normed = shared.plan, shared.back(), shared.plan.ends[k].eps is not None
        # in the order of blocks, which `fused.block` has them in too: the sums are the same bit for bit
        later = back.later[k + 1][::-1] if k + 1 < plan.depth else []
        if grad is None and not later:
            return (None,) * (8 if normed else 6)
        if k + 1 < plan.depth:
            back.later[k + 1] = []  # whose G are needed no more behind this
        if back.slow:
            return None, None, None, None, *_slowly(shared, back, k, grad, later, taken)
        like, (branch, weight, scale, bias) = taken[-1], taken[1:5]
        if grad is not None and not plan.takes(grad):
            grad = torch.empty_like(like).copy_(grad)
        g, to_weight = torch.empty_like(like), torch.empty_like(weight)
        to_affine = [torch.empty_like(scale), torch.empty_like(bias)] if normed else []
        to_branch = torch.empty_like(branch) if normed else g
        given = (like if grad is None else grad, g, to_branch, to_weight, *(to_affine or (g, g)))
        first = plan.sources[k][0]
        fresh = max(0, min(back.lowest, k + 1) - first)
        back.lowest = min(back.lowest, first)
        call = plan.backward(k, fresh, grad is not None, tuple(left[0] for left in later))
        table = [*map(Tensor.data_ptr, (*taken, *given)), *(left[1].data_ptr() for left in later)]
        call(array("q", [0, shared.start, back.numbers.data_ptr(), *table]))
        shared.leave(back, k, g, [None] * len(plan.sources[k]))
        return None, None, None, None, to_branch, to_weight, *to_affine


def _slowly(
    shared: _Pass,
    back: _Back,
    k: int,
    grad: Tensor | None,
    later: Sequence[tuple[int, Tensor, Tensor | None]],
    taken: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The backward pass of a sum by operators, whose gradients have gradients: of branch, weight and affine."""
    plan = shared.plan
    y, branch, weight, scale, bias, rate, shift, *maps = taken
    (eps, relu), sources = plan.ends[k], plan.sources[k]
    groups, own_eps = plan.norms[k + 1] if k + 1 < plan.depth else (NONE, 0.0)
    y = y if relu or k + 1 < plan.depth else maps[-1]  # which is not looked at
    of_maps = zip(sources, maps, strict=True)
    forms = [(rate, shift) if i == 0 else fused.gathered(x, *plan.norms[i], ())[:2] for i, x in of_maps]
    rates, shifts = map(list, zip(*forms, strict=True))
    given_back = (grad, *back.forms.get(k + 1, (None, None)), [left[1] for left in later], [left[2] for left in later])
    of_branch: tuple[Any, ...] = ([], None, [], [], 0.0)
    if eps is not None:
        of_branch = (list(fused.gathered(branch, BATCH, eps, (scale, bias))), branch, [scale, bias], [], eps)
    own = list(fused.gathered(y, groups, own_eps, ()))
    arguments = (y, own, *given_back, *of_branch, maps, weight, rates, shifts, relu, groups, own_eps, "native")
    found = run_backward(fused.run_pull_block, fused.pull_block, y, arguments)
    g, scales, to_branch, to_affine, _, to_weight, to_rates, to_shifts = found
    for i, *new in zip(sources, to_rates, to_shifts, strict=True):
        old = back.forms.get(i)
        back.forms[i] = (new[0], new[1]) if old is None else (old[0] + new[0], old[1] + new[1])
    shared.leave(back, k, g, scales)
    return to_branch[0] if to_branch else g, to_weight[0], *to_affine

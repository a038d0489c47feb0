"""The kernels on the CPU, compiled (`compiled.py`), as functions of tensors.

Each map is read from memory once and each output written once, by as many threads as PyTorch uses. Maps are taken
channels_last or contiguous, in float32, float64, bfloat16 and (where the compiler knows it) float16, mixed if need be.

Beside the five functions of every back end, by which the kernels are compared with `reference.py`, there are `enter`,
`block` and their backward passes, which do the arithmetic per channel in the same call; the operators run these.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .compiled import KINDS, address_of, bits, call, is_last, shape_words
from .forms import BATCH, NONE, RAW, RUNNING, shapes, unnormalised_scales
from .reference import accumulation_dtype, new_map
from .sums import Back, Sum

_NO_FORM, _NO_MAP, _NO_PAIR = [0], [0, 0], [0, 0]
NO_NORM = [NONE, *[0] * 7]  # of a map that no sum takes
NOTHING, _GIVEN, MADE = [0], 1, 2  # ways in which a gradient comes through a norm


class _Words:
    """Tensors as the words that a compiled function takes, in the layout and accumulation type of one map.

    They, or copies in that form where one is needed, are kept until the function returns.
    """

    def __init__(self, first: Tensor) -> None:
        self.layout = torch.channels_last if is_last(first) else torch.contiguous_format
        self.dtype = accumulation_dtype(first.dtype)
        self.kept: list[Tensor] = []

    def map(self, x: Tensor) -> tuple[int, int]:
        if not x.is_contiguous(memory_format=self.layout):
            x = x.contiguous(memory_format=self.layout)
        self.kept.append(x)
        return x.data_ptr(), KINDS[x.dtype]

    def maps(self, maps: Sequence[Tensor]) -> list[int]:
        return [len(maps), *[word for x in maps for word in self.map(x)]]

    def numbers(self, x: Tensor | None) -> int:
        return address_of(x, self.dtype, self.kept)

    def all(self, tensors: Sequence[Tensor | None]) -> list[int]:
        return [self.numbers(x) for x in tensors]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.moments`."""
    mean, var, _, _ = enter(x, RAW, 0.0)
    return mean, var


def enter(x: Tensor, groups: int, eps: float) -> list[Tensor]:
    """The statistics of a map as `fused.enter` has them: rate, shift, pooled mean and variance."""
    x = _standard(x)
    found = _new_statistics(x, groups)
    if groups != NONE:
        words = _Words(x)
        call("enter", words.dtype, [*shape_words(x), *words.map(x), *_form(groups, eps, _NO_PAIR, found), *_NO_FORM])
    return found


def _new_statistics(x: Tensor, groups: int) -> list[Tensor]:
    """Room for rate, shift, pooled mean and variance of a norm of x."""
    (n, c), dtype = x.shape[:2], accumulation_dtype(x.dtype)
    if groups > 0 and c % groups:
        raise ValueError(f"a norm of {groups} groups was given a map of {c} channels, which they do not divide")
    form, pooled = shapes(n, c, groups)
    return [x.new_empty(shape, dtype=dtype) for shape in (form, form, pooled, pooled)]


def _form(groups: int, eps: float, affine: Sequence[int], found: Sequence[Tensor]) -> list[int]:
    """A norm with its affine parameters, and where its statistics go."""
    return [groups, bits(eps), *affine, *[t.data_ptr() for t in found]]


def join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.join`."""
    first = _standard((*addends, *maps)[0])
    words = _Words(first)
    pairs = _given_scales(words, maps, scales, bias)
    groups = RAW if statistics else NONE
    y, found = _run_block(words, first, addends, _NO_FORM, pairs, relu, groups, 0.0, out)
    return y, found[0], found[1]


def block(given: Sum, out: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`fused.run_block` at one go: y, the statistics of its norm, and those of the branch's norm unless it is fixed."""
    first = _standard(given.first)
    words, norm, found = _Words(first), _NO_FORM, []
    if given.branch is not None and not given.fixed:
        found = _new_statistics(given.branch, BATCH)
        norm = [1, *_form(BATCH, given.branch_eps, words.all(given.affine) or _NO_PAIR, found)]
    if given.rates:
        pairs = _paired(words, given, given.fixed or found[:2], 0)
    else:
        pairs = _given_scales(words, given.summed, unnormalised_scales(given.weight, given.maps, first), None)
    y, own = _run_block(words, first, given.addends, norm, pairs, given.relu, given.groups, given.eps, out)
    return y, own, found


def _given_scales(words: _Words, maps: Sequence[Tensor], scales: Tensor, bias: Tensor | None) -> list[int]:
    """The terms of a sum whose scales are known."""
    return [*words.maps(maps), False, scales.shape[1], words.numbers(scales), words.numbers(bias), 0]


def _paired(words: _Words, given: Sum, branch: Sequence[Tensor], scales: int) -> list[int]:
    """The terms of a sum whose scales and bias are to be made: the branch, if it has rate and shift, and maps.

    scales is where the scales go, 0 for nowhere.
    """
    terms = [*words.maps(given.summed), len(branch) > 0, given.rows, scales, 0]
    forms = words.all([given.weight, *given.rates, *given.shifts])
    return [*terms, len(given.rates), *forms, *(words.all(branch) or _NO_PAIR)]


def _run_block(
    words: _Words,
    first: Tensor,
    addends: Sequence[Tensor],
    norm: Sequence[int],
    pairs: Sequence[int],
    relu: bool,
    groups: int,
    eps: float,
    out: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    y = first if out is first else torch.empty_like(first)
    found = _new_statistics(y, groups)
    terms = [*words.maps(addends), *norm, *pairs]
    own = _form(groups, eps, _NO_PAIR, found)
    call("block", words.dtype, [*shape_words(first), *terms, relu, y.data_ptr(), KINDS[y.dtype], *own])
    return y, found


def pull(
    x: Tensor,
    grad: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    maps: Sequence[Tensor],
    rows: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pull`."""
    x = _standard(x)
    words = _Words(x)
    own = NOTHING if offset is None else [_GIVEN, offset.shape[0], words.numbers(offset), words.numbers(slope)]
    pulled = torch.empty_like(x)
    scales = x.new_empty((len(maps), rows, x.shape[1]), dtype=words.dtype)
    bias = x.new_empty((rows, x.shape[1]), dtype=words.dtype)
    told = _pull(words, x, grad, own, later_grads, later_scales, relu, pulled)
    call("pull", words.dtype, [*told, *words.maps(maps), rows, scales.data_ptr(), bias.data_ptr()])
    return pulled, scales, bias


def _pull(
    words: _Words,
    x: Tensor,
    grad: Tensor | None,
    own: Sequence[int],
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    relu: bool,
    out: Tensor,
) -> list[int]:
    later = [
        word
        for g, a in zip(later_grads, later_scales, strict=True)
        for word in (*words.map(g), words.numbers(a), a.shape[0])
    ]
    passed = _NO_MAP if grad is None else words.map(grad)
    return [*shape_words(x), *words.map(x), *passed, *own, len(later_grads), *later, relu, out.data_ptr()]


def _through(
    words: _Words,
    x: Tensor,
    groups: int,
    eps: float,
    found: Sequence[Tensor],
    rows: int,
    grads: Sequence[int],
    affine: Sequence[int] = _NO_PAIR,
    to_affine: Sequence[int] = _NO_PAIR,
) -> list[int]:
    """The gradient of x through its statistics.

    Args:
        found: rate, shift, pooled mean and variance, as `_new_statistics` made room for them.
        rows: of the gradients of rate and shift.
        grads: where these are.
        affine, to_affine: where weight and bias of the norm are, and where their gradients go.
    """
    (n, c), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    count = values_of(groups, n, c, pixels)
    pooled = found[:2] if groups == RAW else found[2:]
    return [MADE, rows, groups, bits(eps), count, affine[0], *words.all(pooled), *grads, *to_affine]


def values_of(groups: int, images: int, channels: int, pixels: int) -> int:
    """How many numbers of maps are normalised together."""
    return pixels if groups == RAW else pixels * images if groups == BATCH else pixels * channels // groups


def _own_through(
    words: _Words, x: Tensor, groups: int, eps: float, found: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[int]:
    """`_through` for gradients of which either may be missing, or both."""
    some = grads[0] if grads[0] is not None else grads[1]
    if groups == NONE or some is None:
        return NOTHING
    return _through(words, x, groups, eps, found, some.shape[0], words.all(grads))


def pull_entered(
    x: Tensor,
    own: Sequence[Tensor],
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    groups: int,
    eps: float,
) -> Tensor:
    """The backward pass of `fused.enter` at one go."""
    x = _standard(x)
    words, pulled = _Words(x), torch.empty_like(x)
    through = _own_through(words, x, groups, eps, own, (grad_rate, grad_shift))
    told = _pull(words, x, None, through, later_grads, later_scales, False, pulled)
    call("pull", words.dtype, [*told, 0, 0, 0, 0])
    return pulled


def pull_block(
    y: Tensor, own: Sequence[Tensor], back: Back, branch_norm: Sequence[Tensor], given: Sum
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """The backward pass of `fused.block` at one go, with the arguments and results of `fused.run_pull_block`."""
    y = _standard(y)
    words, c, rows, g = _Words(y), y.shape[1], given.rows, torch.empty_like(y)
    branch, affine, fixed, weight = given.branch, given.affine, given.fixed, given.weight
    count = len(given.maps)

    def new(*shape: int) -> Tensor:
        return y.new_empty(shape, dtype=words.dtype)

    through = _own_through(words, y, given.groups, given.eps, own, (back.grad_rate, back.grad_shift))
    told = _pull(words, y, back.grad, through, back.later_grads, back.later_scales, given.relu, g)
    if not given.rates:
        scales, to_scales, to_bias = unnormalised_scales(weight, given.maps, y), new(count, rows, c), new(rows, c)
        pairs = _given_scales(words, given.summed, scales, None)
        call("pull_block", words.dtype, [*told, *pairs, to_scales.data_ptr(), to_bias.data_ptr(), *NOTHING, 0])
        to_weights = [] if weight is None else [_with_earlier(to_scales.sum(1), weight)]
        return g, scales, [], [], [], to_weights, new(0, rows, c), new(0, rows, c)

    assert weight is not None
    to_weight, first = new(*weight.shape), int(branch is not None)
    scales, to_rates, to_shifts = new(first + count, rows, c), new(count, rows, c), new(len(weight), rows, c)
    to_fixed = [new(1, c) for _ in fixed]
    to_branch = [] if branch is None else [torch.empty_like(branch, memory_format=words.layout)]
    to_affine, theirs = [], NOTHING
    if branch is not None and not fixed:
        to_affine = [new(c), new(c)]
        parameters, to_parameters = words.all(affine) or _NO_PAIR, [t.data_ptr() for t in to_affine]
        own_form = (BATCH, given.branch_eps, branch_norm)
        theirs = _through(words, branch, *own_form, 1, _NO_PAIR, parameters, to_parameters)
    pairs = _paired(words, given, fixed or branch_norm[:2], scales.data_ptr())
    to_forms = to_weight.data_ptr(), to_rates.data_ptr(), to_shifts.data_ptr(), len(weight)
    gradients = [0, 0, *to_forms, *([t.data_ptr() for t in to_fixed] or _NO_PAIR)]
    out = to_branch[0].data_ptr() if to_branch else 0
    call("pull_block", words.dtype, [*told, *pairs, *gradients, *theirs, out])
    to_branch = [] if branch is None else [_in_form_of(to_branch[0], branch)]
    to_affine = [_as(t, p.dtype) for t, p in zip(to_affine, affine, strict=False)]
    to_weights = [_as(to_weight, weight.dtype)]
    return g, scales[first:], to_branch, to_affine, to_fixed, to_weights, to_rates, to_shifts


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; asking costs less than a conversion that has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _in_form_of(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient laid out as other back ends give it, where the branch and the sum are laid out differently."""
    if grad.stride() == x.stride():  # as nearly always: a map only to compare with would be one too many
        return grad
    wanted = new_map(x)
    return grad if grad.stride() == wanted.stride() else wanted.copy_(grad)


def _with_earlier(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the last rows of `weight` with zeros for the rows before."""
    return torch.cat([grad.new_zeros(weight.shape[0] - grad.shape[0], grad.shape[1]), grad]).to(weight.dtype)


def running_form(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """rate and shift, (1, C), of batch norm by its running statistics, (C,), with its affine parameters."""
    words = _Words(mean)
    rate = mean.new_empty((1, mean.shape[0]), dtype=words.dtype)
    shift = torch.empty_like(rate)
    addresses = words.all([weight, bias, rate, shift, mean, var])
    call("running", words.dtype, [1, mean.shape[0], RUNNING, bits(eps), *addresses])
    return rate, shift


def nested_form(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, outer_eps: float
) -> tuple[Tensor, ...]:
    """See `forms.nested_form`."""
    (n, c), rows = mean.shape, 1 if groups == BATCH else mean.shape[0]
    pooled = (1, c) if groups == BATCH else (n, groups)
    found = tuple(mean.new_empty(shape) for shape in ((rows, c), (rows, c), (1, c), (1, c), pooled, pooled))
    words = _Words(mean)
    addresses = words.all([mean, var, weight, bias, *found])
    call("nested", words.dtype, [1, n, c, groups, bits(eps), bits(outer_eps), *addresses])
    return found


def nested_form_backward(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    found: Sequence[Tensor],
    grads: Sequence[Tensor],
    eps: float,
    groups: int,
    outer_eps: float,
) -> tuple[Tensor, ...]:
    """See `forms.nested_form_backward`."""
    n, c = mean.shape
    to = tuple(mean.new_empty(shape) for shape in ((n, c), (n, c), (c,), (c,)))
    words = _Words(mean)
    addresses = words.all([mean, var, weight, bias, None, None, *found, *grads, *to])
    call("nested_backward", words.dtype, [1, n, c, groups, bits(eps), bits(outer_eps), *addresses])
    return to


def move(running: Sequence[Tensor], found: Sequence[Tensor], unbiased: float, step: float) -> None:
    """See `joining.move`."""
    to, given = ([t.data_ptr() for t in pair] for pair in (running, found))
    call("move", running[0].dtype, [1, running[0].shape[0], *given, bits(unbiased), bits(step), *to])


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """See `reference.mix`."""
    last = _standard(maps[-1])
    words = _Words(last)
    outputs = [torch.empty_like(last) for _ in range(scales.shape[0])]
    told = [*words.maps(maps), *words.maps(outputs), words.numbers(scales), scales.shape[2]]
    call("mix", words.dtype, [*shape_words(last), *told])
    return outputs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """See `reference.dots`."""
    first = _standard(maps[0])
    words = _Words(first)
    out = first.new_empty((len(grads), len(maps), rows, first.shape[1]), dtype=words.dtype)
    call("dots", words.dtype, [*shape_words(first), *words.maps(grads), *words.maps(maps), rows, out.data_ptr()])
    return out


def _standard(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()

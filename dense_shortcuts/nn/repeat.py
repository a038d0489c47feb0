"""Running a row of blocks in the way of an earlier pass, by the compiled kernels.

A pass that makes its sums one by one notes what each block gave (`Memory.record`). Behind the last block that becomes a
`watch.Repeat`: a stream where no gradient is recorded, the plan of a tape in training. While nothing has changed, the
passes to come have little left to find out.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from .. import ops
from .hooks import saves_elsewhere
from .norms import frozen_statistics, goes_by_batch, is_batch_norm
from .shortcut import DenseShortcut
from .stage_state import Memory
from .watch import Repeat


def begin(
    repeat: Repeat, memory: Memory, shortcut: DenseShortcut, identity: Tensor, identity_norm: nn.Module | None
) -> Memory | None:
    """The memory with X_0, as in `DenseShortcut.enter`, for a pass in that way; None where it does not serve."""
    run = repeat.run
    if not run.serves(identity) or not repeat.holds():
        return None
    if isinstance(run, ops.Stream):
        run.begin(identity)
        return memory._replace(stream=run, repeat=repeat)
    if saves_elsewhere():  # hooks count on what is saved at the first pass and at a second one
        return None
    term = shortcut.enter(0, identity, "native", identity_norm)
    assert term.scale is not None and term.shift is not None
    tape = ops.Tape(run, term.map, term.scale, term.shift, term.links)
    return memory._replace(terms=(term,), tape=tape, repeat=repeat)


def sum_on_tape(repeat: Repeat, tape: ops.Tape, k: int, shortcut: DenseShortcut, branch: Tensor, norm: Any) -> Tensor:
    """X_l of block l = k + 1, with a step of the running statistics of the norms that it goes by."""
    plan, affine = tape.plan, () if norm is None else _affine(norm)
    x = tape.sum(k, branch, repeat.read[k], *affine)
    if norm is not None:
        _move(norm, tape, plan.branches[k])
    if k + 1 < plan.depth and plan.norms[k + 1][0] == ops.BATCH:
        _move(shortcut.norm(k + 1), tape, plan.forms[k + 1])
    return x


def _affine(norm: Any) -> tuple[Any, Any]:
    return norm._parameters["weight"], norm._parameters["bias"]


def _running(norm: Any) -> tuple[Any, Any]:
    return norm._buffers["running_mean"], norm._buffers["running_var"]


def _move(norm: Any, tape: ops.Tape, places: Sequence[int]) -> None:
    norm._buffers["num_batches_tracked"].add_(1)
    tape.move(_running(norm), places[2:], norm.momentum)


def leave(memory: Memory, shortcut: DenseShortcut, row: str) -> Memory:
    """The memory to go on with, one sum at a time, where a block in the middle of a row gives something else."""
    if memory.rows is not None:
        memory.rows.pop(row, None)
    if memory.tape is None:
        return memory._replace(repeat=None)
    with frozen_statistics(shortcut):  # which have taken this step
        terms = [shortcut.enter(i, x, "native") for i, x in enumerate(memory.tape.maps) if i]
    return memory._replace(repeat=None, tape=None, terms=(*memory.terms, *terms))


def end_of(branch: Tensor, norm: Any, relu: bool, first: Tensor) -> ops.End | None:
    """How a block ends whose sum may be made on a tape that X_0, `first`, was put on; None where it may not."""
    if not is_grad_enabled() or not ops.is_eager(branch) or saves_elsewhere():
        return None
    if branch.dtype != first.dtype or branch.stride() != first.stride() or not ops.is_dense(branch):
        return None
    if norm is None:
        return ops.End(None, relu)
    taken = goes_by_batch(norm, ops.accumulation_dtype(branch.dtype)) and all(t is not None for t in _affine(norm))
    return ops.End(norm.eps, relu) if taken else None


def as_repeat(memory: Memory, shortcut: DenseShortcut) -> Repeat | None:
    """What the passes to come may go by, behind the last block of a row; None where there is no such thing."""
    if memory.record is None or type(shortcut) is not DenseShortcut:
        return None
    given, ends = zip(*memory.record, strict=True)
    if memory.stream is not None:
        return Repeat(memory.stream, given, memory.stream.kept)
    first, last = memory.terms[0], given[0][2]
    if isinstance(last, nn.SyncBatchNorm):  # which other processes may join
        return None
    plan = None if first.scale is None else shortcut.plan(first.map, first.scale.shape[0], ends)
    if plan is None:
        return None
    weights = [shortcut.weight(k) for k in range(shortcut.depth)]
    ends_with = [norm for norm, *_ in given if norm is not None]
    moved = [norm for norm in (*ends_with, *shortcut.norms) if is_batch_norm(norm)]
    numbers = [t for norm in ends_with for t in _affine(norm)] + [t for norm in moved for t in _running(norm)]
    return Repeat(plan, given, [*weights, *numbers])

"""How an operator with a gradient of its own is registered with PyTorch, and the short way to it in eager mode."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.compiler import is_compiling


def is_eager(x: Tensor) -> bool:
    """Whether a kernel may be called as it stands: nothing compiles, transforms or watches operators."""
    return (
        type(x) is Tensor
        and not x.is_meta
        and not is_compiling()
        and not _are_functorch_transforms_active()
        and _len_torch_dispatch_stack() == 0
    )


def run_backward(run: Callable[..., Any], registered: Any, like: Tensor, arguments: tuple[Any, ...]) -> Any:
    """Runs a backward pass, of whose arguments the back end is the last.

    Under create_graph=True the gradient is to be differentiated in its turn, which the kernels cannot be.
    """
    if is_grad_enabled():
        return run(*arguments[:-1], "plain")
    return (run if is_eager(like) else registered)(*arguments)


def flatten(values: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """The values with their lists spread out, and the length of each list, None for a single value."""
    lengths = [len(value) if isinstance(value, list | tuple) else None for value in values]
    return [x for value, n in zip(values, lengths, strict=True) for x in ([value] if n is None else value)], lengths


def unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]


def _apart(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same with memory for each link, which `run` makes of one element: a registered operator's results may not
    share any."""

    @wraps(run)  # whose annotations give the operator its schema
    def apart(*inputs: Any) -> Any:
        output = run(*inputs)
        single = isinstance(output, list)
        flat, lengths = flatten([output] if single else output)
        seen: set[int] = set()
        for n, x in enumerate(flat):
            place = x.untyped_storage()._cdata
            if place in seen:
                flat[n] = x.new_zeros(1).expand(x.shape)
            seen.add(place)
        grouped = unflatten(flat, lengths)
        return grouped[0] if single else tuple(grouped)

    return apart


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: "Operator", lengths: list[int | None], *flat: Any) -> Any:
        inputs = unflatten(flat, lengths)
        output = operator.runner(flat)(*inputs)
        ctx.operator, ctx.input_lengths = operator, lengths
        operator.setup(ctx, inputs, output)
        flat_output, ctx.lengths = flatten([output] if isinstance(output, list) else output)
        return *flat_output, ctx.lengths, isinstance(output, list)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = ctx.operator.backward(ctx, *unflatten(grads[:-2], ctx.lengths))
        spread = [
            [None] * n if g is None and n is not None else g for g, n in zip(given, ctx.input_lengths, strict=True)
        ]
        return None, None, *flatten(spread)[0]


class Operator:
    """A registered operator with its gradient.

    In eager mode it goes through a torch.autograd.Function, which costs a fraction of what the registered route does;
    graphs to be compiled and function transforms take that route.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        shapes: Callable[..., Any],
        setup: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        """run computes, shapes gives empty tensors like its results; the other two as for `register_autograd`."""
        self.run, self.setup, self.backward = run, setup, backward
        self.registered = torch.library.custom_op(f"dense_shortcuts::{name}", _apart(run), mutates_args=())
        self.registered.register_fake(_apart(shapes))
        self.registered.register_autograd(backward, setup_context=setup)

    def runner(self, flat: Sequence[Any]) -> Callable[..., Any]:
        """Who computes without a gradient: the kernel as it stands, where nothing watches operators."""
        like = next(x for x in flat if isinstance(x, Tensor))
        return self.run if is_eager(like) else self.registered

    def __call__(self, *inputs: Any) -> Any:
        if is_compiling() or _are_functorch_transforms_active():
            return self.registered(*inputs)
        flat, lengths = flatten(inputs)
        if not is_grad_enabled():
            return self.runner(flat)(*inputs)
        *outputs, output_lengths, single = _Eager.apply(self, lengths, *flat)
        grouped = unflatten(outputs, output_lengths)
        return grouped[0] if single else grouped

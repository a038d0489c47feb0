"""The operator: what a dense shortcut computes, apart from any module."""

from . import flops
from .backend import BACKENDS, choose
from .backends.reference import accumulation_dtype, moments
from .functional import dense_add, is_relu

__all__ = ["BACKENDS", "accumulation_dtype", "choose", "dense_add", "is_relu", "moments"]

flops.register()  # the operators are registered by now, and no counter of operations has begun

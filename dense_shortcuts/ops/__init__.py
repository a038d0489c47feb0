"""The operator that a dense shortcut computes, independent of any module."""

from . import flops, tiled  # noqa: F401 (its operators are counted too)
from .backend import BACKENDS, choose
from .backends.reference import accumulation_dtype, moments
from .functional import dense_add, is_relu

__all__ = ["BACKENDS", "accumulation_dtype", "choose", "dense_add", "is_relu", "moments"]

flops.register()  # after the operators are registered, and before any counter starts

"""The operator: what a dense shortcut computes, apart from any module."""

from .dispatch import BACKENDS, choose
from .joining import Joined, enter, join
from .reference import accumulation_dtype, dense_sum, moments

__all__ = ["BACKENDS", "Joined", "accumulation_dtype", "choose", "dense_sum", "enter", "join", "moments"]

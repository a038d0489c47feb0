"""The operator: what a dense shortcut computes, apart from any module."""

from . import fused  # registers the operators and their formulas, before any counter of operations begins
from .dispatch import BACKENDS, choose
from .forms import BATCH, NONE, RAW, RUNNING, form, pool
from .joining import Branch, Joined, ahead, close, enter, join, move, nested_form, running_form
from .reference import accumulation_dtype, dense_sum, moments
from .stream import KnownNorm, Stream

__all__ = [
    "BACKENDS",
    "BATCH",
    "NONE",
    "RAW",
    "RUNNING",
    "Branch",
    "Joined",
    "KnownNorm",
    "Stream",
    "accumulation_dtype",
    "ahead",
    "choose",
    "close",
    "dense_sum",
    "enter",
    "form",
    "fused",
    "join",
    "moments",
    "move",
    "nested_form",
    "pool",
    "running_form",
]

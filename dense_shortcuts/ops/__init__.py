"""The operator: what a dense shortcut computes, apart from any module."""

from . import flops
from .dispatch import BACKENDS, choose, circumstances
from .forms import BATCH, NONE, RAW, RUNNING, form, pool
from .joining import Branch, Joined, ahead, close, enter, join, move, nested_form, running_form
from .operators import is_eager
from .reference import accumulation_dtype, is_dense, moments
from .stream import KnownNorm, Stream
from .summing import dense_sum, is_relu
from .tape import End, Plan, Tape

__all__ = [
    "BACKENDS",
    "BATCH",
    "NONE",
    "RAW",
    "RUNNING",
    "Branch",
    "End",
    "Joined",
    "KnownNorm",
    "Plan",
    "Stream",
    "Tape",
    "accumulation_dtype",
    "ahead",
    "choose",
    "circumstances",
    "close",
    "dense_sum",
    "enter",
    "form",
    "is_dense",
    "is_eager",
    "is_relu",
    "join",
    "moments",
    "move",
    "nested_form",
    "pool",
    "running_form",
]

flops.register()  # the operators are registered by now, and no counter of operations has begun

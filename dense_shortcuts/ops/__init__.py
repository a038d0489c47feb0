"""The operator: what a dense shortcut computes, apart from any module."""

from .reference import dense_sum, moments

__all__ = ["dense_sum", "moments"]

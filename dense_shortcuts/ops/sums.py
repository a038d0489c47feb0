"""What a block's sum is made of, in one piece."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Sum(NamedTuple):
    """s(sum of addends + branch norm + sum_i w_i * N(X_i)), and the norm of the result.

    Attributes:
        addends: maps that are added as they stand, each (N, C, H, W).
        branch: the residual branch before its last norm, (N, C, H, W), or None where it is an addend.
        affine: weight and bias of that norm, (C,) each, or none of both.
        fixed: rate and shift of that norm, (1, C) each, where it goes by its running statistics.
        branch_eps: its eps.
        maps: the earlier feature maps that this sum reads, each (N, C, H, W).
        weight: w, a row for each earlier map, the last ones for `maps`: (all maps, C); None for ones.
        rates, shifts: N(X_i) = rate * X_i + shift for all earlier maps, (1 or N, C) each; none for N(X) = X.
        relu: whether s is ReLU, else there is none.
        groups, eps: the norm of the result: a number of groups, BATCH, RAW or NONE.
    """

    addends: Sequence[Tensor]
    branch: Tensor | None
    affine: Sequence[Tensor]
    fixed: Sequence[Tensor]
    branch_eps: float
    maps: Sequence[Tensor]
    weight: Tensor | None
    rates: Sequence[Tensor]
    shifts: Sequence[Tensor]
    relu: bool
    groups: int
    eps: float

    @property
    def summed(self) -> Sequence[Tensor]:
        """The maps that have scales: the branch, where it has a norm, and the earlier ones."""
        return self.maps if self.branch is None else [self.branch, *self.maps]

    @property
    def first(self) -> Tensor:
        """The map whose dtype and layout the result has."""
        return (*self.addends, *self.summed)[0]

    @property
    def rows(self) -> int:
        """1 or N, the rows of the scales."""
        return self.rates[0].shape[0] if self.rates else 1


class Back(NamedTuple):
    """What comes back to the map that was made by a sum.

    Attributes:
        grad: the gradient of the map itself, (N, C, H, W), or None.
        grad_rate, grad_shift: those of its norm's rate and shift, (1 or N, C), or None.
        later_grads: G of each later sum that reads the map, (N, C, H, W) each.
        later_scales: its a_i in that sum, (1 or N, C) each.
    """

    grad: Tensor | None
    grad_rate: Tensor | None
    grad_shift: Tensor | None
    later_grads: Sequence[Tensor]
    later_scales: Sequence[Tensor]

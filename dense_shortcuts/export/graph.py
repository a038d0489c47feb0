"""A network as a graph of PyTorch's own operators, for any batch and image size."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from ..errors import DenseShortcutError
from ..inference.fuse import fuse, is_fused
from ..ops import moments
from ..ops.affine import affine_from_moments
from ..surgery.plug import dense_stages

BATCH = 2  # tracers treat dimensions of 1 as constants, because these broadcast


def inference_form(model: nn.Module) -> nn.Module:
    """A copy of a network for export: on the CPU, in evaluation mode, fused if it is plugged in, on the plain path."""
    if dense_stages(model) and not is_fused(model):
        net = fuse(model)
    else:
        net = copy.deepcopy(model).eval().requires_grad_(False)
    for stage in dense_stages(net).values():
        for shortcut in stage.shortcuts.values():
            shortcut.backend = "plain"  # overrides DENSE_SHORTCUTS_BACKEND: other runtimes lack our custom operators
    return net.cpu()


def capture(net: nn.Module, img_size: int, *, largest: tuple[int, int] | None = None) -> ExportedProgram:
    """The graph of a network in `inference_form`, traced with two images, for any batch, height and width.

    Group norms are written out as sums and products: exporters turn them into instance norm between reshapes, which
    some runtimes are reported to compute incorrectly for one group.

    Args:
        net: a result of `inference_form`.
        img_size: side of the images used for tracing, in pixels.
        largest: largest batch and side, for runtimes that plan their memory; None for no bound.

    Raises:
        DenseShortcutError: PyTorch cannot trace the network for any batch and size.
    """
    sizes = any_size(*(largest or (None, None)))
    images = torch.zeros(BATCH, 3, img_size, img_size)
    try:
        with torch.no_grad(), WrittenGroupNorm():
            return torch.export.export(net, (images,), dynamic_shapes=(sizes,))
    except (torch._dynamo.exc.TorchDynamoException, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise DenseShortcutError(
            f"PyTorch cannot trace the network for any batch and size ({reason}): choose a network that accepts any "
            "image size, unlike a ViT of fixed size."
        ) from error


def any_size(batch: int | None = None, side: int | None = None) -> dict[int, Any]:
    """The dynamic dimensions of images (N, 3, H, W) for torch.export: all but the channels.

    It finds the smallest side itself: the last map of a network must have more than one row and column, because tracers
    treat a dimension of 1 as a constant. `batch` and `side` are upper bounds.
    """
    side_range = Dim.DYNAMIC if side is None else Dim.DYNAMIC(max=side)
    return {0: Dim("batch", min=1, max=batch), 2: side_range, 3: side_range}


class WrittenGroupNorm(TorchFunctionMode):
    """A mode in which F.group_norm is computed from the moments of each channel, as in the dense shortcuts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            return written_group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def written_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """F.group_norm of a map (N, C, H, W), without a reshape of the map."""
    scale, shift, _, _ = affine_from_moments(*moments(x), num_groups, eps)
    scale, shift = (scale, shift) if weight is None else (scale * weight, shift * weight)
    shift = shift if bias is None else shift + bias
    return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


def warnings(model: nn.Module) -> list[str]:
    """What a user should know about a network's norms before deploying it, one sentence each."""
    groups = [norm.num_groups for norm in model.modules() if isinstance(norm, nn.GroupNorm)]
    said = []
    if groups:
        said.append(
            "group norm depends on the image, so it stays in the graph as sums and products; batch norm folds away "
            "(`dsnet renorm` turns one into the other)."
        )
    if 1 in groups:
        said.append(
            "a norm of one group (layer norm) is written out and not exported as instance norm, which some runtimes "
            "are reported to compute incorrectly for one group."
        )
    return said

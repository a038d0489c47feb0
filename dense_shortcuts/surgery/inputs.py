"""What a network may be run on: its caller's example, else images of a size that it names or that is usual."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_USUAL = ((224, 224), (256, 256))


class Call(NamedTuple):
    """Arguments of a forward pass, whose tensors have no data."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls_of(model: nn.Module, example: Any = None) -> Iterator[Call]:
    """The calls to try on a network, the likeliest first; that of an example alone where there is one."""
    if example is not None:
        yield _call(example)
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for shape in _image_shapes(model):
        yield _call(torch.empty(shape, dtype=dtype, device="meta"))
    if isinstance(dummies := getattr(model, "dummy_inputs", None), dict):  # of transformers
        yield _call(dummies)


def _call(example: Any) -> Call:
    given = without_data(example)
    if isinstance(given, dict):
        return Call((), given)
    return Call(given if isinstance(given, tuple) else (given,), {})


def without_data(value: Any) -> Any:
    """A value, or a list, tuple or dict of values, with its tensors on the meta device."""
    return tree_map_only(Tensor, lambda x: x.to("meta"), value)


def _image_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of two images, or what else its first convolution takes; none where it has no convolution and no size."""
    config = getattr(model, "pretrained_cfg", None)  # timm's
    size: Any = config.get("input_size") if isinstance(config, dict) else None
    convolution: Any = next((module for module in model.modules() if isinstance(module, _CONVOLUTIONS)), None)
    if convolution is None and size is None:
        return
    channels = size[0] if convolution is None else convolution.in_channels
    axes = 2 if convolution is None else len(convolution.kernel_size)
    sizes = [pair for module in model.modules() for pair in _named_sizes(module)][:1]
    for pair in dict.fromkeys((*sizes, *([tuple(size[1:])] if size else []), *_USUAL)):
        yield (2, channels, *((16, *pair) if axes == 3 else pair[:axes]))


def _named_sizes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """The size of image that a module says it was made for."""
    for name in ("img_size", "image_size"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            yield value, value
        elif isinstance(value, tuple | list) and len(value) == 2:
            yield value[0], value[1]

"""ResNet for 32x32 images (He et al., 2016, Sec. 4.2) as a timm ResNet: a 3x3 stem without pooling, 3 or 4 stages."""

from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..errors import DenseShortcutError


class CifarResNet(ResNet):
    """timm's ResNet with as many intermediate maps as `feature_info` names; timm's own counts four stages always."""

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's, with indices that count the maps of this network."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        """As timm's, with indices that count the maps of this network."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().prune_intermediate_layers(taken, *args, **kwargs)


def cifar_resnet(
    *,
    block: type[nn.Module],
    layers: tuple[int, ...],
    channels: tuple[int, ...] = (16, 32, 64),
    in_chans: int = 3,
    output_stride: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> CifarResNet:
    """timm's ResNet with a stem for small images; shortcuts between stages are 1x1 projections.

    Args:
        block, layers, in_chans, **kwargs: as in timm's ResNet.
        channels: width of each stage before expansion; the stem has channels[0] channels.
        output_stride: must be the default; the network reduces 32x32 to 8x8 (three stages) or 4x4 (four).

    Raises:
        DenseShortcutError: any other output_stride.
    """
    if output_stride != 32:
        raise DenseShortcutError(
            f"output_stride={output_stride} does not apply to the CIFAR networks, which keep 8x8 or 4x4: leave it out."
        )
    # timm expects 64 channels from the stem, or twice the width of a deep one; the stem itself is replaced below.
    model = CifarResNet(
        block,
        layers,
        channels=channels,
        in_chans=in_chans,
        stem_type="deep",
        stem_width=channels[0] // 2,
        device=device,
        dtype=dtype,
        **kwargs,
    )
    model.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    if len(channels) == 3:
        model.layer4 = nn.Sequential()  # timm's forward pass calls four stages; an empty one is the identity
    for info in model.feature_info:
        info["reduction"] = max(1, info["reduction"] // 4)
    return model

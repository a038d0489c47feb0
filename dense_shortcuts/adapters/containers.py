"""Modules of timm and torchvision that run their residual blocks in a forward pass of their own.

RegNet's stage loops over its children. The others call their blocks by name, among other things: their own forward pass
is run, on a stand-in that has each block in the form of its step in this one pass.
"""

from typing import Any

from timm.models import FeatureHookNet
from timm.models.dla import DlaTree
from timm.models.maxxvit import MaxxVitBlock
from timm.models.regnet import RegStage
from timm.models.xception import Xception
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from ..nn.stage import DenseStage


class OnePass:
    """A stage as its host's forward pass is to see it once: segments' blocks are steps, all else is the stage's.

    The steps go by the order of the blocks in the stage, so the host has to call those of a segment in this order.
    """

    def __init__(self, stage: DenseStage) -> None:
        self._stage = stage
        self._children = dict(zip(stage.block_names, stage.blocks, strict=True))
        self._steps = {n: s for n, s in zip(stage.block_names, stage, strict=True) if s.context.shortcut is not None}

    def __getattr__(self, name: str) -> Any:
        return self._steps[name] if name in self._steps else getattr(self._stage, name)

    def __len__(self) -> int:
        return len(self._children)

    def items(self) -> list[tuple[str, Any]]:
        """What an nn.ModuleDict has under this name."""
        return [(name, self._steps.get(name, child)) for name, child in self._children.items()]


class DenseDlaTree(DenseStage, DlaTree):
    """A tree of two blocks, the second of which takes the output of the first."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return DlaTree.forward(OnePass(self), x, *args, **kwargs)


class DenseMaxxVitBlock(DenseStage, MaxxVitBlock):
    """A convolution block, and behind it two of attention that feed one another."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return MaxxVitBlock.forward(OnePass(self), x, *args, **kwargs)


class DenseXception(DenseStage, Xception):
    """Blocks that are the network's own children, called one after the other."""

    forward = Xception.forward

    def forward_features(self, x: Tensor) -> Tensor:
        return Xception.forward_features(OnePass(self), x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return Xception.forward_intermediates(OnePass(self), x, *args, **kwargs)


class DenseFeatureHookNet(DenseStage, FeatureHookNet):
    """Blocks that timm took out of their nn.Sequential for `features_only`; it calls them one after the other."""

    def forward(self, x: Tensor) -> Any:
        return FeatureHookNet.forward(OnePass(self), x)


class DenseLayerGetter(DenseStage, IntermediateLayerGetter):
    """Blocks that torchvision took out of their nn.Sequential for segmentation and detection."""

    def forward(self, x: Tensor) -> Any:
        return IntermediateLayerGetter.forward(OnePass(self), x)


_CONTAINERS: dict[Any, type[DenseStage]] = {
    DlaTree: DenseDlaTree,
    MaxxVitBlock: DenseMaxxVitBlock,
    Xception: DenseXception,
    FeatureHookNet: DenseFeatureHookNet,
    IntermediateLayerGetter: DenseLayerGetter,
    RegStage: DenseStage,
}


def is_known(module: nn.Module) -> bool:
    """Whether a module is a container whose forward pass is known to feed its residual blocks to one another."""
    return type(module) in _CONTAINERS


def runs_children(module: nn.Module) -> bool:
    """Whether a module's forward pass is known to be a loop over its children, as that of a stage is."""
    return _CONTAINERS.get(type(module)) is DenseStage


def dense_class(module: nn.Module) -> type[DenseStage]:
    """The class that a container takes when it is plugged."""
    return _CONTAINERS.get(type(module), DenseStage)

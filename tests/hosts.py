"""Small hosts for the tests, random numbers in all their weights, and the comparison with the reference.

Starts hide errors (a weight of 0 or 1, a last norm whose gamma is 0), so every comparison runs on random weights.
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import reference
import torch
from timm.layers import BlurPool2d, DropBlock2d, DropPath, SqueezeExcite
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.xception import Block as XceptionBlock
from timm.models.xception import SeparableConv2d, Xception
from torch import Tensor, nn
from torchvision.models import resnet as tv

EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "timm_basic_se": lambda: {"attn_layer": SqueezeExcite},
    "timm_basic_droppath": lambda: {"drop_path": DropPath(0.4)},
    "timm_basic_silu": lambda: {"act_layer": nn.SiLU},
    "timm_basic_aa": lambda: {"aa_layer": BlurPool2d},
    "timm_basic_dropblock": lambda: {
        "act_layer": nn.SiLU,
        "drop_block": partial(DropBlock2d, drop_prob=0.2, block_size=3),
    },
    "timm_bottleneck_se": lambda: {"attn_layer": SqueezeExcite},
    "timm_bottleneck_groups": lambda: {"cardinality": 2, "base_width": 64},
    "timm_bottleneck_dropblock": lambda: {
        "act_layer": nn.SiLU,  # a ReLU would hide the order of the two
        "drop_block": partial(DropBlock2d, drop_prob=0.2, block_size=3),
    },
    "timm_bottleneck_dilated": lambda: {"dilation": 2},
    "timm_bottleneck_leaky": lambda: {"act_layer": nn.LeakyReLU},
    "timm_bottle2neck_scale1": lambda: {"scale": 1, "base_width": 64},
    "timm_bottle2neck_droppath": lambda: {"drop_path": DropPath(0.4)},
}
BLOCKS = {
    "timm_basic": BasicBlock,
    "timm_bottleneck": Bottleneck,
    "timm_bottle2neck": partial(Bottle2neck, norm_layer=nn.BatchNorm2d, base_width=64, scale=3),
    "tv_basic": tv.BasicBlock,
    "tv_bottleneck": tv.Bottleneck,
}
KINDS = tuple(BLOCKS)
WITH_INNER = ("timm_bottleneck", "timm_bottle2neck", "tv_bottleneck")


def id_of(options: dict[str, Any]) -> str:
    """A test's options as part of its name, which is the same in every process: of a function its name alone."""
    return str({key: getattr(value, "__name__", value) for key, value in options.items()})


def family(kind: str) -> str:
    return "_".join(kind.split("_")[:2])


def expansion(kind: str) -> int:
    return 1 if family(kind).endswith("basic") else 4


def make_stage(
    kind: str, depth: int, channels: int, *, in_channels: int, stride: int = 1, **extra: Any
) -> nn.Sequential:
    """A host's stage of `depth` blocks and output width `channels`, with a projection shortcut only where needed."""
    make, planes = BLOCKS[family(kind)], channels // expansion(kind)
    extra = EXTRAS.get(kind, dict)() | extra
    norm_layer = extra.get("norm_layer", nn.BatchNorm2d)
    projection = None
    if stride != 1 or in_channels != channels:
        conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        projection = nn.Sequential(conv, norm_layer(channels))
    blocks = [make(in_channels, planes, stride=stride, downsample=projection, **extra)]
    blocks += [make(channels, planes, **extra) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class Net(nn.Module):
    """A network that is neither timm's nor torchvision's, made of their blocks: stem, stages, head."""

    def __init__(
        self, kind: str, depths: Iterable[int], widths: Iterable[int], *, classes: int = 5, **extra: Any
    ) -> None:
        super().__init__()
        depths, widths = list(depths), list(widths)
        norm_layer = extra.get("norm_layer", nn.BatchNorm2d)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = norm_layer(widths[0])
        self.relu = nn.ReLU(inplace=True)
        before = widths[0]
        for n, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            stage = make_stage(kind, depth, width, in_channels=before, stride=1 if n == 1 else 2, **extra)
            self.add_module(f"layer{n}", stage)
            before = width
        self.stages = len(depths)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for n in range(1, self.stages + 1):
            x = getattr(self, f"layer{n}")(x)
        return self.fc(x.mean((2, 3)))


def xception(num_classes: int) -> nn.Module:
    """timm's with its own blocks by its own names, of fewer channels."""
    net, widths = Xception(num_classes=num_classes), [16, 16, 20, *[24] * 9, 32]
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
    net.conv2, net.bn2 = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)
    for n, (before, width) in enumerate(itertools.pairwise(widths), 1):
        options = {"strides": 2 if before != width or n == 1 else 1, "start_with_relu": n > 1, "grow_first": n < 12}
        net.set_submodule(f"block{n}", XceptionBlock(before, width, 2, **options))
    net.conv3, net.bn3 = SeparableConv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32)
    net.conv4, net.bn4 = SeparableConv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32)
    net.fc = nn.Linear(32, num_classes)
    return net


def small_net(kind: str = "timm_basic", **extra: Any) -> Net:
    """Two stages, three and two blocks, 8 and 16 channels, seeded, with random numbers in all weights."""
    torch.manual_seed(11)
    net = Net(kind, (3, 2), (8, 16), **extra)
    randomise(net, seed=12)
    return net


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Random affine parameters and running statistics for every norm, the last of a block included.

    Convolutions start as timm's and torchvision's ResNets start theirs; PyTorch's own start gives maps whose deviation
    is a hundredth of their mean, and then float32 cannot hold 1e-4 in anyone's instance norm.
    """
    rng = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu", generator=rng)
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.affine:
            m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=rng))
            m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=rng))
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(0.3 * torch.randn(m.running_mean.shape, generator=rng))
            m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=rng))


@torch.no_grad()
def randomise_parameters(parameters: Iterable[tuple[str, Tensor]], seed: int, scale: float = 0.5) -> None:
    """Random numbers, positive and negative, in shortcut weights."""
    rng = torch.Generator().manual_seed(seed)
    for _, p in parameters:
        p.copy_(scale * torch.randn(p.shape, generator=rng))


def frozen_copy(stage: nn.Module) -> list[nn.Module]:
    """The host's blocks before plugging, apart from the network, in float64 for the reference."""
    return list(copy.deepcopy(stage).double().children())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Largest difference within `tolerance` of the expected tensor's own scale (1 at least)."""
    assert actual is not None, f"{what}: missing"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(expected).all(), f"{what}: the reference is not finite"
    error = (actual.double() - expected.double()).abs().max().item()
    bound = tolerance * max(1.0, expected.abs().max().item())
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


class Reference:
    """The equations with their own copies of a plugged stage's weights, norms and host blocks."""

    def __init__(self, blocks: list[nn.Module], stage: nn.Module, *, channels: int, norm: Any, **variant: Any) -> None:
        """`blocks` was copied before plugging; w, v and running statistics are read from `stage` by state-dict name."""
        state = {name: value.detach().double().clone() for name, value in stage.state_dict().items()}
        depth = len(blocks)
        groups, inner = variant.pop("groups", None), variant.pop("inner", False)
        self.blocks, self.variant = blocks, variant
        self.w, self.norms = None, [nn.Identity()] * depth
        if variant["aggregate"] != "dense_identity":
            self.w = [state[f"shortcut.weights.{k}"].requires_grad_() for k in range(depth)]
            self.norms = [reference.real_norm(norm, channels, groups) for _ in range(depth)]
        self.v: list[Tensor | None] = [None] * depth
        self.inner_norms: list[nn.Module | None] = [None] * depth
        for k, block in enumerate(blocks):
            if inner and reference.keeps_shape(block):
                self.v[k] = state[f"{k}.inner.weight"].requires_grad_()
                self.inner_norms[k] = reference.real_norm(norm, reference.hidden_width(block), groups)
        for name, module in self.named_norms():
            if isinstance(module, nn.BatchNorm2d):
                module.load_state_dict({key: state[f"{name}.{key}"].detach() for key in module.state_dict()})
        self.train(stage.training)

    def named_norms(self) -> list[tuple[str, nn.Module]]:
        own = [(f"shortcut.norms.{i}", norm) for i, norm in enumerate(self.norms)]
        return own + [(f"{k}.inner.norm", norm) for k, norm in enumerate(self.inner_norms) if norm is not None]

    def train(self, mode: bool) -> None:
        for module in (*self.blocks, *self.norms, *(n for n in self.inner_norms if n is not None)):
            module.train(mode)

    def maps(self, x: Tensor) -> list[Tensor]:
        return reference.stage_maps(
            self.blocks, x, self.w, self.norms, v=self.v, inner_norms=self.inner_norms, **self.variant
        )

    def parameters(self) -> dict[str, Tensor]:
        """By the plugged stage's names."""
        host = {f"{k}.{name}": p for k, block in enumerate(self.blocks) for name, p in block.named_parameters()}
        ours = {} if self.w is None else {f"shortcut.weights.{k}": w for k, w in enumerate(self.w)}
        return host | ours | {f"{k}.inner.weight": v for k, v in enumerate(self.v) if v is not None}

    def buffers(self) -> dict[str, Tensor]:
        found = {f"{k}.{name}": b for k, block in enumerate(self.blocks) for name, b in block.named_buffers()}
        for name, module in self.named_norms():
            found |= {f"{name}.{key}": b for key, b in module.named_buffers()}
        return found

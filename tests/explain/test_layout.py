"""Class activation maps of layers whose channels are the last axis, against Grad-CAM written out in float64."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.image import scale_cam_image
from timm.models.convnext import ConvNeXt
from timm.models.mambaout import MambaOut
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.explain.cam import METHODS, cam_maps, find_layer
from dense_shortcuts.experiments.explain.layout import Layout, find_layout

SIDE, TARGETS = 32, [1, 4]


def swin() -> nn.Module:
    """Maps (8, 8, 8) in the first stage, a cube, and (4, 4, 16) in the second."""
    return SwinTransformer(img_size=SIDE, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5)


def vit(**options) -> nn.Module:
    return VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=8, depth=3, num_heads=2, num_classes=5, **options)


def convnext() -> nn.Module:
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 8, 8), num_classes=5, ls_init_value=0.5)


def mambaout() -> nn.Module:
    return MambaOut(depths=(1, 1), dims=(16, 24), num_classes=5)


def made(make, plugged: bool = False, **options) -> nn.Module:
    torch.manual_seed(3)
    net = make(**options)
    net = ds.plug_in(net) if plugged else net
    for parameter in net.parameters():  # also those that start at zero or one
        parameter.data += 0.3 * torch.randn_like(parameter)
    return net.double().eval()


def images(height: int = SIDE, width: int = SIDE) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def by_hand(net: nn.Module, x: Tensor, layer: str, to_maps) -> np.ndarray:
    """Grad-CAM by its equations: ReLU of the sum of the maps (N, C, H, W), each weighted by its mean gradient."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output.clone().requires_grad_())
        return kept[0]

    handle = net.get_submodule(layer).register_forward_hook(keep)
    scores = net(x)[torch.arange(len(x)), torch.tensor(TARGETS)]
    handle.remove()
    (gradient,) = torch.autograd.grad(scores.sum(), kept[0])
    a, g = to_maps(kept[0].detach()), to_maps(gradient)
    cam = sum(g[:, c].mean((1, 2))[:, None, None] * a[:, c] for c in range(a.shape[1])).relu().numpy()
    assert (cam.reshape(2, -1).max(1) > 1e-9).all()
    width, height = x.shape[-1], x.shape[-2]
    return scale_cam_image(scale_cam_image(cam, (width, height)))


def last(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def second(x: Tensor) -> Tensor:
    return x


def patches(x: Tensor, prefix: int = 1) -> Tensor:
    return torch.stack([x[:, prefix + 4 * row : prefix + 4 * row + 4] for row in range(4)], 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("make", "plugged", "layer", "to_maps"),
    [
        (swin, False, None, last),
        (swin, False, "layers.0", last),  # a cube, by timm's output_fmt
        (swin, False, "patch_embed.proj", second),  # a cube too, of a convolution
        (swin, True, None, last),
        (swin, True, "layers.0.blocks.1", last),  # a cube, by the block's adapter
        (swin, True, "layers.0.blocks", last),
        (mambaout, False, None, last),
        (mambaout, True, None, last),
        (convnext, False, "stages.1", second),
        (convnext, False, "stages.1.blocks.0.mlp", last),  # amid maps whose channels come second
        (convnext, True, "stages.1.blocks.0.norm", last),
        (vit, False, None, patches),  # by the norm of the last block, for the class token is classified
        (vit, True, "blocks.1", patches),
    ],
)
def test_grad_cam_is_that_of_the_equations_where_channels_are_last(make, plugged, layer, to_maps):
    net, x = made(make, plugged), images()
    name, _ = find_layer(net, layer)
    found = cam_maps(net, x, TARGETS, "gradcam", layer)
    np.testing.assert_allclose(found, by_hand(net, x, name, to_maps), rtol=0, atol=1e-6)


def test_the_default_layer_is_the_last_stage_but_for_a_class_token():
    assert find_layer(swin())[0] == "layers.1"
    assert find_layer(vit())[0] == "blocks.2.norm1"
    assert find_layer(vit(global_pool="avg"))[0] == "blocks.2"


def test_tokens_lie_row_by_row_behind_those_the_network_declares():
    net, x = made(vit, dynamic_img_size=True, reg_tokens=2, global_pool="avg", class_token=False), images(16, 48)
    layout = find_layout(net, "blocks.2", x)
    assert layout == Layout(True, (2, 6), 2)
    tokens = torch.arange(14.0).reshape(1, 14, 1)
    assert torch.equal(layout.maps(tokens), torch.arange(2.0, 14.0).reshape(1, 1, 2, 6))
    assert torch.equal(layout.output(layout.maps(tokens), tokens), tokens)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 80)])
def test_maps_of_any_ratio_keep_their_layout(size):
    net, x = made(mambaout), images(*size)
    assert find_layout(net, "stages.1", x) == Layout(True, (size[0] // 8, size[1] // 8))
    assert find_layout(made(convnext), "stages.1", x) == Layout(False, (size[0] // 8, size[1] // 8))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fullgrad"])
def test_every_method_reads_channels_last_as_it_reads_channels_second(method):
    """The same network told in either layout, whose layer has maps (4, 4, 6) or (6, 4, 4)."""

    class Told(nn.Module):
        def __init__(self, channels_last: bool):
            super().__init__()
            self.channels_last = channels_last
            torch.manual_seed(0)
            self.conv, self.look, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Identity(), nn.Linear(6, 5)

        def forward(self, x):
            x = self.conv(x).relu()
            x = self.look(x.movedim(1, -1)).movedim(-1, 1) if self.channels_last else self.look(x)
            return self.fc(x.square().mean((2, 3)).tanh())

    maps = []
    for channels_last in (False, True):
        np.random.seed(0)  # for RandomCAM
        maps.append(cam_maps(Told(channels_last).double(), images(), TARGETS, method, "look"))
    assert maps[0].max() > 0.9
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-6)


class Odd(nn.Module):
    """A network whose layers give what is no map of the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.tokens, self.windows, self.one = nn.Conv2d(3, 4, 8, 8), *(nn.Identity() for _ in range(3))
        self.unused, self.fc = nn.Identity(), nn.Linear(4, 5)

    def forward(self, x):
        x = self.tokens(self.conv(x).flatten(2).mT)
        x = self.windows(x.reshape(4 * len(x), 4, 4)).reshape(len(x), 16, 4).mean(1)
        return self.fc(self.one(x[:, :, None, None]).flatten(1))


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        ("tokens", r"tokens \(1, 16, 4\) and the network does not say where"),
        ("windows", r"gives no feature map .* but \(4, 4, 4\)"),
        ("one", "one place only"),
        ("unused", "but NoneType"),
        ("fc", r"but \(1, 5\)"),
    ],
)
def test_what_is_no_map_of_the_image_is_refused(layer, fault):
    net = Odd().double()
    with pytest.raises(DenseShortcutError, match=fault):
        cam_maps(net, images(), TARGETS, layer=layer)
    assert not any(module._forward_hooks for module in net.modules())

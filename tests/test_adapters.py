"""Families of timm and torchvision, each by one small network: with the nearest map as it is, a DSNet is its host.

`norm=None` and w = 1 on the nearest map give X_l = s(F_l(X_{l-1}) + X_{l-1}), so a wrong cut between branch and
shortcut shows in the output and in every gradient, in float64. The first block adds X_0, which is what its host adds.
"""

import copy
import pickle
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from hosts import xception
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import adapters
from dense_shortcuts.adapters.tracing.traced import TracedBlock


def video_mvit(after: bool) -> nn.Module:
    def block(heads: int, given: int, made: int, stride: int) -> Any:
        kernel, strides = [3, 3, 3], [1, stride, stride]
        return torchvision.models.video.mvit.MSBlockConfig(heads, given, made, kernel, kernel, strides, [1, 2, 2])

    blocks = [block(1, 8, 8, 1), block(1, 8, 8, 1), block(2, 8, 16, 2), block(2, 16, 16, 1), block(2, 16, 16, 1)]
    return torchvision.models.video.MViT(
        (32, 32), 4, blocks, residual_pool=True, residual_with_cls_embed=not after, rel_pos_embed=True,
        proj_after_attn=after, dropout=0.0, stochastic_depth_prob=0.2, num_classes=8,
    )  # fmt: skip


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
HOSTS: dict[str, Any] = {
    "resnet": partial(timm.create_model, "resnet18d"),
    "resnet aa": partial(timm.create_model, "resnetblur18"),
    "resnet eca": partial(timm.create_model, "ecaresnet26t", layers=(2, 1, 1, 1)),
    "resnet cbam": partial(timm.create_model, "resnet18", block_args={"attn_layer": "cbam"}),
    "resnext": partial(timm.create_model, "resnext50_32x4d", layers=(2, 1, 1, 1)),
    "byobnet": partial(timm.create_model, "test_byobnet"),
    "res2net": partial(timm.create_model, "res2net50_14w_8s", layers=(2, 1, 1, 1)),
    "resnest": partial(timm.create_model, "resnest26d", layers=(2, 1, 1, 2)),
    "sknet": partial(timm.create_model, "skresnet18"),
    "senet": partial(timm.create_model, "legacy_seresnet18"),
    "regnet": partial(timm.create_model, "regnety_002"),
    "resnetv2": partial(timm.create_model, "resnetv2_50", layers=(2, 1, 1, 2), channels=(32, 32, 64, 64)),
    "bit": partial(
        timm.models.resnetv2.ResNetV2, (2, 1, 1, 1), channels=(32, 32, 64, 64), stem_type="fixed",
        conv_layer=timm.layers.StdConv2d, norm_layer=partial(timm.layers.GroupNormAct, num_groups=4),
    ),
    "cspnet": partial(timm.create_model, "cs3darknet_s"),
    "mobilenetv2": partial(timm.create_model, "mobilenetv2_035"),
    "mobilenetv3": partial(timm.create_model, "mobilenetv3_small_050"),
    "mobilenetv4": partial(timm.create_model, "mobilenetv4_conv_small_035"),
    "efficientnet": partial(timm.create_model, "tinynet_e"),
    "convnext": partial(timm.create_model, "convnext_atto", depths=(2, 1, 1, 2), dims=(16, 16, 32, 32)),
    "convnextv2": partial(timm.create_model, "convnextv2_atto", depths=(2, 1, 1, 2), dims=(16, 16, 32, 32)),
    "poolformer": partial(
        timm.models.metaformer.MetaFormer, depths=(2, 1, 1, 1), dims=(16, 16, 32, 32), use_mlp_head=False
    ),
    "vit": partial(timm.create_model, "vit_tiny_patch16_224", **SMALL),
    "deit": partial(timm.create_model, "deit_tiny_distilled_patch16_224", **SMALL),
    "beit, a list": partial(timm.create_model, "beit_base_patch16_224", **SMALL),
    "eva, a list with rotary positions": partial(timm.create_model, "eva02_tiny_patch14_224", **SMALL),
    "pvt, blocks that take a size": partial(timm.create_model, "pvt_v2_b0", depths=(2, 1, 1, 1)),
    "swin": partial(
        timm.create_model, "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(2, 2),
    ),
    "swinv2": partial(
        timm.create_model, "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(2, 2),
    ),
    "swinv2 cr": partial(
        timm.create_model, "swinv2_cr_tiny_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(2, 2), extra_norm_period=2,
    ),
    "sam": partial(
        timm.create_model, "samvit_base_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2,
        window_size=3, global_attn_indexes=(1,), neck_chans=16, num_classes=8,
    ),
    "davit": partial(timm.create_model, "davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2)),
    "coat": partial(
        timm.create_model, "coat_lite_tiny", img_size=64, embed_dims=(16, 16, 32, 32), serial_depths=(2, 1, 1, 2),
        num_heads=8,
    ),
    "gemma4, blocks that take positions": partial(
        timm.create_model, "gemma4_vit_167m_enc", embed_dim=32, depth=2, num_heads=2, head_dim=16, img_size=96,
        intermediate_size=48,
    ),
    "mvitv2, blocks that give back a size": partial(
        timm.models.mvitv2.MultiScaleVit,
        timm.models.mvitv2.MultiScaleVitCfg(depths=(2, 2), embed_dim=16, stride_q=((1, 1), (2, 2))), img_size=64,
    ),
    "efficientvim, blocks that give back a state": partial(
        timm.create_model, "efficientvim_m1", embed_dim=(16, 16, 32), depths=(2, 2, 1), state_dim=(8, 8, 4),
    ),
    "tnt, blocks of two streams": partial(
        timm.create_model, "tnt_s_legacy_patch16_224", img_size=32, embed_dim=32, inner_dim=16, depth=2,
        num_heads_outer=2,
    ),
    "relpos, a list with a window": partial(timm.create_model, "vit_relpos_small_patch16_224", **SMALL),
    "relpos with its norms last": partial(timm.create_model, "vit_relpos_medium_patch16_rpn_224", **SMALL),
    "relpos, blocks that share their positions": partial(timm.create_model, "vit_srelpos_small_patch16_224", **SMALL),
    "nfnet, a gain in place": partial(
        timm.models.nfnet.NormFreeNet,
        timm.models.nfnet.NfCfg(
            depths=(2, 1, 1, 2), channels=(16, 16, 32, 32), stem_type="3x3", stem_chs=16, group_size=8,
            bottle_ratio=0.5, extra_conv=True, num_features=32, attn_layer="se", attn_kwargs={"rd_ratio": 0.5},
            reg=False, skipinit=True,
        ),
    ),
    "vovnet": partial(
        timm.models.vovnet.VovNet,
        {
            "stem_chs": [8, 8, 8], "stage_conv_chs": [8] * 4, "stage_out_chs": [16] * 4, "layer_per_block": 2,
            "block_per_stage": [1, 1, 3, 2], "residual": True, "depthwise": False, "attn": "ese",
        },
    ),
    "dla": partial(
        timm.create_model, "dla34", levels=(1, 1, 1, 2, 2, 1), channels=(8, 8, 16, 16, 32, 32), shortcut_root=True
    ),
    "dla of bottlenecks": partial(
        timm.create_model, "dla60x_c", levels=(1, 1, 1, 2, 3, 1), channels=(8, 8, 16, 16, 32, 32), base_width=32,
        cardinality=2,
    ),
    "dla of res2net's": partial(
        timm.create_model, "dla60_res2net", levels=(1, 1, 1, 2, 1, 1), channels=(8, 8, 16, 16, 32, 32), base_width=32,
    ),
    "maxvit, blocks called by name in a block": partial(
        timm.create_model, "maxvit_rmlp_pico_rw_256", img_size=64, embed_dim=(32, 32, 64), depths=(1, 2, 1),
        stem_width=16, head_hidden_size=32,
    ),
    "twins, a convolution behind the first block": partial(
        timm.create_model, "twins_pcpvt_small", img_size=64, embed_dims=(16, 16, 32, 32), depths=(3, 1, 2, 2),
        num_heads=(2, 2, 2, 2),
    ),
    "twins of windows": partial(
        timm.create_model, "twins_svt_small", img_size=64, embed_dims=(16, 16, 32, 32), depths=(2, 3, 1, 2),
        num_heads=(2, 2, 2, 2), wss=(4, 4, 2, 2),
    ),
    "convit, a token that joins in the middle": partial(
        timm.create_model, "convit_tiny", img_size=32, patch_size=8, embed_dim=16, depth=5, num_heads=2,
        local_up_to_layer=3,
    ),
    "xception, blocks by name": xception,
    "lowformer, residual layers in a row": partial(
        timm.create_model, "lowformer_b0", width_list=[16, 16, 16, 32, 32], depth_list=[1, 1, 1, 2, 3],
        head_widths=(32, 32),
    ),
    "mixer": partial(timm.models.mlp_mixer.MlpMixer, img_size=32, patch_size=8, num_blocks=2, embed_dim=32),
    "torchvision resnet": partial(torchvision.models.resnet18, num_classes=8),
    "torchvision regnet": partial(torchvision.models.regnet_y_400mf, num_classes=8),
    "torchvision mobilenet_v2": partial(torchvision.models.mobilenet_v2, num_classes=8, width_mult=0.35),
    "torchvision mobilenet_v3": partial(torchvision.models.mobilenet_v3_small, num_classes=8),
    "torchvision convnext": partial(
        torchvision.models.ConvNeXt,
        [
            torchvision.models.convnext.CNBlockConfig(16, 32, 2),
            torchvision.models.convnext.CNBlockConfig(32, None, 2),
        ],
        num_classes=8,
    ),
    "torchvision swin": partial(
        torchvision.models.SwinTransformer, [4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=8
    ),
    "torchvision video resnet": partial(
        torchvision.models.video.resnet.VideoResNet, torchvision.models.video.resnet.BasicBlock,
        [torchvision.models.video.resnet.Conv3DSimple] * 4, [2, 1, 1, 1],
        torchvision.models.video.resnet.BasicStem, num_classes=8,
    ),
    "torchvision video swin": partial(
        torchvision.models.video.SwinTransformer3d, [2, 4, 4], 16, [2, 2], [2, 2], [2, 2, 2], num_classes=8,
    ),
    "torchvision video mvit, projections after the attention": partial(video_mvit, True),
    "torchvision video mvit, projections after the mlp": partial(video_mvit, False),
    "torchvision vit": partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=8),
}  # fmt: skip

# Blocks of every kind that the sums see: written adapters and traced ones, maps, tokens, channels last, volumes.
QUICK = {(name, "auto") for name in ("resnet", "convnext", "vit", "swin", "mvitv2, blocks that give back a size")}
QUICK |= {("convit, a token that joins in the middle", "auto"), ("torchvision video resnet", "auto")}
QUICK |= {(name, "batch") for name in ("resnet", "torchvision mobilenet_v2")}


@cache
def made(name: str) -> nn.Module:
    torch.manual_seed(5)
    settings = {"num_classes": 8} if "torchvision" not in name else {}
    host = HOSTS[name](**settings).double().eval()
    with torch.no_grad():  # layer scales and last norms that start near zero would hide a wrong branch
        for parameter in host.parameters():
            if parameter.ndim <= 1 or parameter.shape[0] == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return host


def host_of(name: str) -> nn.Module:
    return copy.deepcopy(made(name))


def images(name: str) -> Tensor:
    settings = getattr(HOSTS[name], "keywords", {})
    side = settings.get("img_size", 32 if "vit" in name or "swin" in name or "video" in name else 64)
    frames = [4] if "video" in name else []
    return torch.randn(2, 3, *frames, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def example(name: str) -> Tensor | None:
    """What plugging is to run a host on, where it is made for clips of a size that nothing names."""
    return images(name) if name.startswith("torchvision video mvit") else None


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    (net(x).square().sum()).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None and "shortcut" not in name}


def weights(net: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in ds.shortcut_parameters(net)]


@pytest.mark.long
@pytest.mark.parametrize("name", HOSTS)
def test_the_nearest_map_as_it_is_gives_the_host_and_its_gradients(name):
    host, x = host_of(name), images(name)
    expected, slopes = host(x), gradients(host, x)
    net = ds.plug_in(host, norm=None, init="nearest", example=example(name))
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    found = gradients(net, x)
    assert found.keys() == slopes.keys()
    for key, slope in slopes.items():
        torch.testing.assert_close(found[key], slope, rtol=1e-6, atol=1e-9 * float(slope.abs().max() + 1), msg=key)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights(net))


@pytest.mark.long
@pytest.mark.parametrize("name", HOSTS)
def test_keep_identity_starts_as_the_host_bit_for_bit_and_unplugs_to_it(name):
    host, x = host_of(name), images(name)
    expected, keys = host(x), list(host.state_dict())
    classes = {key: type(m) for key, m in host.named_modules()}
    net = ds.plug_in(host, keep_identity=True, example=example(name))
    assert torch.equal(net(x), expected)
    for p in weights(net):
        nn.init.uniform_(p, 0.1, 0.5)  # a constant one may only scale the maps, which a last layer norm undoes
    assert not torch.allclose(net(x), expected)
    ds.unplug(net)
    assert torch.equal(net(x), expected) and list(net.state_dict()) == keys
    assert {key: type(m) for key, m in net.named_modules()} == classes


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=[] if (name, norm) in QUICK else pytest.mark.long)
        for norm in ("auto", "batch")
        for name in HOSTS
    ],
)
def test_back_ends_agree_on_every_family(name, norm):
    x, results = images(name), []
    plugged = ds.plug_in(host_of(name), norm=norm, init="uniform", example=example(name)).train()
    for backend in ("plain", "auto"):
        net = copy.deepcopy(plugged)
        for stage in ds.dense_stages(net).values():
            for shortcut in stage.shortcuts.values():
                shortcut.backend = backend
        torch.manual_seed(1)  # for drop path and dropout
        results.append((net(x), gradients(net, x)))
    (y, slopes), (other, others) = results
    torch.testing.assert_close(other, y, rtol=1e-6, atol=1e-6)
    for key, slope in slopes.items():  # batch norm over two images of few pixels multiplies roundings
        torch.testing.assert_close(others[key], slope, rtol=1e-4, atol=1e-6 * float(slope.abs().max() + 1), msg=key)


@pytest.mark.parametrize("name", ["convnext", "vit", "mobilenetv3", "torchvision regnet", "sknet"])
def test_traced_blocks_copy_and_pickle(name):
    net, x = ds.plug_in(host_of(name), init="uniform"), images(name)
    expected = net(x)
    assert any(isinstance(m, TracedBlock) for m in net.modules())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected)
        nn.init.zeros_(weights(other)[0])
        assert torch.equal(net(x), expected)
        ds.unplug(other)


@pytest.mark.parametrize("name", ["resnest", "sknet", "torchvision mobilenet_v2"])
def test_fusing_a_traced_network_keeps_its_output(name):
    net, x = ds.plug_in(host_of(name), norm="batch", init="uniform").eval(), images(name)
    fused = ds.fuse(net)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-8, atol=1e-8)
    folded = [m for m in fused.modules() if type(m) is nn.BatchNorm2d]
    assert len(folded) < len([m for m in net.modules() if type(m) is nn.BatchNorm2d])


def test_a_written_adapter_can_be_registered_and_is_used():
    class Scaled(nn.Module):
        """Not to be traced: its forward pass looks at the data."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x) * (2.0 if x.sum() > 0 else 0.5)

    net, x = nn.Sequential(nn.Sequential(Scaled(), Scaled())).double(), images("resnet")[:, :1].expand(-1, 4, -1, -1)
    with pytest.raises(ds.DenseShortcutError, match="Scaled"):
        ds.plug_in(net)
    expected = net(x)

    @ds.register_adapter
    class DenseScaled(ds.DenseBlock, Scaled):
        def branch(self, x: Tensor) -> tuple[Tensor, None]:
            return self.conv(x) * (2.0 if x.sum() > 0 else 0.5), None

        def out_channels(self) -> int:
            return 4

    torch.testing.assert_close(ds.plug_in(net, norm=None, init="nearest")(x), expected, rtol=1e-12, atol=1e-12)
    assert type(net[0][0]) is DenseScaled


def test_a_host_may_use_the_names_of_the_adapters_methods():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.inner, self.project = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Identity()
            self.out_channels, self.tokens = 4, None

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x) + self.branch(self.inner(x))

    net, x = nn.Sequential(Block(), Block()).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = net(x)
    torch.testing.assert_close(ds.plug_in(net, norm=None, init="nearest")(x), expected, rtol=1e-12, atol=1e-12)


def test_a_list_of_blocks_that_its_owner_does_not_chain_is_refused():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([block(x) for block in self.blocks]).sum(0)

    with pytest.raises(ds.DenseShortcutError, match="does not feed each block to the next"):
        ds.plug_in(Parallel())


def test_a_network_of_another_class_has_its_rows_cut_where_it_changes_the_map():
    class OfSomebody(timm.models.convit.ConVit):
        """Its class is not known by anybody."""

    net = OfSomebody(depth=3, embed_dim=16, num_heads=2, img_size=32, patch_size=8, local_up_to_layer=2)
    assert [(s.name, s.segment.first, s.segment.stop) for s in ds.plan(net).stages] == [
        ("blocks", 0, 2),
        ("blocks", 2, 3),
    ]


def test_blocks_that_their_host_sets_to_add_no_shortcut_stay_as_they_are():
    planned = ds.plan(host_of("vovnet"))
    assert [(s.name, s.segment.first, s.segment.stop) for s in planned.stages] == [
        ("stages.2.blocks", 1, 3),
        ("stages.3.blocks", 1, 2),
    ]
    assert [r.reason for r in planned.refused] == ["it is set to add no shortcut"] * 2


def test_a_network_whose_blocks_add_no_shortcut_is_refused_for_that():
    with torch.device("meta"):
        net = timm.create_model("ese_vovnet19b_dw")
    with pytest.raises(
        ds.DenseShortcutError, match=r"OsaBlock at stages\.0\.blocks\.0: it is set to add no shortcut\.$"
    ):
        ds.plug_in(net)


def test_a_block_of_a_dense_stage_called_by_itself_says_so():
    net = ds.plug_in(host_of("resnet"))
    for block in (net.layer1[0], ds.plug_in(host_of("convnext")).stages[0].blocks[0]):
        with pytest.raises(ds.DenseShortcutError, match="called by itself"):
            block(torch.zeros(1, 64, 8, 8, dtype=torch.float64))


# What a refusal prints


class Looks(nn.Module):
    """Looks at its data, so that no trace understands it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def f(self, x: Tensor) -> Tensor:
        return self.conv(x) * (2.0 if x.sum() > 0 else 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class TakesMore(Looks):
    def forward(self, x: Tensor, gate: Tensor, size: tuple[int, int] = (3, 3), *, power: float = 1.0, **more: Any):
        return x + self.f(x) * gate * power


class GivesTwo(Looks):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.conv(x), x


class Outer:
    class Inside(Looks):
        """Its name has a dot in it."""


class Runs(nn.Module):
    def __init__(self, cls: type[nn.Module], two: bool = False, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks, self.two, self.given = nn.ModuleList([cls() for _ in range(3)]), two, given

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.two:
                x, _ = block(x, **self.given)
            else:
                x = block(x, **self.given)
        return x


def local_class() -> type[nn.Module]:
    class Local(Looks):
        pass

    return Local


@pytest.mark.parametrize(
    ("cls", "branch", "given"),
    [
        (Looks, "self.f(x)", {}),
        (Outer.Inside, "self.f(x)", {}),
        (local_class(), "self.f(x)", {}),
        (TakesMore, "self.f(x) * gate * power", {"gate": torch.tensor(0.3), "power": 2.0}),
        (GivesTwo, "self.conv(x)", {}),
    ],
)
def test_the_adapter_that_a_refusal_prints_works_once_its_dots_are_filled_in(cls, branch, given, monkeypatch):
    monkeypatch.setattr(adapters, "_WRITTEN", dict(adapters._WRITTEN))
    host = Runs(cls, two=cls is GivesTwo, **given).double()
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plan(host)
    text = str(error.value).partition("\n\n")[2]
    assert ("import Local" in text, "in_stage" in text) == (False, cls in (TakesMore, GivesTwo))
    text = text.replace("return ..., None", f"return {branch}, None").replace("return ...", "return 4")
    text = text.replace("return x, ...", "return x, x")
    exec(text, {} if "<locals>" not in cls.__qualname__ else {"Local": cls})
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = host(x)
    assert torch.equal(ds.plug_in(copy.deepcopy(host), keep_identity=True)(x), expected)
    torch.testing.assert_close(ds.plug_in(host, norm=None, init="nearest")(x), expected, rtol=1e-12, atol=1e-12)


class Weighed(Looks):
    def forward(self, x):
        return 0.7 * x + 0.3 * self.conv(x)


class Gated(Looks):
    def forward(self, x):
        gate = torch.sigmoid(self.conv(x))
        return gate * x + (1 - gate) * torch.tanh(self.conv(x))


class Wraps(Looks):
    def forward(self, x):
        return x + self.conv(x)


class TwoSums(Looks):
    def forward(self, x):
        x = torch.relu(x + self.conv(x))
        return torch.relu(x + torch.tanh(self.conv(x)))


@pytest.mark.parametrize("cls", [Weighed, Gated, TwoSums])
def test_a_block_that_adds_two_branches_is_refused_for_that_and_not_for_where_it_stands(cls):
    with pytest.raises(ds.DenseShortcutError, match="it adds two branches, neither of which is its input as it is"):
        ds.plan(nn.Sequential(cls(), cls()))


def test_blocks_outside_a_sequence_are_refused_for_that_without_an_adapter_that_would_not_help():
    class Attributes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Wraps(), Wraps()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plan(Attributes())
    assert "Wraps at first is a residual block, but it stands in no sequence" in str(error.value)
    assert "\n" not in str(error.value)

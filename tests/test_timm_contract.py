"""What timm promises of every network: ours keep it, and what a host keeps it keeps when plugged in.

Every family of timm that `plug_in` serves has one host here, its smallest network or one made small. A promise that a
host itself does not keep, such as a forward pass that torch.fx can trace, is not asked of it: each is tried on the host
first. Of our own networks every promise is asked.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from hosts import assert_close, randomise_parameters
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import create_feature_extractor
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import NodePathTracer

import dense_shortcuts as ds
from dense_shortcuts.experiments.support.subject import randomise

CLASSES = 7


class Subject(NamedTuple):
    """A network by its name at timm, the side of the images that it is given, and options that make it small."""

    name: str
    side: int
    options: dict[str, Any] = {}  # noqa: RUF012 (read only)

    def create(self, **options: Any) -> nn.Module:
        """The network in evaluation mode with random numbers: no start or statistic hides a branch or a shortcut."""
        torch.manual_seed(0)
        net = timm.create_model(self.name, **{"num_classes": CLASSES} | self.options | options)
        randomise_parameters(ds.shortcut_parameters(net), seed=3)
        randomise(net, self.images())
        return net

    def create_plugged(self, **options: Any) -> nn.Module:
        net = ds.plug_in(self.create(**options))
        randomise_parameters(ds.shortcut_parameters(net), seed=3)
        return net

    def images(self) -> Tensor:
        return torch.randn(2, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))


HOSTS = {
    "beit": Subject("beit_base_patch16_224", 224, {"depth": 3, "embed_dim": 48, "num_heads": 3}),
    "byoanet": Subject("halonet_h1", 256),
    "byobnet": Subject("test_byobnet", 64),
    "cait": Subject("cait_xxs24_224", 224, {"depth": 3, "embed_dim": 48}),
    "coat": Subject("coat_tiny", 224, {"embed_dims": (32, 32, 32, 32), "parallel_depth": 2}),
    "convit": Subject("convit_tiny", 224, {"depth": 3, "local_up_to_layer": 2}),
    "convmixer": Subject("convmixer_768_32", 64),
    "convnext": Subject("test_convnext", 64),
    "cpubone": Subject("cpubone_nano", 64),
    "crossvit": Subject("crossvit_tiny_240", 240),
    "csatv2": Subject("csatv2", 64),
    "cspnet": Subject("cs3darknet_focus_s", 64),
    "cspnext": Subject("cspnext_tiny", 64),
    "davit": Subject("davit_tiny", 64, {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)}),
    "deepseek_vit": Subject("deepseek_vit_412m", 224, {"depth": 3, "embed_dim": 64, "num_heads": 4}),
    "deit": Subject("deit_tiny_patch16_224", 224, {"depth": 3}),
    "dla": Subject("dla46x_c", 64),
    "edgenext": Subject("edgenext_xx_small", 64),
    "efficientformer": Subject("efficientformer_l1", 224),
    "efficientformer_v2": Subject("efficientformerv2_s0", 224),
    "efficientnet": Subject("mobilenetv2_035", 64),
    "efficientvim": Subject("efficientvim_m1", 64),
    "efficientvit_mit": Subject("efficientvit_b0", 64),
    "efficientvit_msra": Subject("efficientvit_m0", 224),
    "eva": Subject("vit_tiny_patch16_dinov3_qkvb", 256, {"depth": 3}),
    "fasternet": Subject("fasternet_t0", 64),
    "fastvit": Subject("fastvit_t8", 64),
    "focalnet": Subject("focalnet_tiny_srf", 64),
    "gcvit": Subject("gcvit_xxtiny", 224),
    "gemma4_vit": Subject(
        "gemma4_vit_167m", 96, {"depth": 3, "embed_dim": 48, "num_heads": 3, "head_dim": 16, "intermediate_size": 96}
    ),
    "ghostnet": Subject("ghostnet_050", 64),
    "hardcorenas": Subject("hardcorenas_b", 64),
    "hgnet": Subject("hgnetv2_b0", 64),
    "hiera": Subject("hiera_tiny_224", 224, {"embed_dim": 24}),
    "hieradet_sam2": Subject("sam2_hiera_tiny", 64, {"embed_dim": 24}),
    "hrnet": Subject("hrnet_w18_small", 64),
    "iformer": Subject("iformer_t", 64),
    "inception_next": Subject("inception_next_atto", 64),
    "inception_resnet_v2": Subject("inception_resnet_v2", 96),
    "lcnetv2": Subject("lcnetv2_small", 64),
    "levit": Subject("levit_128s", 224),
    "lowformer": Subject("lowformer_b0", 64),
    "mambaout": Subject("test_mambaout", 64),
    "maxxvit": Subject("test_coatnet", 160),
    "metaformer": Subject("poolformerv2_s12", 64),
    "mlp_mixer": Subject("gmlp_ti16_224", 224),
    "mobilenetv3": Subject("mobilenetv3_small_050", 64),
    "mobilenetv5": Subject("mobilenetv5_base", 64, {"channel_multiplier": 0.25}),
    "mobilevit": Subject("mobilevit_xxs", 64),
    "mvitv2": Subject("mvitv2_tiny", 224),
    "naflexvit": Subject("naflexvit_base_patch16_parfac_gap", 224, {"depth": 3, "embed_dim": 48, "num_heads": 3}),
    "nest": Subject("nest_tiny", 224),
    "nextvit": Subject("nextvit_small", 64),
    "nfnet": Subject("test_nfnet", 64),
    "pit": Subject("pit_ti_224", 224),
    "pvt_v2": Subject("pvt_v2_b0", 64),
    "qwen3_vit": Subject("qwen3_vit_88m", 96, {"depth": 3, "embed_dim": 48, "num_heads": 3}),
    "regnet": Subject("regnetx_002", 64),
    "repghost": Subject("repghostnet_050", 64),
    "repvit": Subject("repvit_m1", 64),
    "res2net": Subject("res2next50", 64, {"layers": (1, 2, 2, 1)}),
    "resnest": Subject("resnest14d", 64),
    "resnet": Subject("test_resnet", 64),
    "resnetv2": Subject("resnetv2_18", 64),
    "senet": Subject("legacy_seresnet18", 64),
    "sequencer": Subject(
        "sequencer2d_s", 224, {"layers": (1, 2, 1, 1), "embed_dims": (48, 48, 48, 48), "hidden_sizes": (12, 12, 12, 12)}
    ),
    "shvit": Subject("shvit_s1", 128),
    "sknet": Subject("skresnet18", 64),
    "starnet": Subject("starnet_s050", 64),
    "swiftformer": Subject("swiftformer_xs", 224),
    "swin_transformer": Subject(
        "swin_tiny_patch4_window7_224", 64, {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)}
    ),
    "swin_transformer_v2": Subject(
        "swinv2_tiny_window8_256", 64, {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)}
    ),
    "swin_transformer_v2_cr": Subject(
        "swinv2_cr_tiny_224", 64, {"img_size": 64, "embed_dim": 24, "depths": (2, 2, 2, 2)}
    ),
    "tiny_vit": Subject("tiny_vit_5m_224", 64),
    "tnt": Subject("tnt_s_legacy_patch16_224", 224, {"depth": 3}),
    "tresnet": Subject("tresnet_m", 64, {"layers": (1, 1, 2, 1)}),
    "twins": Subject("twins_svt_small", 224, {"depths": (1, 1, 2, 1)}),
    "visformer": Subject("visformer_tiny", 224),
    "vision_transformer": Subject("test_vit", 160),
    "vision_transformer_hybrid": Subject("vit_tiny_r_s16_p8_224", 224, {"depth": 3}),
    "vision_transformer_relpos": Subject("test_vit_relpos", 160),
    "vision_transformer_sam": Subject("samvit_base_patch16_224", 224, {"depth": 3, "embed_dim": 48, "num_heads": 3}),
    "vitamin": Subject("vitamin_small_224", 224),
    "volo": Subject("volo_d1_224", 224),
    "vovnet": Subject("eca_vovnet39b", 64),
    "xception": Subject("legacy_xception", 96),
    "xception_aligned": Subject("xception41p", 64),
    "xcit": Subject("xcit_nano_12_p8_224", 224, {"depth": 3}),
}

NARROW = {"channels": (16, 32, 64, 128)}  # widths that groups of 32 divide; the depth stays
CIFAR = ["dsnet20", "dsnet32", "dsnet56", "dsnet110", "dsnet29"]
OURS = {name: Subject(name, 32) for name in CIFAR} | {"dsnet50_cifar": Subject("dsnet50_cifar", 32, NARROW)}
OURS |= {name: Subject(name, 64, NARROW) for name in ds.list_models() if name not in OURS}


Create = Callable[..., Any]


def runs_forward(create: Create, x: Tensor) -> None:
    """Finite logits for each image, the same ones again."""
    net = create()
    with torch.no_grad():
        logits = net(x)
        assert logits.shape == (len(x), CLASSES) and logits.isfinite().all()
        assert torch.equal(net(x), logits)


def runs_backward(create: Create, x: Tensor) -> None:
    """A finite gradient for every parameter."""
    net = create().train()
    net(x).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in net.parameters())


def has_the_layers_of_its_cfg(create: Create, x: Tensor) -> None:
    """The first convolution and the classifier have the names that they are said to have, and the latter can go."""
    net = create()
    first, last = (as_list(net.default_cfg[key]) for key in ("first_conv", "classifier"))
    assert first and last and {f"{name}.weight" for name in (*first, *last)} <= net.state_dict().keys()
    with torch.no_grad():
        pooled = net.forward_head(net.forward_features(x), pre_logits=True)
        net.reset_classifier(0)
        assert torch.equal(net(x), pooled) and pooled.shape == (len(x), net.head_hidden_size)
    assert not {f"{name}.weight" for name in last} & net.state_dict().keys()


def has_last_maps_of_the_size_of_its_cfg(create: Create, x: Tensor) -> None:
    net = create()
    axes = (1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else (2, 3)
    full, pool = net.default_cfg["input_size"][1], net.default_cfg["pool_size"][0]
    with torch.no_grad():
        features = net.forward_features(x)
    assert [features.shape[axis] for axis in axes] == [x.shape[2] * pool // full] * 2


def gives_the_features_that_it_names(create: Create, x: Tensor) -> None:
    """features_only gives as many maps as feature_info names, of these channels and sizes."""
    net = create(features_only=True)
    with torch.no_grad():
        check_maps(net(x), net.feature_info.get_dicts(), x, channels_last="NHWC" in str(getattr(net, "output_fmt", "")))


def gives_the_intermediates_that_it_names(create: Create, x: Tensor) -> None:
    """As many as feature_info names, of these channels and sizes; the same ones when asked for alone."""
    net = create()
    with torch.no_grad():
        last, maps = net.forward_intermediates(x)
        check_maps(maps, net.feature_info, x)
        assert torch.equal(last, net.forward_features(x))
        for index in (1, -1):
            (alone,) = net.forward_intermediates(x, indices=[index], intermediates_only=True, stop_early=True)
            assert torch.equal(alone, maps[index])


def keeps_its_bits_when_traced(create: Create, x: Tensor) -> None:
    net = create()
    with torch.no_grad():
        assert_same_bits(traced(net)(x), net(x))


def keeps_its_bits_when_traced_to_a_node(create: Create, x: Tensor) -> None:
    """torchvision's extractor gives the map of a stage or block in the middle of the network."""
    net = create()
    name = net.feature_info[len(net.feature_info) // 2]["module"]
    seen: list[Tensor] = []
    with torch.no_grad():
        found = create_feature_extractor(net, [name])(x)[name]
        net.get_submodule(name).register_forward_hook(lambda module, given, result: seen.append(result))
        net(x)
    assert_same_bits(found, seen[0])


def trains_alike_when_traced(create: Create, x: Tensor) -> None:
    """The same loss to the bit, and the same gradients, in float64: roundings of float32 grow in batch norms."""
    net = create().train()
    assert_same_bits(*(loss_of(each, x) for each in (net, traced(copy.deepcopy(net)))))
    net = net.double()
    twin = traced(copy.deepcopy(net))
    for each in (net, twin):
        loss_of(each, x.double()).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    rounding = 1e-12 * max(p.grad.abs().max() for p in net.parameters())
    for name, p in net.named_parameters():
        if p.grad.abs().max() > rounding:
            assert_close(gradients[name], p.grad, 1e-5, name)
        else:  # of a norm in front of the shortcut's, which is zero but for roundings
            assert gradients[name].abs().max() <= 2 * rounding, name


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(4)
    return net(x).square().mean()


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected.double(), 1e-4, "the graph's result")
    same = torch.equal(found, expected)
    assert same, "the graph's result differs by rounding"


def as_list(names: str | tuple[str, ...] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def check_maps(maps: list[Tensor], info: Any, x: Tensor, channels_last: bool = False) -> None:
    """That maps are finite and as they are stated: how many, how many channels each, how much smaller than an image."""
    assert len(maps) == len(info)
    for found, stated in zip(maps, info, strict=True):
        channels, *sides = found.shape[1:] if not channels_last else (found.shape[3], *found.shape[1:3])
        assert channels == stated["num_chs"] and found.isfinite().all()
        assert all(abs(side - x.shape[2] / stated["reduction"]) <= 1 for side in sides)  # padded or not


def traced(net: nn.Module) -> nn.Module:
    """The whole network as a graph, in its present mode, with timm's own list of what is not looked into."""
    leaves, functions = list(get_notrace_modules()), list(get_notrace_functions())
    tracer = NodePathTracer(leaf_modules=leaves, autowrap_functions=functions, param_shapes_constant=True)
    return GraphModule(net, tracer.trace(net))


FACTS = [
    runs_forward,
    runs_backward,
    has_the_layers_of_its_cfg,
    has_last_maps_of_the_size_of_its_cfg,
    gives_the_features_that_it_names,
    gives_the_intermediates_that_it_names,
    keeps_its_bits_when_traced,
    keeps_its_bits_when_traced_to_a_node,
    trains_alike_when_traced,
]
TRACED = FACTS[-3:]
# a block's own method in place of a call passes by the shortcuts
TAP = (AttributeError, "can only be called, and the host asks for forward_with_tap")
# timm marks the block as a leaf of traces, and a call of a leaf cannot be given what a stage adds
LEAF = (NotImplementedError, "ResidualAdd")
REFUSED = {("xception_aligned", gives_the_intermediates_that_it_names): TAP} | {
    ("nfnet", fact): LEAF for fact in TRACED
}
TRACED_OFTEN = {"dsnet20", "dsnet29", "dsnet18", "dsnet50", "dsnet50_cifar", "se_dsnet50", "ds2net50"}
OFTEN = {  # hosts with an adapter, traced ones, those with containers or arguments of their own
    *("resnet", "convnext", "mobilenetv3", "nfnet", "byobnet", "dla", "mambaout", "maxxvit"),
    *("vision_transformer", "vision_transformer_relpos", "deit", "swin_transformer"),
}


@lru_cache(maxsize=4)
def made(subject: str, plugged: bool, **options: Any) -> nn.Module:
    """A network that is made once for all facts; each is tried on a copy."""
    found = (OURS | HOSTS)[subject]
    return found.create_plugged(**options) if plugged else found.create(**options)


def sweep(subjects: Iterable[str], mark: Any, is_marked: Callable[[str, Any], bool]) -> list[Any]:
    """Each fact of each subject, those of one subject together; some are marked."""
    return [
        pytest.param(name, fact, id=f"{name}-{fact.__name__}", marks=[mark] if is_marked(name, fact) else [])
        for name, fact in itertools.product(subjects, FACTS)
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "fact"), sweep(OURS, pytest.mark.long, lambda name, fact: name not in TRACED_OFTEN and fact in TRACED)
)
def test_our_networks_keep_what_timm_promises(name, fact):
    fact(lambda **options: copy.deepcopy(made(name, False, **options)), OURS[name].images())


@pytest.mark.parametrize(("name", "fact"), sweep(HOSTS, pytest.mark.families, lambda name, fact: name not in OFTEN))
def test_a_plugged_network_keeps_what_its_host_does(name, fact):
    host = HOSTS[name]
    if not timm.is_model(host.name):
        pytest.skip(f"this timm has no {host.name}")
    made(name, False)  # a network that cannot be made is no host that does not keep a promise
    try:
        fact(lambda **options: copy.deepcopy(made(name, False, **options)), host.images())
    except Exception:  # whatever a host does in place of keeping it: it is not asked of the plugged one then
        return
    refused = REFUSED.get((name, fact))
    with pytest.raises(refused[0], match=refused[1]) if refused else nullcontext():
        fact(lambda **options: copy.deepcopy(made(name, True, **options)), host.images())


def test_every_family_that_can_be_plugged_has_a_host_here():
    table = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    planned = re.findall(r"^\| timm (\w+) \| \d+ \| [1-9]\d* \| \d+ \|$", table, re.MULTILINE)
    assert len(planned) > 80 and set(planned) == set(HOSTS)

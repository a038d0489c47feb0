"""A DenseNet as a dense summation: the same numbers and gradients, the same parameters, and no concatenation."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import summation

KINDS = ("timm", "torchvision")
SMALL = {"growth_rate": 4, "block_config": (3, 2, 2), "num_classes": 5}


def densenet(kind: str, **settings) -> nn.Module:
    """A small DenseNet in float64 whose norms have numbers of their own."""
    torch.manual_seed(0)
    settings = SMALL | settings
    if kind == "torchvision":
        net = torchvision.models.DenseNet(num_init_features=8, **settings)
    else:
        net = timm.models.densenet.DenseNet(**settings)
    net = net.double()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for numbers in (norm.weight.data, norm.bias.data, norm.running_mean):
                numbers.normal_(0.5)
            norm.running_var.uniform_(0.5, 2)
    return net


def images(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, name: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(
    "settings", [{"bias": False}, {"stride": 2, "padding": 1}, {"padding_mode": "reflect", "padding": 1}]
)
def test_a_convolution_over_a_concatenation_is_a_sum_of_convolutions(settings):
    conv = nn.Conv2d(7, 6, 3, **settings).double()
    maps = [torch.randn(2, c, 9, 8, dtype=torch.float64, requires_grad=True) for c in (1, 4, 2)]
    inputs = [*maps, *conv.parameters()]
    expected, got = conv(torch.cat(maps, 1)), summation.sum_of_convolutions(conv, maps)
    assert_close(got, expected)
    upstream = torch.randn_like(got)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), wanted, strict=True):
        assert_close(a, b)


def test_what_cannot_be_summed_is_refused():
    maps = [torch.randn(1, 2, 4, 4)] * 2
    with pytest.raises(ds.DenseShortcutError, match="2 groups"):
        summation.sum_of_convolutions(nn.Conv2d(4, 4, 1, groups=2), maps)
    with pytest.raises(ds.DenseShortcutError, match="4 channels and the convolution takes 5"):
        summation.sum_of_convolutions(nn.Conv2d(5, 4, 1), maps)
    with pytest.raises(ds.DenseShortcutError, match="ResNet is not a DenseNet"):
        summation.split(torchvision.models.resnet18())
    with pytest.raises(ds.DenseShortcutError, match="catavgmax"):
        summation.split(timm.models.densenet.DenseNet(global_pool="catavgmax", **SMALL))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(densenet("torchvision"))
    with pytest.raises(ds.DenseShortcutError, match="SyncBatchNorm, which cannot be split"):
        summation.split(synchronised)


def test_densenet121_of_timm_gives_the_same_scores_in_float64():
    net = timm.create_model("densenet121", num_classes=10).double().eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    x = images(2, 64)
    with torch.no_grad():
        assert_close(summation.split(net)(x), net(x))
        layer = net.features.denseblock2.denselayer12
        maps = [torch.randn(1, c, 8, 8, dtype=torch.float64) for c in (128, *[32] * 11)]
        assert_close(summation.layer_of_sums(layer, maps), layer(maps))


@pytest.mark.parametrize("settings", [{}, {"drop_rate": 0.3}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_network_trains_as_its_host_does(kind, recompute, settings):
    host = densenet(kind, **{key: value for key, value in settings.items() if key != "momentum"}).train()
    for norm in host.modules():
        if isinstance(norm, nn.BatchNorm2d) and "momentum" in settings:
            norm.momentum = None
    twin = copy.deepcopy(host)
    net = summation.split(twin, recompute=recompute)
    for step in (1, 2):  # the cumulative average moves differently in the second
        x = images()
        for model in (host, net):
            torch.manual_seed(step)
            model.zero_grad()
            model(x).square().sum().backward()
    for (name, wanted), got in zip(host.named_parameters(), twin.parameters(), strict=True):
        assert_close(got.grad, wanted.grad, name)
    for (name, wanted), got in zip(host.named_buffers(), twin.buffers(), strict=True):
        assert_close(got, wanted, name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_concatenation_of_feature_maps_is_ever_built(kind, monkeypatch):
    def cat(tensors, *args, **kwargs):
        assert all(t.ndim < 4 for t in tensors), "a concatenation of feature maps"
        return real(tensors, *args, **kwargs)

    real = torch.cat
    monkeypatch.setattr(torch, "cat", cat)
    host = densenet(kind).train()
    for recompute in (False, True):
        summation.split(host, recompute=recompute)(images()).sum().backward()
    with pytest.raises(AssertionError, match="a concatenation"):
        host(images())


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of feature maps that one forward pass keeps for the backward pass, every storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.ndim == 4 and not isinstance(t, nn.Parameter) and t.shape[0] == x.shape[0]:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    out.sum().backward()
    return sum(kept.values())


def test_a_split_network_keeps_less_and_with_recomputation_no_normalised_map():
    host, x = densenet("torchvision", block_config=(8, 2, 2)).train(), images()
    whole, summed = kept_bytes(host, x), kept_bytes(summation.split(host), x)
    recomputed = kept_bytes(summation.split(host, recompute=True), x)
    assert recomputed < 0.7 * summed < 0.7 * whole
    assert summation.split(densenet("torchvision", memory_efficient=True)).recompute
    assert summation.split(densenet("timm", memory_efficient=True)).recompute
    assert not summation.split(host).recompute


@pytest.mark.parametrize("kind", KINDS)
def test_host_and_split_network_share_parameters_and_keys(kind):
    host = densenet(kind).train()
    net = summation.split(host)
    assert list(net.state_dict()) == list(host.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), host.parameters(), strict=True))
    before, x = copy.deepcopy(host.state_dict()), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    changed = [key for key, value in host.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == len(before)
    assert_close(net.eval()(x), host.eval()(x))

"""What counters of operations say of a plugged network, whatever back end runs."""

import copy

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import dense_shortcuts as ds
from dense_shortcuts.ops import flops


def counted(net: torch.nn.Module, x: torch.Tensor, **options) -> int:
    with FlopCounterMode(display=False, **options) as counter:
        net(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["plain", "native"])
def test_a_pair_costs_one_multiply_add_for_each_number(backend, grad, depth):
    """12 blocks are summed in tiles, which changes the order of the work and not its amount."""
    host = timm.create_model("resnet18", layers=(depth, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        before = counted(host, x)
        net = ds.plug_in(host, backend=backend, norm=None)
        options = {"custom_mapping": flops.PLAIN} if backend == "plain" else {}
        after = counted(net, x, **options)
    pairs = [
        stage.shortcut.pairs * 2 * 8 * size**2
        for stage, size in zip(ds.dense_stages(net).values(), (16, 8, 4, 2), strict=True)
    ]
    assert after - before == 2 * sum(pairs)


def test_the_backward_pass_is_counted_too():
    net = ds.plug_in(timm.create_model("resnet18", num_classes=2), backend="native")
    x = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    found = counter.get_flop_counts()["Global"]
    named = {str(operator): count for operator, count in found.items() if "dense_shortcuts" in str(operator)}
    assert set(named) == {"dense_shortcuts.dense_add", "dense_shortcuts.pull"}
    assert all(count > 0 for count in named.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # fvcore traces by torch.jit
@pytest.mark.parametrize("norm", ["group", "batch", None])
def test_fvcore_counts_a_multiply_add_for_each_number_of_a_pair(norm):
    analysis = pytest.importorskip("fvcore.nn", reason="fvcore is not installed").FlopCountAnalysis
    x, found = torch.randn(2, 3, 64, 64), []
    host = timm.create_model("resnet18", layers=(3, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2).eval()
    for net in (copy.deepcopy(host), ds.plug_in(host, norm=norm)):
        counter = analysis(net, x).set_op_handle(**flops.FVCORE_HANDLES).unsupported_ops_warnings(False)
        counter.uncalled_modules_warnings(False).tracer_warnings("none")
        found.append(counter.by_operator())
    pairs = [
        stage.shortcut.pairs * 2 * 8 * size**2
        for stage, size in zip(ds.dense_stages(host).values(), (16, 8, 4, 2), strict=True)
    ]
    assert found[1] - found[0] == {"addcmul": sum(pairs)}

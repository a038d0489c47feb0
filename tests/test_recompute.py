"""Activation checkpointing trains exactly as training without it: batches are counted once."""

import copy

import hosts
import pytest
import timm
import torch

import dense_shortcuts as ds


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("variant", [{"norm": "batch"}, {"norm": "group"}, {"norm": "batch", "inner": True}], ids=str)
def test_five_steps_with_and_without_recomputation_end_with_the_same_bits(variant, backend):
    torch.manual_seed(0)
    net = timm.create_model("resnet26", channels=(8, 8, 16, 16), layers=(2, 12, 1, 1), num_classes=3)
    ds.plug_in(net, **variant, backend=backend)
    twin = copy.deepcopy(net)
    twin.set_grad_checkpointing(True)
    x, passes = torch.randn(4, 3, 64, 64), []
    for each in (net, twin):
        each.layer1[1].conv1.register_forward_hook(lambda *_: passes.append(1))
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            each((step + 1) * x).square().sum().backward()
            optimizer.step()
    assert len(passes) == 5 + 10  # each step of the second ran it twice
    counters = [value for name, value in twin.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counters and all(value == 5 for value in counters)
    for (name, value), other in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_momentum_and_counters_are_put_back_when_the_recomputation_fails():
    stage = ds.plug_in(hosts.small_net(), norm="batch").layer1.train()
    norm, calls = stage[0].bn1, []

    def fail(*_: object) -> None:
        calls.append(norm.momentum)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    stage[1].conv1.register_forward_pre_hook(fail)
    y = torch.utils.checkpoint.checkpoint(stage, torch.randn(2, 8, 5, 7, requires_grad=True), use_reentrant=False)
    counted = int(norm.num_batches_tracked)
    with pytest.raises(RuntimeError, match="out of memory"):
        y.sum().backward()
    assert norm.momentum == 0.1 and norm.num_batches_tracked == counted == 1

"""The baseline of the benchmark computes what the library does: the equations, in training and in evaluation."""

import copy

import pytest
import timm
import torch
from hosts import make_stage, randomise, randomise_parameters
from reference import stage_maps
from torch import nn

import dense_shortcuts as ds
from dense_shortcuts.experiments.bench.public_form import PublicStage, public_dsnet


def copy_weights(dense: nn.Module, public: PublicStage) -> None:
    """Shortcut weights and running statistics of a plugged stage with batch norm, pair by pair."""
    for k, pairs in enumerate(public.pairs):
        for i, (norm, conv) in enumerate(pairs):
            with torch.no_grad():
                conv.weight.copy_(dense.shortcut.weights[k][i].view_as(conv.weight))
            norm.load_state_dict(dense.shortcut.norms[i].state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_public_form_gives_outputs_and_gradients_of_the_equations_and_of_a_plugged_stage(training, stride):
    host = make_stage("timm_bottleneck", 4, 16, in_channels=8, stride=stride).double()
    randomise(host, seed=1)
    blocks = list(copy.deepcopy(host).children())
    public = PublicStage(list(copy.deepcopy(host).children())).double()
    dense = ds.plug_in(nn.Sequential(host), norm="batch", backend="plain")[0]
    randomise_parameters(dense.shortcut.named_parameters(), seed=2)
    for norm in dense.shortcut.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    copy_weights(dense, public)
    norms = [nn.BatchNorm2d(16, affine=False).double() for _ in blocks]
    for norm, own in zip(norms, dense.shortcut.norms, strict=True):
        norm.load_state_dict(own.state_dict())
    for module in (dense, public, *blocks, *norms):
        module.train(training)

    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    weights = [w.detach().clone().requires_grad_() for w in dense.shortcut.weights]
    outputs = [dense(inputs[0]), public(inputs[1]), stage_maps(blocks, inputs[2], weights, norms)[-1]]
    head = torch.randn_like(outputs[0])
    for y in outputs:
        (y * head).sum().backward()

    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[1], outputs[2])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(inputs[1].grad, inputs[2].grad)
    for k, pairs in enumerate(public.pairs):
        for i, (norm, conv) in enumerate(pairs):
            torch.testing.assert_close(conv.weight.grad.flatten(), dense.shortcut.weights[k].grad[i])
            torch.testing.assert_close(conv.weight.grad.flatten(), weights[k].grad[i])
            torch.testing.assert_close(norm.running_mean, dense.shortcut.norms[i].running_mean)
            torch.testing.assert_close(norm.running_var, dense.shortcut.norms[i].running_var)


def test_the_public_form_of_a_whole_network_starts_as_its_dsnet():
    torch.manual_seed(3)
    public = public_dsnet("resnet26")
    dense = timm.create_model("resnet26")
    pairs = {"pairs", "blocks"}
    own = {k.replace(".blocks", ""): v for k, v in public.state_dict().items() if ".pairs." not in k}
    assert pairs <= {part for key in public.state_dict() for part in key.split(".")}
    dense.load_state_dict(own)
    dense = ds.plug_in(dense, norm="batch", init="nearest")
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        torch.testing.assert_close(public.train(training)(x), dense.train(training)(x), rtol=1e-3, atol=1e-4)
    added = sum(p.numel() for name, p in public.named_parameters() if ".pairs." in name)
    assert added == sum(p.numel() for _, p in ds.shortcut_parameters(dense))

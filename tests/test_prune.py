"""Pruned networks: the least pairs go, the rest compute what they did, and a checkpoint builds itself again."""

import copy

import hosts
import pytest
import timm
import torch

import dense_shortcuts as ds
from dense_shortcuts.surgery import sparsify as prune


def network(**variant) -> torch.nn.Module:
    net = timm.create_model("dsnet20", num_classes=5, **variant).double().eval()
    hosts.randomise(net, seed=1)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=2)
    return net.double()


def test_pairs_are_ranked_over_the_whole_network_and_every_block_keeps_its_best():
    net = network()
    found = prune.pairs(net)
    assert len(found) == 3 * 6
    name = "layer2.shortcut"
    wanted = ds.dense_stages(net)["layer2"].shortcut.weights[2][1].abs().mean()
    assert next(p for p in found if (p.shortcut, p.block, p.map) == (name, 2, 1)).weight == pytest.approx(wanted.item())
    kept = prune.choose(found, 0.6)
    assert len(kept) == 11
    best = {place: max(p.weight for p in found if (p.shortcut, p.block) == place) for place in places(found)}
    assert places(kept) == places(found)
    assert all(best[place] in [p.weight for p in kept if (p.shortcut, p.block) == place] for place in best)
    others = [p for p in found if p.weight != best[p.shortcut, p.block]]
    least = min(p.weight for p in kept if p in others)
    assert all(p.weight < least for p in others if p not in kept)
    assert prune.choose(found, 1) == found and len(prune.choose(found, 1e-9)) == 9


def places(found) -> set[tuple[str, int]]:
    return {(pair.shortcut, pair.block) for pair in found}


@pytest.mark.parametrize("variant", [{}, {"norm": "batch"}, {"norm": None}, {"aggregate": "block"}], ids=str)
def test_a_pruned_network_is_one_whose_other_weights_are_zero(variant):
    net, x = network(**variant), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sources = prune.sources_of(prune.choose(prune.pairs(net), 0.6), net)
    before = copy.deepcopy(net.state_dict())
    pruned = prune.with_sources(net, sources)
    zeroed = copy.deepcopy(net)
    for name, shortcut in prune.shortcuts(zeroed).items():
        for k, maps in enumerate(shortcut.sources):
            for row, i in enumerate(maps):
                if i not in sources[name][k]:
                    shortcut.weights[k].data[row] = 0
    for backend in ("plain", "native"):
        for model in (pruned, zeroed):
            for shortcut in prune.shortcuts(model).values():
                shortcut.backend = backend
        torch.testing.assert_close(pruned(x), zeroed(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(pruned(x), net(x))
    torch.testing.assert_close(ds.fuse(pruned)(x), pruned(x).detach(), rtol=1e-9, atol=1e-9)
    count = lambda model: sum(p.numel() for _, p in ds.shortcut_parameters(model))  # noqa: E731
    assert count(pruned) < 0.7 * count(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    pruned(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in ds.shortcut_parameters(pruned))


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(ds.DenseShortcutError, match="not plugged in"):
        prune.pairs(timm.create_model("resnet18"))
    with pytest.raises(ds.DenseShortcutError, match="nothing to rank by"):
        prune.pairs(timm.create_model("dsnet20", aggregate="dense_identity"))
    for keep in (0, -1, 1.01):
        with pytest.raises(ds.DenseShortcutError, match="is no share"):
            prune.choose([], keep)
    with pytest.raises(ds.DenseShortcutError, match=r"no shortcut layer9\.shortcut"):
        prune.with_sources(network(), {"layer9.shortcut": [[0]]})
    with pytest.raises(ds.DenseShortcutError, match="does not have all the pairs"):
        prune.with_sources(network(), {"layer1.shortcut": [[0], [0], [0, 7]]})

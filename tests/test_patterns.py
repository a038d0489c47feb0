"""Which maps a block sums and by which weights: every back end against loops written from the definitions, float64."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts import assert_close, randomise
from test_trace import C, Plain, network
from torch import Tensor, nn

import dense_shortcuts as ds

DEPTH = 6


def distances(pattern: str, window: int | None, depth: int) -> list[int]:
    """The distances l - i at which a block sums a map."""
    known = {"all": list(range(1, depth + 1)), "powers": [1, 2, 4, 8, 16, 32]}[pattern]
    return [d for d in known if d <= (window or depth)]


def weights_of(weighting: str, parameter: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """A weight for each map, that broadcasts to it."""
    if weighting == "attention":
        scores = []
        for x in maps:
            pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
            key = pooled / (pooled.pow(2).sum(1, keepdim=True) / C + 1e-6).sqrt()
            scores.append((key * parameter).sum(1) / C**0.5)
        largest = torch.stack(scores).exp()
        return [(each / largest.sum(0))[:, None, None, None] for each in largest]
    rows = []
    for i in range(len(maps)):
        if weighting == "channel":
            row = parameter[i]
        elif weighting == "gate":
            row = 1 / (1 + (-parameter[i]).exp())
        else:
            row = parameter[i].exp() / parameter.exp().sum(0)
        rows.append(row.reshape(1, -1, 1, 1))
    return rows


def reference(
    host: nn.Sequential,
    parameters: dict[int, Tensor],
    x: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    weighting: str = "channel",
    pattern: str = "all",
    window: int | None = None,
) -> Tensor:
    """X_L of `host[1]`, whose block l has the dense shortcut of parameters[l], or its host's where it has none."""
    maps = [host[0](x)]
    for l, block in enumerate(host[1], 1):  # noqa: E741 (the paper's name)
        total = block.f(maps[-1])
        if l not in parameters:
            maps.append(total + maps[-1])
            continue
        summed = sorted(l - d for d in distances(pattern, window, DEPTH) if d <= l)
        for weight, i in zip(weights_of(weighting, parameters[l], [maps[i] for i in summed]), summed, strict=True):
            total = total + weight * norm(maps[i])
        maps.append(total)
    return maps[-1]


NORMS: dict[Any, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "group": lambda x: nn.functional.group_norm(x, 2),
    "layer": lambda x: nn.functional.layer_norm(x, x.shape[1:]),
}
CASES: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 3},
    {"every": 2},
    {"every": 3, "window": 4},
    {"pattern": "powers"},
    {"pattern": "powers", "window": 2, "norm": None},
    {"weighting": "softmax"},
    {"weighting": "softmax", "norm": None, "every": 2},
    {"weighting": "gate"},
    {"weighting": "gate", "pattern": "powers", "norm": "layer"},
    {"weighting": "attention"},
    {"weighting": "attention", "norm": None, "window": 3},
    {"weighting": "attention", "pattern": "powers", "norm": "layer"},
]


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_every_gradient_match_loops_written_from_the_definitions(case, backend):
    host = network(Plain, DEPTH)
    randomise(host, seed=7)
    host.double().eval()
    options = {"norm": "group"} | case
    plugged = ds.plug_in(copy.deepcopy(host), **options, backend=backend)
    chosen = [n for n in range(1, DEPTH + 1) if n % case.get("every", 1) == 0]
    own = [p for _, p in ds.shortcut_parameters(plugged)]
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in own:
            p.copy_(torch.randn(p.shape, generator=generator))
    parameters = {n: p.detach().clone().requires_grad_() for n, p in zip(chosen, own, strict=True)}
    rule = {key: case[key] for key in ("weighting", "pattern", "window") if key in case}
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    expected = reference(host, parameters, theirs, NORMS[options["norm"]], **rule)
    actual = plugged(mine)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    actual.backward(upstream)
    expected.backward(upstream)

    assert_close(actual, expected, 1e-10, "output")
    assert_close(mine.grad, theirs.grad, 1e-10, "gradient of the input")
    for (n, wanted), p in zip(parameters.items(), own, strict=True):
        assert wanted.grad.abs().max() > 0 or n == 1 or case.get("window") == 1
        assert_close(p.grad, wanted.grad, 1e-10, f"gradient of the weights of block {n}")
    for name, p in host.named_parameters():
        if p.grad is not None:
            assert_close(plugged.get_parameter(name).grad, p.grad, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize(
    ("case", "pairs"), zip(CASES[:6], [6, 15, 12, 7, 14, 11], strict=True), ids=[str(c) for c in CASES[:6]]
)
def test_the_number_of_pairs_is_that_of_the_pattern(case, pairs):
    (stage,) = ds.plan(network(Plain, DEPTH), **case).stages
    assert stage.pairs == pairs
    sizes = [len(maps) for maps in stage.shortcut.sources if maps]
    assert [p.shape[0] for p in stage.shortcut.weights] == sizes


def test_the_starts_of_the_weightings_are_what_they_are_called():
    host = network(Plain, 3).eval()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    near = host(x)
    for weighting, bound in (("softmax", 0.25), ("gate", 0.25)):
        net = ds.plug_in(copy.deepcopy(host), norm=None, weighting=weighting, init="nearest")
        assert 0 < (net(x) - near).abs().max() < bound * near.abs().max(), weighting
    for weighting, init in itertools.product(("softmax", "attention"), ("uniform",)):
        net = ds.plug_in(copy.deepcopy(host), norm=None, weighting=weighting, init=init)
        uniform = ds.plug_in(copy.deepcopy(host), norm=None, init="uniform")
        assert_close(net(x), uniform(x), 1e-6, weighting)  # 1/3 in float32

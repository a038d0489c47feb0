"""What is looked at in a plugged network. A check returns "yes", "no: ..." or "host: ..." where the host fails as well.

On the meta device the same calls are made and shapes alone are compared.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.plug import plug_in, shortcut_parameters, unplug
from .names import build
from .subject import Subject, randomise


def run(subject: Subject) -> dict[str, str]:
    """The result of every check by its name."""
    return {name: _result(check, subject) for name, check in CHECKS.items()}


def _result(check: Callable[[Subject], str], subject: Subject) -> str:
    try:
        return check(subject)
    except Exception as error:  # the sweep goes on and the table says what went wrong
        return f"no: {type(error).__name__} {' '.join(str(error).split())[:100]}"


def _yes(condition: bool, otherwise: str) -> str:
    return "yes" if condition else f"no: {otherwise}"


def _tensors(output: Any) -> list[Tensor]:
    """All that a network gives, for a backbone may give a map of each stage."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for each in (output.values() if isinstance(output, dict) else output) for tensor in _tensors(each)]


def _equal(found: Any, expected: Any) -> bool:
    """Bit for bit; on the meta device, in shape."""
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    return all(a.shape == b.shape and (b.is_meta or torch.equal(a, b)) for a, b in pairs)


def _close(found: Any, expected: Any) -> bool:
    """To the roundings of float32, by the scale of the largest number; on the meta device, in shape."""
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    return all(a.shape == b.shape and (b.is_meta or _near(a, b)) for a, b in pairs)


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@torch.no_grad()
def _forward(subject: Subject) -> str:
    found, expected = subject.plugged(subject.x), subject.host(subject.x)
    shapes = [[tuple(tensor.shape) for tensor in _tensors(output)] for output in (found, expected)]
    if shapes[0] != shapes[1]:
        return f"no: {shapes[0]} in place of {shapes[1]}"
    if subject.on_meta:
        return "yes"
    finite = all(bool(tensor.isfinite().all()) for tensor in _tensors(found))
    return _yes(finite and not _equal(found, expected), "not finite, or the host's output")


@torch.no_grad()
def _keeps_host(subject: Subject) -> str:
    host, x = copy.deepcopy(subject.host).double(), subject.x.double()
    expected = host(x)
    return _yes(_equal(plug_in(host, keep_identity=True)(x), expected), "the output moved")


def _step(subject: Subject) -> str:
    network = copy.deepcopy(subject.plugged).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)  # whose step does not shrink with the gradient
    before = {name: p.detach().clone() for name, p in shortcut_parameters(network)}
    sum(tensor.square().mean() for tensor in _tensors(network(subject.x))).backward()  # type: ignore[union-attr]
    if subject.on_meta:
        still = [name for name, p in shortcut_parameters(network) if p.grad is None]
        return _yes(not still, f"{len(still)} of {len(before)} weights have no gradient, such as {still[:1]}")
    optimizer.step()
    still = [name for name, p in shortcut_parameters(network) if torch.equal(p, before[name]) or not p.isfinite().all()]
    return _yes(not still, f"{len(still)} of {len(before)} weights stay, such as {still[:1]}")


@torch.no_grad()
def _features(subject: Subject) -> str:
    x, timms = subject.x, subject.place.library == "timm"
    try:
        backbone: Any = _timm_features(subject) if timms else _torchvision_features(copy.deepcopy(subject.host))
        expected = backbone(x)
    except Exception as error:  # not every network has them
        return f"host: {type(error).__name__}"
    if timms:
        found = plug_in(backbone, keep_identity=True)(x)
    else:
        found = _torchvision_features(plug_in(copy.deepcopy(subject.host), keep_identity=True))(x)
    return _yes(_close(found, expected), "features moved")


def _timm_features(subject: Subject) -> nn.Module:
    backbone = build(subject.place, subject.x.device, features_only=True)
    randomise(backbone, subject.x)
    return backbone


def _torchvision_features(network: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """What torchvision extracts from a network: the output of its last module but one."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    net = create_feature_extractor(network, [get_graph_node_names(network)[1][-2]])
    return lambda x: list(net(x).values())


@torch.no_grad()
def _compiles(subject: Subject) -> str:
    def compiled(model: nn.Module) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, backend="eager")(subject.x)

    try:
        found = compiled(subject.plugged)
    except Exception:  # a graph break, which may be the host's own
        try:
            compiled(subject.host)
        except Exception as error:
            return f"host: {type(error).__name__}"
        raise
    return _yes(_close(found, subject.plugged(subject.x)), "another output")


@torch.no_grad()
def _round_trip(subject: Subject) -> str:
    other = plug_in(copy.deepcopy(subject.host))
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(subject.plugged.state_dict())
    return _yes(_equal(other(subject.x), subject.plugged(subject.x)), "another output")


@torch.no_grad()
def _unplugs(subject: Subject) -> str:
    back, host = unplug(copy.deepcopy(subject.plugged)), subject.host
    same = _equal(back(subject.x), host(subject.x))
    return _yes(same and list(back.state_dict()) == list(host.state_dict()), "the host did not come back")


CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward": _forward,
    "keeps host": _keeps_host,
    "step": _step,
    "features": _features,
    "compile": _compiles,
    "state dict": _round_trip,
    "unplug": _unplugs,
}

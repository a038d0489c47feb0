"""`dsnet support`: what plugging does to one network of every architecture that timm and torchvision have."""

import copy
import dataclasses
import datetime
import fnmatch
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import DenseShortcutError
from .plug import plan, plug_in, shortcut_parameters, unplug

# Families whose networks have no stage of residual blocks, and what they have instead.
NOT_RESIDUAL = {
    "alexnet": "a chain of convolutions",
    "densenet": "concatenations in place of shortcuts",
    "googlenet": "concatenations of branches",
    "inception": "concatenations of branches",
    "inception_v3": "concatenations of branches",
    "inception_v4": "concatenations of branches",
    "mobileone": "parallel branches that fold into one convolution",
    "repvit": "the sum with a block's input is normalised again before anything else is added",
    "repvgg": "parallel branches that fold into one convolution",
    "squeezenet": "concatenations of branches",
    "shufflenetv2": "concatenations of halves in place of shortcuts",
    "vgg": "a chain of convolutions",
    "rdnet": "concatenations in place of shortcuts",
    "hgnet": "concatenations; its residual blocks stand alone",
    "dpn": "concatenations beside its sums, so that every block is wider than the one before",
    "nasnet": "cells that concatenate branches",
    "pnasnet": "cells that concatenate branches",
    "rexnet": "sums over a part of the channels, for every block is wider than the one before",
    "selecsls": "concatenations of branches",
}
OWN = ("dsnet", "cifar", "small_images")  # modules of this package that register networks
CHECKS = ("forward", "keeps host", "step", "features", "compile", "state dict", "unplug")
LARGEST = 120e6  # parameters; a network above it is planned, and not run


@dataclass(frozen=True)
class Row:
    """What was seen of one network.

    Attributes:
        library, family, name: where it comes from.
        stages: rows of blocks that were plugged; 0 where it was refused.
        refusal: the reason of a refusal, in one line.
        checks: the result of each of CHECKS that was run: "yes", "no: ..." or "host: ..." where the host fails as well.
        parameters, multiply_adds: what plugging adds, as a share of the host's.
        stays: number of blocks in plugged containers that stay as they are.
    """

    library: str
    family: str
    name: str
    stages: int = 0
    refusal: str = ""
    checks: dict[str, str] = dataclasses.field(default_factory=dict)
    parameters: float = 0.0
    multiply_adds: float = 0.0
    stays: int = 0

    @property
    def verdict(self) -> str:
        if self.refusal:
            return "refused"
        return "failed" if any(result.startswith("no") for result in self.checks.values()) else "plugged"


def architectures(pattern: str = "*") -> list[tuple[str, str, str]]:
    """(library, family, name) of one network for each architecture: a small one of a family with the same blocks.

    Blocks are the classes that a plan finds; networks where it finds none count by the classes of all their layers.
    Planning takes longest, so of all networks of a family with the same classes of layers only the smallest is planned,
    and the largest where the smallest has too few blocks.
    """
    alike: dict[Any, list[tuple[int, tuple[str, str, str]]]] = defaultdict(list)
    for library, family, name in _names():
        if not fnmatch.fnmatch(name, pattern):
            continue
        try:
            model = _build(library, name, torch.device("meta"))
        except Exception:  # some networks cannot be built without data; the sweep builds those on the CPU
            alike[library, family, name].append((0, (library, family, name)))
            continue
        size = sum(p.numel() for p in model.parameters())
        alike[library, family, frozenset(type(m) for m in model.modules())].append((size, (library, family, name)))
    smallest: dict[Any, tuple[int, tuple[str, str, str]]] = {}
    for (library, family, layers), members in alike.items():
        blocks, chosen = frozenset[type[nn.Module]](), min(members)
        for member in dict.fromkeys((min(members), max(members))):
            if blocks := _blocks(member[1]):
                chosen = member
                break
        key = (library, family, blocks or layers)
        smallest[key] = min(chosen, smallest.get(key, chosen))
    return sorted(place for _, place in smallest.values())


def _blocks(place: tuple[str, str, str]) -> frozenset[type[nn.Module]]:
    """The classes of blocks that a plan finds in a network; none where it is refused or needs data."""
    try:
        return frozenset(stage.blocks for stage in plan(_build(place[0], place[2], torch.device("meta"))).stages)
    except Exception:  # the sweep says why
        return frozenset()


def _names() -> Iterator[tuple[str, str, str]]:
    import timm
    import torchvision
    from timm.models import list_modules
    from timm.models._registry import _module_to_models

    listed = set(timm.list_models())  # old names of networks are not in it
    for family in list_modules():
        for name in sorted(_module_to_models[family] & listed):
            if family not in OWN:
                yield "timm", family, name
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        yield "torchvision", family, name


def _build(library: str, name: str, device: torch.device, **settings: Any) -> nn.Module:
    import timm
    import torchvision

    with device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(name, **settings)
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **extra)


def examine(library: str, family: str, name: str) -> Row:
    """Plug one network in and look at all that CHECKS names, on small images and the CPU."""
    row = Row(library, family, name)
    torch.manual_seed(0)
    host = _build(library, name, torch.device("cpu")).eval()
    try:
        planned = plan(host)
    except DenseShortcutError as refusal:
        return dataclasses.replace(row, refusal=" ".join(str(refusal).split("\n\n")[0].split()))
    count = sum(p.numel() for p in host.parameters())
    row = dataclasses.replace(
        row, stages=len(planned.stages), parameters=planned.parameters / count, stays=len(planned.refused)
    )
    if count > LARGEST:
        return row
    x = _input(host)
    if x is None:
        return dataclasses.replace(row, checks={"forward": "host: no square image up to 512 pixels passes"})
    plugged = plug_in(copy.deepcopy(host))
    flops = [_flops(model, x) for model in (host, plugged)]
    tests: dict[str, Callable[[], str]] = {
        "forward": lambda: _yes(bool(_first(plugged(x)).isfinite().all()), "not finite"),
        "keeps host": lambda: _keeps_host(host, x),
        "step": lambda: _step(copy.deepcopy(plugged), x),
        "features": lambda: _features(library, name, host, x),
        "compile": lambda: _compiles(plugged, host, x),
        "state dict": lambda: _round_trip(plugged, host, x),
        "unplug": lambda: _unplugs(plugged, host, x),
    }
    checks = {}
    for check in CHECKS:
        try:
            checks[check] = tests[check]()
        except Exception as error:  # the sweep goes on and the table says what went wrong
            checks[check] = f"no: {type(error).__name__} {' '.join(str(error).split())[:100]}"
    return dataclasses.replace(row, checks=checks, multiply_adds=flops[1] / max(flops[0], 1) - 1)


def _yes(condition: bool, otherwise: str) -> str:
    return "yes" if condition else f"no: {otherwise}"


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _input(host: nn.Module) -> Tensor | None:
    """Two images of the smallest size that the host takes."""
    config: Any = getattr(host, "default_cfg", {})
    channels, own = (config.get("input_size") or (3, 224, 224))[:2]
    for side in (64, 96, 128, own, 224, 256, 512):
        x = torch.randn(2, channels, side, side)
        try:
            with torch.no_grad():
                host(x)
        except Exception:  # a size that the host does not take
            continue
        return x
    return None


def _flops(model: nn.Module, x: Tensor) -> int:
    model = copy.deepcopy(model).requires_grad_(False)  # the counter fails on modules that are given a parameter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@torch.no_grad()
def _keeps_host(host: nn.Module, x: Tensor) -> str:
    host, x = copy.deepcopy(host).double(), x.double()
    expected = _first(host(x))
    return _yes(torch.equal(_first(plug_in(host, keep_identity=True)(x)), expected), "the output moved")


def _step(plugged: nn.Module, x: Tensor) -> str:
    plugged.train()
    optimizer = torch.optim.AdamW(plugged.parameters(), lr=1e-3)  # whose step does not shrink with the gradient
    before = {name: p.detach().clone() for name, p in shortcut_parameters(plugged)}
    _first(plugged(x)).square().mean().backward()
    optimizer.step()
    still = [name for name, p in shortcut_parameters(plugged) if torch.equal(p, before[name]) or not p.isfinite().all()]
    return _yes(not still, f"{len(still)} of {len(before)} weights stay, such as {still[:1]}")


def _features(library: str, name: str, host: nn.Module, x: Tensor) -> str:
    try:
        backbone: Any = _timm_features(name) if library == "timm" else _torchvision_features(copy.deepcopy(host))
        expected = backbone(x)
    except Exception as error:  # not every network has them
        return f"host: {type(error).__name__}"
    if library == "timm":
        found = plug_in(backbone, keep_identity=True)(x)
    else:
        found = _torchvision_features(plug_in(copy.deepcopy(host), keep_identity=True))(x)
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
    return _yes(same, "features moved")


def _timm_features(name: str) -> nn.Module:
    return _build("timm", name, torch.device("cpu"), features_only=True).eval()


def _torchvision_features(network: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """What torchvision extracts from a network: the output of its last module but one."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    net = create_feature_extractor(network, [get_graph_node_names(network)[1][-2]])
    return lambda x: list(net(x).values())


def _compiles(plugged: nn.Module, host: nn.Module, x: Tensor) -> str:
    def compiled(model: nn.Module) -> Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            return _first(torch.compile(model, fullgraph=True, backend="eager")(x))

    try:
        found = compiled(plugged)
    except Exception:  # a graph break, which may be the host's own
        try:
            compiled(host)
        except Exception as error:
            return f"host: {type(error).__name__}"
        raise
    with torch.no_grad():
        return _yes(torch.allclose(found, _first(plugged(x)), rtol=1e-3, atol=1e-4), "another output")


@torch.no_grad()
def _round_trip(plugged: nn.Module, host: nn.Module, x: Tensor) -> str:
    other = plug_in(copy.deepcopy(host))
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(plugged.state_dict())
    return _yes(torch.equal(_first(other(x)), _first(plugged(x))), "another output")


@torch.no_grad()
def _unplugs(plugged: nn.Module, host: nn.Module, x: Tensor) -> str:
    back = unplug(copy.deepcopy(plugged))
    same = torch.equal(_first(back(x)), _first(host(x))) and list(back.state_dict()) == list(host.state_dict())
    return _yes(same, "the host did not come back")


def sweep(pattern: str, output: Path, report: Callable[[str], None]) -> list[Row]:
    """Examine every architecture; rows that `output`, a file of JSON lines, has already are kept."""
    done = {(row.library, row.name): row for row in read_rows(output)}
    places = architectures(pattern)
    report(f"{len(places)} architectures, {sum((p[0], p[2]) in done for p in places)} of them done")
    for n, (library, family, name) in enumerate(places, 1):
        if (library, name) in done:
            continue
        try:
            row = examine(library, family, name)
        except Exception as error:  # the sweep goes on and the table says what went wrong
            row = Row(library, family, name, checks={"forward": f"no: {type(error).__name__} {str(error)[:100]}"})
        done[library, name] = row
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        told = row.refusal or "; ".join(f"{k} {v}" for k, v in row.checks.items() if v != "yes") or "all checks pass"
        report(f"{n}/{len(places)} {library} {name}: {row.verdict}, {row.stages} stages; {told[:150]}")
    return [done[library, name] for library, _, name in places]


def read_rows(path: Path) -> list[Row]:
    """The rows that a sweep has written."""
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown(rows: Sequence[Row], command: str) -> str:
    """The report: a summary, a table of what is plugged, one of what is refused."""
    families: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        families[row.library, row.family].append(row)
    residual = {key: found for key, found in families.items() if key[1] not in NOT_RESIDUAL}
    served = [key for key, found in residual.items() if any(row.verdict == "plugged" for row in found)]
    verdicts = {word: sum(row.verdict == word for row in rows) for word in ("plugged", "refused", "failed")}
    lines = [
        "# What can be plugged into",
        "",
        f"Generated by `{command}`, {datetime.date.today()}, timm {version('timm')}, "
        f"torchvision {version('torchvision')}: one network for each architecture (the smallest of "
        "a family with the same blocks), small images, on the CPU.",
        "",
        f"{len(rows)} architectures: {verdicts['plugged']} plugged with every check passed, "
        f"{verdicts['refused']} refused with a reason, {verdicts['failed']} failed a check. "
        f"Of {len(residual)} families with residual blocks "
        f"{len(served)} are served ({100 * len(served) / max(len(residual), 1):.0f} %).",
        "",
        "Checks: a finite forward pass; keep_identity=True gives the host's output bit for bit in float64; a training "
        "step moves every shortcut weight; features_only or torchvision's feature extractor; `torch.compile` in one "
        'graph; the state dict goes round; unplugging gives the host back bit for bit. "host" marks what the host '
        "itself cannot do.",
        "",
        "## Plugged",
        "",
        "| network | family | stages | parameters | multiply-adds | checks that are not plain yes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if not row.refusal:
            odd = "; ".join(f"{check}: {result}" for check, result in row.checks.items() if result != "yes")
            odd = odd or ("" if row.checks else "too large to run here")
            cost = f"+{100 * row.multiply_adds:.2f} %" if row.checks else ""
            added = f"+{100 * row.parameters:.2f} %"
            lines.append(f"| {row.name} | {row.library} {row.family} | {row.stages} | {added} | {cost} | {odd} |")
    lines += ["", "## Refused", "", "| network | family | reason |", "| --- | --- | --- |"]
    for row in rows:
        if row.refusal:
            why = NOT_RESIDUAL.get(row.family)
            lines.append(f"| {row.name} | {row.library} {row.family} | {why or row.refusal.replace('|', '/')} |")
    return "\n".join(lines) + "\n"

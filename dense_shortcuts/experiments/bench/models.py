"""What is compared: families of networks of one depth, or stages of one depth, each with the peer of its ratios."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torchvision
from timm.models.resnet import Bottleneck
from torch import nn

from ...errors import DenseShortcutError
from ...surgery.plug import plug_in
from ..environment import backends
from .config import BenchConfig
from .public_form import PublicStage, public_dsnet

NORMS = ("group", "batch")
SWEEP_WIDTH = 256  # channels of the feature maps in a depth sweep


@dataclass(frozen=True)
class Entry:
    """A network by its name, and the host that it was made from."""

    name: str
    build: Callable[[], nn.Module]
    build_host: Callable[[], nn.Module]


@dataclass(frozen=True)
class Comparison:
    """Networks that take turns on the same input.

    Attributes:
        label: what they have in common.
        peer: the entry to which all are compared.
        entries: the peer among them.
        channels: of the input.
        classes: channels of the output.
        batch_size: images a step.
        depth: blocks of the stage in a depth sweep.
    """

    label: str
    peer: str
    entries: tuple[Entry, ...]
    channels: int
    classes: int
    batch_size: int
    depth: int | None = None


def comparisons(config: BenchConfig, device: str) -> tuple[list[Comparison], dict[str, str]]:
    """What a resolved configuration asks for, and back ends that cannot run here with the reason.

    Raises:
        DenseShortcutError: a name that nothing has, or of a back end that cannot run here.
    """
    runs = backends(device)
    usable = [name for name, refusal in runs.items() if not refusal]
    if config.depths:
        found = [_stage_of(depth, device, usable) for depth in dict.fromkeys(config.depths)]
    else:
        found = [_family(depth, device, usable) for depth in ("50", "101", "152")]
    if config.batch_size is not None:
        found = [dataclasses.replace(each, batch_size=config.batch_size) for each in found]
    _check_names(config.models, {e.name for each in found for e in each.entries}, runs)
    kept = [dataclasses.replace(each, entries=_select(each, config.models)) for each in found]
    return [each for each in kept if each.entries], {name: refusal for name, refusal in runs.items() if refusal}


def _family(depth: str, device: str, usable: Sequence[str]) -> Comparison:
    host, dense = f"resnet{depth}", f"dsnet{depth}"
    build_host = partial(timm.create_model, host)
    others = [partial(_from_torchvision, host), build_host]
    names = [f"torchvision.{host}", f"timm.{host}"]
    if depth == "50":
        wanted = ("densenet121", "densenet169", "densenet201")
        others += [*(partial(_from_torchvision, name) for name in wanted), partial(timm.create_model, "rdnet_tiny")]
        names += [*(f"torchvision.{name}" for name in wanted), "timm.rdnet_tiny"]
    entries = [Entry(name, build, build) for name, build in zip(names, others, strict=True)]
    entries += [
        Entry(f"{dense}/{norm}/{backend}", partial(timm.create_model, dense, norm=norm, backend=backend), build_host)
        for norm in NORMS
        for backend in usable
    ]
    entries.append(Entry(f"public_{dense}", partial(public_dsnet, host), build_host))
    batch_size = 8 if device == "cpu" else 256 if depth == "50" else 128
    return Comparison(f"depth {depth}", names[device == "cpu"], tuple(entries), 3, 1000, batch_size)


def _stage_of(depth: int, device: str, usable: Sequence[str]) -> Comparison:
    host = partial(bare_stage, depth)
    entries = [Entry("host", host, host)]
    entries += [
        Entry(f"dense/{norm}/{backend}", partial(_dense_stage, depth, norm, backend), host)
        for norm in NORMS
        for backend in usable
    ]
    entries.append(Entry("public", partial(_public_stage, depth), host))
    batch_size = 8 if device == "cpu" else 64
    label = f"stage of {depth} block{'s' * (depth > 1)}"
    return Comparison(label, "host", tuple(entries), SWEEP_WIDTH, SWEEP_WIDTH, batch_size, depth)


def _from_torchvision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None)


def bare_stage(depth: int) -> nn.Sequential:
    """One stage of timm's bottlenecks between maps of SWEEP_WIDTH channels, then the mean over pixels: (N, C)."""
    blocks = [Bottleneck(SWEEP_WIDTH, SWEEP_WIDTH // Bottleneck.expansion) for _ in range(depth)]
    return nn.Sequential(nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _dense_stage(depth: int, norm: str, backend: str) -> nn.Module:
    return plug_in(bare_stage(depth), norm=norm, backend=backend)


def _public_stage(depth: int) -> nn.Module:
    stage = bare_stage(depth)
    stage[0] = PublicStage(list(stage[0].children()))
    return stage


def _select(comparison: Comparison, patterns: Sequence[str]) -> tuple[Entry, ...]:
    """The entries that a pattern fits, and their peer where there are any, which goes first."""
    fits = [e for e in comparison.entries if any(fnmatch.fnmatch(e.name, pattern) for pattern in patterns)]
    peer = [e for e in comparison.entries if e.name == comparison.peer]
    return tuple([*peer, *(e for e in fits if e not in peer)] if fits else ())


def _check_names(patterns: Sequence[str], names: set[str], runs: dict[str, str]) -> None:
    for pattern in patterns:
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            continue
        asked = pattern.rsplit("/", 1)[-1]
        if runs.get(asked):
            raise DenseShortcutError(f"{pattern} cannot be measured: {runs[asked]}")
        near = difflib.get_close_matches(pattern, names, n=3) or sorted(names)
        raise DenseShortcutError(f"no network is named {pattern!r}: choose among {', '.join(near)}.")

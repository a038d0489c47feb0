"""What is compared: networks of one depth, a host with what it is plugged, or stages of one depth, each with a peer."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torchvision
from timm.models.resnet import Bottleneck
from torch import nn

from ...errors import DenseShortcutError
from ...surgery.plug import plug_in
from ..environment import backends
from .config import BenchConfig, Mode
from .public_form import PublicStage, public_dsnet

NORMS = ("group", "batch")
HOSTS = ("vit_small_patch16_224", "convnext_tiny", "mobilenetv3_large_100", "swin_tiny_patch4_window7_224")
Variants = dict[str, tuple[str, str]]  # norm and back end by what a name ends in: without a back end what users get
SWEEP_WIDTH = 256  # channels of the feature maps in a depth sweep


@dataclass(frozen=True)
class Entry:
    """A network by its name, and the ResNet that it was made from, if any: `traffic` knows what others move."""

    name: str
    build: Callable[[], nn.Module]
    build_host: Callable[[], nn.Module] | None = None


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
        modes: in which it is measured.
    """

    label: str
    peer: str
    entries: tuple[Entry, ...]
    channels: int
    classes: int
    batch_size: int
    depth: int | None = None
    modes: tuple[Mode, ...] = ("eager",)


def comparisons(config: BenchConfig, device: str) -> list[Comparison]:
    """What a resolved configuration asks for.

    Raises:
        DenseShortcutError: a name that nothing has, or of a back end that cannot run here.
    """
    runs = backends(device)
    variants = {norm: (norm, "auto") for norm in NORMS}
    variants |= {f"{norm}/{name}": (norm, name) for norm in NORMS for name, refusal in runs.items() if not refusal}
    if config.depths:
        found = [_stage_of(depth, device, variants) for depth in dict.fromkeys(config.depths)]
    else:
        found = [_family(depth, device, variants) for depth in ("50", "101", "152")]
        found += [_plugged(name, device) for name in HOSTS]
    _check_names(config.models, {e.name for each in found for e in each.entries}, runs)
    asked: dict[str, Any] = {"batch_size": config.batch_size, "modes": config.modes}
    asked = {field: value for field, value in asked.items() if value}
    kept = [dataclasses.replace(each, entries=_select(each, config.models), **asked) for each in found]
    return [each for each in kept if each.entries]


def _family(depth: str, device: str, variants: Variants) -> Comparison:
    host, dense = f"resnet{depth}", f"dsnet{depth}"
    build_host = partial(timm.create_model, host)
    others = [partial(_from_torchvision, host), build_host]
    names = [f"torchvision.{host}", f"timm.{host}"]
    if depth == "50":
        wanted = ("densenet121", "densenet169", "densenet201")
        others += [*(partial(_from_torchvision, name) for name in wanted), partial(timm.create_model, "rdnet_tiny")]
        names += [*(f"torchvision.{name}" for name in wanted), "timm.rdnet_tiny"]
    entries = [Entry(name, build) for name, build in zip(names, others, strict=True)]
    entries += [
        Entry(f"{dense}/{name}", partial(timm.create_model, dense, norm=norm, backend=backend), build_host)
        for name, (norm, backend) in variants.items()
    ]
    entries.append(Entry(f"public_{dense}", partial(public_dsnet, host), build_host))
    images = {"cpu": 8, "cuda": 256}[device] // (1 if depth == "50" else 2)
    modes = _modes(device, quick=depth == "50")
    return Comparison(f"depth {depth}", names[device == "cpu"], tuple(entries), 3, 1000, images, modes=modes)


def _plugged(host: str, device: str) -> Comparison:
    """A network of another kind, and with the shortcuts that `plug_in` gives it by default."""
    build = partial(timm.create_model, host)
    entries = Entry(f"timm.{host}", build), Entry(f"plugged.{host}", lambda: plug_in(build()))
    images = {"cpu": 4, "cuda": 128}[device]
    return Comparison(host, entries[0].name, entries, 3, 1000, images, modes=_modes(device, quick=False))


def _modes(device: str, quick: bool) -> tuple[Mode, ...]:
    """Both where it does not take minutes to compile a network."""
    return ("eager", "compiled") if quick or device == "cuda" else ("eager",)


def _stage_of(depth: int, device: str, variants: Variants) -> Comparison:
    host = partial(bare_stage, depth)
    entries = [Entry("host", host)]
    entries += [
        Entry(f"dense/{name}", partial(_dense_stage, depth, norm, backend), host)
        for name, (norm, backend) in variants.items()
    ]
    entries.append(Entry("public", partial(_public_stage, depth), host))
    images, modes = {"cpu": 8, "cuda": 64}[device], _modes(device, quick=False)
    label = f"stage of {depth} block{'s' * (depth > 1)}"
    return Comparison(label, "host", tuple(entries), SWEEP_WIDTH, SWEEP_WIDTH, images, depth, modes)


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

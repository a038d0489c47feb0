"""A backbone with the interface of detection toolboxes: out_indices, frozen_stages, norm_eval, a tuple of maps.

It needs no such toolbox, and accepts any network that timm builds with features_only: a DSNet, a host, or a host
that is plugged in here.
"""

import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import DenseShortcutError
from .files import read_tensors
from .models import list_models
from .nn.inner_shortcut import InnerShortcut
from .nn.shortcut import DenseShortcut
from .surgery.load import load, shortcut_keys
from .surgery.plug import dense_stages, plug_in, unplug

_logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Feature maps of a timm network, from fine to coarse.

    Args:
        model: a timm name, or a features_only network, in which everything but dense shortcuts counts as loaded. The
            levels of a network are fixed, so `out_indices`, `finest` and `pretrained` require a name.
        out_indices: levels to return, numbered as in timm's `feature_info` (0 is the stem of a ResNet); None means the
            last level of each stride from `finest` on, or of every stride if fewer than two are that coarse.
        finest: smallest stride for out_indices=None.
        frozen_stages: -1 freezes nothing, 0 the stem, 1 the stem and the first stage, and so on. This concerns loaded
            parameters and modules only: what is newly initialised, such as dense shortcuts, keeps training.
        norm_eval: whether batch norms with loaded statistics use these in training too.
        pretrained: whether to load timm's pretrained weights.
        weights: a .safetensors file with weights of this network or of its host, instead of timm's.
        **options: keywords of `plug_in`. With any of them, a network that is not a DSNet is plugged in, and a given
            network is changed in place; `aggregate` may also be "identity", for the host.

    Attributes:
        channels, reductions: number of channels and stride of each map that `forward` returns.
        loaded: the state-dict keys of `features` that were loaded.
        notes: sentences on what was loaded, what is frozen and what still trains; they are logged too.

    Raises:
        DenseShortcutError: an unknown name, level or stage, a network without feature maps, weights of another network,
            or an error of `plug_in`.
        TypeError: an unknown keyword.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        out_indices: Sequence[int] | None = None,
        finest: int = 4,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        pretrained: bool = False,
        weights: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        features: Any
        if isinstance(model, str):
            features = create_features(model, out_indices=out_indices, finest=finest, pretrained=pretrained, **options)
        else:
            if out_indices is not None or finest != 4 or pretrained:
                raise DenseShortcutError(
                    "out_indices, finest and pretrained require the name of a model, and a ready network was given: "
                    "leave them out, or pass them to timm.create_model."
                )
            features = _checked_features(model)
            _set_shortcuts(features, options)
        self.notes: list[str] = []
        self.features = features
        self.channels = tuple(features.feature_info.channels())
        self.reductions = tuple(features.feature_info.reduction())
        self.channels_last_axis = str(getattr(features, "output_fmt", "")).endswith("NHWC")
        if any(b <= a for a, b in zip(self.reductions, self.reductions[1:], strict=False)):
            raise DenseShortcutError(
                f"the levels {features.feature_info.out_indices} have strides {self.reductions}, which must grow: "
                "choose other out_indices."
            )
        self.loaded: frozenset[str] = frozenset()
        if weights is not None:
            tensors, _ = read_tensors(Path(weights))
            self.loaded = self._load(tensors, str(weights))
        elif pretrained or not isinstance(model, str):
            self.loaded = frozenset(features.state_dict().keys() - shortcut_keys(features))
        self.frozen, self.norm_eval = (frozen_modules(features, frozen_stages) if frozen_stages >= 0 else []), norm_eval
        if frozen_stages >= 0:
            self._freeze()
        if norm_eval and not any(self._is_loaded(name) for name in self._batch_norms()):
            self._say("norm_eval holds no batch norm, because no statistics were loaded")
        for note in self.notes:
            _logger.info("%s", note)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps (N, C_i, H / r_i, W / r_i) of images (N, 3, H, W), where r_i is `reductions[i]`."""
        maps = self.features(x)
        return tuple(m.permute(0, 3, 1, 2) if self.channels_last_axis else m for m in maps)

    def train(self, mode: bool = True) -> "Backbone":
        """Set training mode, except for frozen modules, and for batch norms if norm_eval holds them."""
        super().train(mode)
        if mode:
            held = [name for name in self.frozen if self._is_loaded(name)]
            held += [name for name in self._batch_norms() if self.norm_eval and self._is_loaded(name)]
            for name in held:
                self.features.get_submodule(name).training = False  # not eval(), which would reach new children
        return self

    def _freeze(self) -> None:
        """Turn gradients off for the loaded parameters of the frozen modules."""
        named = {
            f"{name}.{parameter}": p
            for name in self.frozen
            for parameter, p in self.features.get_submodule(name).named_parameters(recurse=False)
        }
        held = [p.requires_grad_(False) for name, p in named.items() if name in self.loaded]
        fresh = [name for name in named if name not in self.loaded]
        count = sum(p.numel() for p in held)
        self._say(f"{count:,} parameters in {len(held)} tensors are frozen" if held else "nothing is frozen")
        if fresh:
            shown = ", ".join(fresh[:4]) + (", ..." if len(fresh) > 4 else "")
            self._say(f"{len(fresh)} tensors of the frozen stages were not loaded and stay trainable: {shown}")

    def _is_loaded(self, name: str) -> bool:
        """Whether all own parameters and buffers of a module were loaded; one without any follows its surroundings."""
        module = self.features.get_submodule(name)
        own = {f"{name}.{k}" for k in [*module._parameters, *module._buffers]}
        own &= self.features.state_dict().keys()
        if own:
            return own <= self.loaded
        return bool(self.loaded) and not isinstance(module, DenseShortcut | InnerShortcut)

    def _batch_norms(self) -> Iterable[str]:
        modules = self.features.named_modules()
        return [name for name, module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def _say(self, note: str) -> None:
        self.notes.append(f"backbone: {note}")

    def _load(self, tensors: Mapping[str, Tensor], where: str) -> frozenset[str]:
        """Load what a file has for this network; returns the keys found. Other tensors are noted, not an error,
        because a backbone has no classifier and may lack late stages."""
        own = {flat(key): key for key in self.features.state_dict()}
        found = {own[flat(key)]: tensor for key, tensor in tensors.items() if flat(key) in own}
        left = sorted(key for key in tensors if flat(key) not in own)
        stages = {flat(name) for name, module in self.features.named_modules() if isinstance(module, nn.Module)}
        # Shortcut keys in a stage of this network that has no such shortcut mean that the weights are of another plan.
        owners = {key: re.split(r"\.shortcut\d*\.", key) for key in left}
        unplaced = [key for key, parts in owners.items() if len(parts) > 1 and flat(parts[0]) in stages]
        fresh = load(self.features, found | {key: tensors[key] for key in unplaced})
        self._say(f"{len(found)} tensors loaded from {where}")
        if fresh:
            self._say(f"{len(fresh)} tensors of dense shortcuts start fresh")
        if left:
            shown = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
            self._say(f"{len(left)} tensors of the file have no place in the backbone: {shown}")
        return frozenset(found)


def create_features(
    name: str,
    *,
    out_indices: Sequence[int] | None = None,
    finest: int = 4,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """timm's features_only network of a name, plugged in if `options` has keywords of `plug_in`.

    Raises:
        DenseShortcutError: a name unknown to timm, a level that the network does not have, missing pretrained weights,
            or an error of `plug_in`.
    """
    import timm

    if not timm.is_model(name):
        raise DenseShortcutError(f"unknown model {name!r}: timm.list_models() lists all names.")
    ours, host = name in list_models(), options.get("aggregate") == "identity"
    settings = options if ours and not host else {}
    try:
        features: Any = timm.create_model(name, features_only=True, pretrained=pretrained, **settings)
        levels = features.feature_info.info
        wanted = usual_levels([level["reduction"] for level in levels], finest)
        if out_indices is not None:
            wanted = checked_levels(name, out_indices, len(levels))
        if wanted != tuple(features.feature_info.out_indices):
            settings = settings | {"out_indices": wanted}
            features = timm.create_model(name, features_only=True, pretrained=pretrained, **settings)
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise
        reason = str(error).split("\n")[0].rstrip(".")
        raise DenseShortcutError(
            f"there are no pretrained weights of {name} ({reason}): give a file with weights, or the name of a host "
            "that has pretrained weights in timm."
        ) from error
    if host or not ours:
        _set_shortcuts(features, options)
    return features


def _set_shortcuts(features: nn.Module, options: dict[str, Any]) -> None:
    """Plug a network in if there are any options; aggregate="identity" unplugs it."""
    known = inspect.signature(plug_in).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"Backbone got an unexpected keyword {name!r}: it takes its own and those of plug_in")
    if options.get("aggregate") == "identity":
        if dense_stages(features):
            unplug(features)
    elif options:
        plug_in(features, **options)


def _checked_features(model: nn.Module) -> Any:
    """`model`, after a check that it describes its feature maps.

    Raises:
        DenseShortcutError: it does not.
    """
    info = getattr(model, "feature_info", None)
    if not callable(getattr(info, "channels", None)) or not callable(getattr(info, "reduction", None)):
        raise DenseShortcutError(
            f"{type(model).__name__} does not say which feature maps it returns: build it with "
            "timm.create_model(name, features_only=True), or give the name."
        )
    return model


def checked_levels(name: str, out_indices: Sequence[int], count: int) -> tuple[int, ...]:
    """The levels in order, as indices from 0."""
    if not out_indices or not all(-count <= index < count for index in out_indices):
        raise DenseShortcutError(f"{name} has the levels 0 to {count - 1}, not {tuple(out_indices)}: choose from them.")
    return tuple(sorted({index % count for index in out_indices}))


def usual_levels(reductions: Sequence[int], finest: int) -> tuple[int, ...]:
    """The last level of each stride from `finest` on, or of every stride if fewer than two are that coarse."""
    last = {reduction: index for index, reduction in enumerate(reductions)}
    coarse = tuple(index for reduction, index in last.items() if reduction >= finest)
    return coarse if len(coarse) > 1 else tuple(last.values())


def frozen_modules(features: nn.Module, frozen_stages: int) -> list[str]:
    """Names of the modules up to the end of stage `frozen_stages` (0 is the stem), in the network's order.

    Raises:
        DenseShortcutError: the network has fewer stages, or does not describe where they are.
    """
    names = {flat(name): name for name, _ in features.named_modules() if name}
    info: Any = features.feature_info
    coarsest = max(index % len(info.info) for index in info.out_indices)
    levels = [level["module"] for level in info.info[: coarsest + 1]]  # later ones are not in the network
    untold = [level for level in levels if flat(level) not in names and "stem" not in level]
    if untold:
        raise DenseShortcutError(
            f"this network does not say which modules {', '.join(untold)} are: freeze its parameters yourself."
        )
    modules = [names[flat(level)] for level in levels if flat(level) in names]
    while modules and _is_stem(modules[0], features.get_submodule(modules[0])):
        del modules[0]
    if frozen_stages > len(modules) or not modules:
        raise DenseShortcutError(
            f"frozen_stages={frozen_stages} is more than the {len(modules)} stages of the network: give fewer."
        )
    ordered = list(names.values())
    if frozen_stages == 0:
        chosen = ordered[: ordered.index(modules[0])]
    else:
        last = modules[frozen_stages - 1]
        end = max(i for i, name in enumerate(ordered) if name == last or name.startswith(f"{last}."))
        chosen = ordered[: end + 1]
    return [name for name in chosen if not any(stage.startswith(f"{name}.") for stage in modules)]


def _is_stem(name: str, module: nn.Module) -> bool:
    """Whether a level is the stem: by its name, or because it is a layer and not a stage of blocks."""
    return "stem" in name or not any(True for child in module.children() for _ in child.children())


def flat(name: str) -> str:
    """A module's name in a form that timm's feature extractors and the whole network share."""
    return name.removeprefix("model.").replace(".", "_")

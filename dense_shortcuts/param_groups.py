"""Parameter groups for an optimizer: what decays, what does not, and the shortcut weights by themselves."""

from typing import Any

from torch import Tensor, nn

from .plug import shortcut_parameters


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers; norms, biases, embeddings and scales are none."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    return [m.weight for m in layers]


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    shortcut_lr: float | None = None,
    shortcut_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of PyTorch or timm, frozen parameters left out, empty groups too.

    Args:
        model: a network, plugged in or not.
        lr: learning rate of the host; None leaves it to the optimizer.
        weight_decay: of the weights of the host's convolutions and linear layers; all else has 0.
        shortcut_lr: learning rate of the shortcut weights; None is the host's.
        shortcut_weight_decay: of the shortcut weights, which without one may stay where they start.

    Returns:
        up to three groups, named "decay", "no_decay" and "shortcut", each parameter in one of them.
    """
    shortcuts = {id(p) for _, p in shortcut_parameters(model)}
    decayed = {id(p) for p in decayed_parameters(model)} - shortcuts
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = lr if shortcut_lr is None else shortcut_lr
    groups = [
        _group("decay", [p for p in trained if id(p) in decayed], weight_decay, lr),
        _group("no_decay", [p for p in trained if id(p) not in decayed | shortcuts], 0.0, lr),
        _group("shortcut", [p for p in trained if id(p) in shortcuts], shortcut_weight_decay, rate),
    ]
    return [group for group in groups if group["params"]]


def _group(name: str, params: list[nn.Parameter], weight_decay: float, lr: float | None) -> dict[str, Any]:
    group = {"name": name, "params": params, "weight_decay": weight_decay}
    return group if lr is None else group | {"lr": lr}

"""Parameter groups for an optimizer: with weight decay, without, and the shortcut weights separately."""

from typing import Any

from torch import Tensor, nn

from .plug import shortcut_parameters


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The weight matrices of a network: of convolutions, of linear layers, and of layers that store them otherwise.

    The latter are nn.MultiheadAttention, recurrent layers, timm's CondConv2d and parametrized layers. Norms, biases,
    embeddings, tokens and scales are not weight matrices.
    """
    found = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if _is_layers_weight(module, parameter) or _is_other_matrix(name, module, parameter):
                found.append(parameter)
    return found


def _is_layers_weight(module: nn.Module, parameter: Tensor) -> bool:
    layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    return layer and parameter is module._parameters.get("weight")


def _is_other_matrix(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is named as a weight and has at least two axes with more than one element."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower():
        return False
    own = name.rpartition("parametrizations.")[2] if ".original" in name else name.rpartition(".")[2]
    return "weight" in own and sum(size > 1 for size in parameter.shape) > 1


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    shortcut_lr: float | None = None,
    shortcut_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of PyTorch or timm, without frozen parameters and empty groups.

    Args:
        model: a network, plugged in or not.
        lr: learning rate of the host; None leaves it to the optimizer.
        weight_decay: weight decay of the host's matrices (`decayed_parameters`); everything else has 0.
        shortcut_lr: learning rate of the shortcut weights; None means the host's.
        shortcut_weight_decay: weight decay of the shortcut weights; with 0 they are not pulled away from their start.

    Returns:
        up to three groups, named "decay", "no_decay" and "shortcut", each parameter in one of them.
    """
    shortcuts = {id(p) for _, p in shortcut_parameters(model)}
    decayed = {id(p) for p in decayed_parameters(model)} - shortcuts
    trained = [p for p in model.parameters() if p.requires_grad]
    shortcut_lr = lr if shortcut_lr is None else shortcut_lr
    groups = [
        _group("decay", [p for p in trained if id(p) in decayed], weight_decay, lr),
        _group("no_decay", [p for p in trained if id(p) not in decayed | shortcuts], 0.0, lr),
        _group("shortcut", [p for p in trained if id(p) in shortcuts], shortcut_weight_decay, shortcut_lr),
    ]
    return [group for group in groups if group["params"]]


def _group(name: str, params: list[nn.Parameter], weight_decay: float, lr: float | None) -> dict[str, Any]:
    group = {"name": name, "params": params, "weight_decay": weight_decay}
    return group if lr is None else group | {"lr": lr}

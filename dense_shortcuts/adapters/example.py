"""A template of the adapter for a block class, as text to paste and fill in."""

import inspect
from inspect import Parameter
from typing import Any

_SIMPLE = (bool, int, float, str, tuple, list, dict, type(None))


def example(cls: Any, several: bool = False) -> str:
    """Lines that define and register an adapter for a block class, with ... where its author has to fill in code.

    Args:
        cls: the block class.
        several: whether it returns more than one tensor, which the adapter must return too.
    """
    name, lines = cls.__qualname__, ["import dense_shortcuts as ds"]
    if cls.__module__ == "__main__" or "<locals>" in name:  # it cannot be imported
        name = cls.__name__
    else:
        lines.append(f"from {cls.__module__} import {name.partition('.')[0]}")
    own = list(inspect.signature(cls.forward).parameters.values())[2:]
    if several or own:
        lines.insert(1, "from dense_shortcuts.nn.block import in_stage")
    lines += [
        "",
        "@ds.register_adapter",
        f"class Dense{cls.__name__}(ds.DenseBlock, {name}):",
        f"    def branch{_takes(own, of_stage=False)}:"
        "  # everything before the add, and its last norm if still to be applied, or None",
        "        return ..., None",
        "    def project(self, x):  # what the block adds to its branch: x, or a projection of x",
        "        return x",
        "    def projects(self):  # whether that is a projection",
        "        return False",
        "    def activation(self):  # what follows the add, or None",
        "        return None",
        "    def out_channels(self):  # channels of its output; `tokens = True` on the class if they are the last axis",
        "        return ...",
    ]
    if several or own:
        lines += [
            f"    def forward{_takes(own, of_stage=True)}:  # like the block's own, with the add left to the stage",
            f"        branch, norm = self.branch(x{_given(own)})",
            "        x = in_stage(residual_add)(branch, norm, self.project(x), self.activation())",
            f"        return {'x, ...  # and what else the block returns' if several else 'x'}",
        ]
    return "\n".join(lines)


def _given(own: list[Parameter]) -> str:
    """A block's further arguments, as its forward pass passes them on."""
    how: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*{0}", Parameter.VAR_KEYWORD: "**{0}"}
    how[Parameter.KEYWORD_ONLY] = "{0}={0}"
    return "".join(", " + how.get(p.kind, "{0}").format(p.name) for p in own)


def _takes(own: list[Parameter], *, of_stage: bool) -> str:
    """The parameters of a method that takes these arguments, in brackets; with `of_stage`, also `residual_add`."""
    first = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "x")]
    others = [p.replace(annotation=p.empty, default=_shown(p.default) if of_stage else p.empty) for p in own]
    last = [p for p in others if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    added = [Parameter("residual_add", Parameter.KEYWORD_ONLY, default=None)] if of_stage else []
    return str(inspect.Signature([*first, *(p for p in others if p not in last), *added, *last]))


def _shown(default: Any) -> Any:
    return default if default is Parameter.empty or isinstance(default, _SIMPLE) else ...

"""argparse from dataclasses: every field of a command is a flag, its type the values, the text below it the help."""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from ..errors import DenseShortcutError
from ..experiments.command import dsnet

T = TypeVar("T")
POSITIONAL = "positional"
Positional = Annotated[T, POSITIONAL]  # the type of a field that is given without a flag

_WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


class Field(NamedTuple):
    """A field of a command or of a configuration inside it; `default` is dataclasses.MISSING for a required one."""

    name: str
    kind: Any
    default: Any
    text: str


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        command = dsnet(*self.prog.split()[1:], "--help")
        raise DenseShortcutError(f"{message}: `{command}` lists what there is.")


def read(arguments: Sequence[str], commands: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The command that is called, and the values of the flags that are given.

    Args:
        arguments: the words behind `dsnet`.
        commands: a dataclass by its word; a word with commands of its own leads to a mapping of them.

    Raises:
        DenseShortcutError: no or an unknown command, an unknown flag, or a value that does not fit.
    """
    parser = Parser(prog="dsnet", description="Dense shortcuts for residual networks.")
    _add_commands(parser, commands)
    known, unknown = parser.parse_known_args(arguments)
    given = vars(known)
    command, own = given.pop("command"), given.pop("parser")
    if unknown:
        own.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, command)}")
    return command, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def build(command: type, given: Mapping[str, Any], config: Any = None) -> Any:
    """The command with the values that are given; `config` is what those of its configuration change."""
    values = {}
    for field in dataclasses.fields(command):
        if (inner := _inner(field)) is not None:
            begun = inner if config is None else config
            names = {each.name for each in dataclasses.fields(begun)} & given.keys()
            values[field.name] = dataclasses.replace(begun, **{name: given[name] for name in names})
        elif field.name in given:
            values[field.name] = given[field.name]
    return command(**values)


def _inner(field: dataclasses.Field[Any]) -> Any:
    """The configuration that a field holds, at its defaults; None for an ordinary field."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return made if dataclasses.is_dataclass(made) else None


def _fields(command: type, start: Any = None) -> Iterator[Field]:
    """The fields of a command; those of a configuration inside it take its place."""
    kinds, texts = typing.get_type_hints(command, include_extras=True), _texts(command)
    for field in dataclasses.fields(command):
        if (inner := _inner(field)) is not None:
            yield from _fields(type(inner), inner)
        else:
            default = field.default if start is None else getattr(start, field.name)
            yield Field(field.name, kinds[field.name], default, texts[field.name])


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for pair in itertools.pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Any]) -> None:
    words = parser.add_subparsers(metavar="COMMAND", required=True)
    for word, command in commands.items():
        if isinstance(command, Mapping):
            _add_commands(words.add_parser(word, help=f"{', '.join(command)}."), command)
            continue
        text = inspect.cleandoc(command.__doc__ or "")
        fields = list(_fields(command))
        named = [field.name.upper() for field in fields if _is_positional(field)]
        usage = " ".join(["%(prog)s", *named, "[flags]"])
        own = words.add_parser(word, help=text.split("\n\n")[0], description=text, usage=usage, allow_abbrev=False)
        own.set_defaults(command=command, parser=own)
        for field in fields:
            _add_flag(own, field)


def _is_positional(field: Field) -> bool:
    return typing.get_origin(field.kind) is Annotated


def _add_flag(parser: argparse.ArgumentParser, field: Field) -> None:
    required = field.default is dataclasses.MISSING
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    note = " (required)" if required else "" if shown in (None, "") else f" (default: {shown})"
    help = (field.text + note).replace("%", "%%")
    kind = field.kind
    if _is_positional(field):
        kind = typing.get_args(kind)[0]
        optional: dict[str, Any] = {} if required else {"nargs": "?", "default": field.default}
        how = {"nargs": "+"} if typing.get_origin(kind) is tuple else optional
        reader = functools.partial(_value, _one(kind))
        parser.add_argument(field.name, metavar=field.name.upper(), help=help, type=reader, **how)
    elif kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(_flag(field.name), help=help, action=action, default=argparse.SUPPRESS)
    else:
        parser.add_argument(
            _flag(field.name),
            help=help,
            type=functools.partial(_value, _one(kind)),
            metavar=_metavar(_one(kind)),
            nargs="*" if typing.get_origin(kind) is tuple else None,
            required=required,
            default=argparse.SUPPRESS,
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one(kind: Any) -> Any:
    """The type of one value, also where a field takes several."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def _inside(kind: Any) -> Any:
    """The type beside None."""
    return next(option for option in typing.get_args(kind) if option is not NoneType)


def _metavar(kind: Any) -> str:
    options = typing.get_args(kind)
    if NoneType in options:
        return f"{_metavar(_inside(kind))}|None"
    return "{" + ",".join(options) + "}" if options else "{True,False}" if kind is bool else kind.__name__.upper()


def _value(kind: Any, text: str) -> Any:
    """A value from its text."""
    options = typing.get_args(kind)
    if NoneType in options:
        return None if text == "None" else _value(_inside(kind), text)
    if typing.get_origin(kind) is Literal:
        if text not in options:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(options)}")
        return text
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {_WORDS[kind]}") from None


def _meant(unknown: Sequence[str], command: type) -> str:
    """The flag that the first unknown one is likely to mean, as a question."""
    flags = [_flag(field.name) for field in _fields(command)]
    near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
    return f" (did you mean {near[0]}?)" if near else ""

"""What jsonargparse's parser knows of an option: its type in words, its neighbours in spelling, its group's fields."""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

_TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def find_action(parser: ArgumentParser, name: str) -> argparse.Action | None:
    """The action of an option; that of the group for an option that exists only through an optional group's type."""
    options = parser._option_string_actions
    group, _, field = name.rpartition(".")
    parent = options.get(group)
    found = options.get(name)
    return found if found is not None or parent is None or field not in _fields_of(parent) else parent


def _fields_of(action: argparse.Action) -> tuple[str, ...]:
    """Names of the fields if the action's type is an optional dataclass."""
    kinds = [kind for kind in _alternatives(_type_of(action)) if dataclasses.is_dataclass(kind)]
    return tuple(field.name for kind in kinds for field in dataclasses.fields(kind))


def tuple_length(action: argparse.Action | None) -> int:
    """n if the option's type is a tuple of n, else 0."""
    for candidate in _alternatives(_type_of(action)):
        parts = typing.get_args(candidate)
        if typing.get_origin(candidate) is tuple and Ellipsis not in parts:
            return len(parts)
    return 0


def _type_of(action: argparse.Action | None) -> object:
    return getattr(action, "_typehint", None) or getattr(action, "type", None)


def _alternatives(hint: object) -> tuple[object, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def expectation(action: argparse.Action | None) -> str | None:
    """What an option's value must be, in words; None for types without a short name."""
    if action is not None and action.choices is not None:
        return f"one of {', '.join(str(choice) for choice in action.choices)}"
    words = [_type_words(candidate) for candidate in _alternatives(_type_of(action))]
    return None if None in words else ", or ".join(word for word in words if word)


def _type_words(hint: object) -> str | None:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(str(value) for value in typing.get_args(hint))}"
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if len(set(parts)) == 1 and parts[0] in (int, float):
            kind = "integers" if parts[0] is int else "numbers"
            return f"{len(parts)} {kind} such as {' '.join(['512'] * len(parts))}"
        return None
    if hint is type(None):
        return "null"
    return _TYPE_WORDS.get(hint) if isinstance(hint, type) else None


def option_names(parser: ArgumentParser) -> list[str]:
    """The options that hold a value, without those of whole groups."""
    actions = parser._option_string_actions
    names = [name for name in actions if name.startswith("--") and not name.endswith(".help")]
    names += [f"{name}.{field}" for name in names for field in _fields_of(actions[name])]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def suggestion(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`: did you mean X?` for a misspelt dotted name, or nothing; X also where only the front part was left out."""
    plain = name.removeprefix(prefix).replace("-", "_")
    bare = {candidate.removeprefix(prefix): candidate for candidate in known}
    same_end = [full for short, full in bare.items() if short.split(".")[-1] == plain.split(".")[-1]]
    begins = [full for short, full in bare.items() if short.startswith(plain)]
    if begins:
        return f": did you mean {' or '.join(begins[:3])}?"
    close = difflib.get_close_matches(plain, bare, n=1, cutoff=0.75)
    if not close and same_end:
        return f": did you mean {' or '.join(same_end[:3])}?"
    close = close or difflib.get_close_matches(plain, bare, n=1, cutoff=0.6)
    return f": did you mean {bare[close[0]]}?" if close else ""

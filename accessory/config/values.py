"""What a value means as a type: from a flag's text or a file's value, with one sentence where it does not fit.

Must not know which settings there are.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from accessory.config.tree import from_text

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def convert(kind: Any, value: Any, *, text: bool) -> Any:
    """`value` as `kind`; text: it comes from a flag, so that "3" may be a number."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(kind, value, text=text)
    if origin is Literal:
        return _choice(members, value)
    if origin in (list, tuple) or kind in (list, tuple):
        return _sequence(kind, value, text=text)
    if kind is Any or kind is dict or origin in (dict, Mapping):
        tree = from_text(value) if text else value
        if kind is not Any and not isinstance(tree, dict):
            raise ValueError(f"got {value!r}, expected a mapping, in a flag written {{key: value}}")
        return tree
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and (isinstance(value, bool) or (text and value.lower() in BOOLS)):
        return value if isinstance(value, bool) else BOOLS[value.lower()]
    if kind in (int, float):
        return _amount(kind, value, text=text)
    remedy = "; put it in quotes" if kind in (str, Path) and isinstance(value, (bool, int, float)) else ""
    raise ValueError(f"got {value!r}, expected {describe(kind)}{remedy}")


def _amount(kind: type, value: Any, *, text: bool) -> int | float:
    """A whole number or a float. YAML reads 1e-5 as a string, which a float field accepts."""
    if isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    if kind is int and text and re.fullmatch(r"[+-]?\d+", value, re.ASCII):
        return int(value)
    try:
        number = float(value) if isinstance(value, str) or type(value) is float else None
    except ValueError:
        number = None
    if number is None or (kind is int and not number.is_integer()):
        raise ValueError(f"got {value!r}, expected {describe(kind)}")
    if kind is int:
        raise ValueError(f"got {value!r}, expected a whole number; write {int(number)}")
    return number


def _union(kind: Any, value: Any, *, text: bool) -> Any:
    """None where it is allowed, else the first member that takes the value; str is asked last."""
    members = typing.get_args(kind)
    if type(None) in members and (value is None or (text and value in ("none", "null", "None", ["none"]))):
        return None
    reason = f"got {value!r}, expected {describe(kind)}"
    wanted = sorted((member for member in members if member is not type(None)), key=lambda member: member is str)
    for member in wanted:
        try:
            return convert(member, value, text=text)
        except ValueError as error:
            reason = str(error) if len(wanted) == 1 else reason
    raise ValueError(reason)


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    """The Literal member that equals the value or is written like it; YAML reads a bare `no` as false."""
    if value is False and "no" in choices:
        return "no"
    for choice in choices:
        if value == choice and type(value) is type(choice) or isinstance(value, str) and value == str(choice):
            return choice
    raise ValueError(f"got {value!r}, expected one of {', '.join(map(str, choices))}")


def _sequence(kind: Any, value: Any, *, text: bool) -> Any:
    """A list or tuple; a single value counts as a list of one, and a flag may say [a, b]."""
    outer, members = typing.get_origin(kind) or kind, typing.get_args(kind)
    if text and isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value, text = from_text(value), False
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None:
        raise ValueError(f"got nothing, expected {describe(kind)}; [] is an empty list")
    kinds: list[Any] = [members[0] if members else Any] * len(items)
    if outer is tuple and members and members[-1] is not Ellipsis:
        kinds = list(members)
    if len(kinds) != len(items):
        raise ValueError(f"got {len(items)} value(s), expected {len(kinds)}")
    return outer(convert(each, item, text=text) for each, item in zip(kinds, items, strict=True))


def is_list(kind: Any) -> bool:
    """Whether a flag of this type takes several values."""
    return typing.get_origin(kind) in (list, tuple) or kind in (list, tuple)


def core_of(kind: Any) -> Any:
    """T of `T | None`; everything else as it is."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        return members[0] if len(members) == 1 else kind
    return kind


def plain(value: Any) -> Any:
    """Lists, dicts and scalars that YAML can write."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def describe(kind: Any) -> str:
    """A type in words."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if member is type(None) else describe(member) for member in members)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if is_list(kind):
        return f"a list, each {describe(members[0])}" if members else "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(kind, "a mapping" if kind is dict or origin in (dict, Mapping) else "any value")

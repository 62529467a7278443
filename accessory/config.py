"""Settings of a verb or script: a dataclass, filled from its defaults, then a YAML or JSON file, then flags.

Must not know what any setting means, nor import torch. A field's name, type, default and the string under it are all
there is to say about a knob; flags, checks and `--help` come from them.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")

_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_PAIR = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_SUFFIXES = (".yaml", ".yml", ".json")
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str = "", description: str = "") -> T:
    """An instance of the dataclass `cls`: default < file < flag.

    argv (None: the process's): an optional leading config file (.yaml, .yml, .json), then `--key value`,
    `--key=value` or `key=value` in any order. Nested dataclasses have dotted keys; `-` in a flag counts as `_`; a bool
    may stand bare; a list takes every value up to the next flag; `none` empties what is optional. Of a setting given
    twice the last counts; a list must not be given twice. `--help` prints the help and ends the process.
    Raises ValueError (unknown key, wrong type, missing value), FileNotFoundError (no such config file).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    knobs = {knob.name: knob for knob in _knobs(cls)}
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(help_text(cls, prog=prog, description=description))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    if argv and argv[0].endswith(_SUFFIXES) and not _PAIR.fullmatch(argv[0]):
        path = argv.pop(0)
        for name, value in _flatten(_read(path), knobs, where=path):
            values[name] = _checked(knobs[name], value, f"{path}: {name}", text=False)
    for name, value, label in _flags(argv, knobs):
        values[name] = _checked(knobs[name], value, label, text=True)
    return _build(cls, values)


def dump(instance: Any, path: str | Path) -> None:
    """Write a dataclass instance as YAML that `parse` reads back to an equal instance; parent folders must exist."""
    text = yaml.safe_dump(_plain(dataclasses.asdict(instance)), sort_keys=False, allow_unicode=True, width=120)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def help_text(cls: type, *, prog: str, description: str = "") -> str:
    """The `--help` of a dataclass: each field's flag, type, docstring and default."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"usage: {prog} [CONFIG.yaml] [--KEY VALUE | KEY=VALUE ...]", ""]
    if description:
        lines += [*textwrap.wrap(description, width), ""]
    for knob in _knobs(cls):
        lines.append(f"  --{knob.name} {_metavar(knob.kind)}")
        text = " ".join(part for part in (knob.doc, _default_text(knob)) if part)
        lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def nearest(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """`; did you mean X?` for the closest of the names, or which names there are."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


# ---- the knobs of a dataclass


@dataclasses.dataclass(frozen=True)
class _Knob:
    """One setting: a leaf field of the dataclass or of a dataclass inside it."""

    name: str
    kind: Any
    default: Any
    doc: str


def _knobs(cls: type, *, prefix: str = "") -> Iterator[_Knob]:
    """All leaf fields, depth first, with dotted names."""
    kinds, docs = typing.get_type_hints(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        inner = _inner(kinds[field.name])
        if inner is not None:
            yield from _knobs(inner, prefix=f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield _Knob(prefix + field.name, kinds[field.name], default, docs.get(field.name, ""))


def _inner(kind: Any) -> type | None:
    """The dataclass that a field nests (also when optional), None for a leaf."""
    core = _core(kind)
    return core if dataclasses.is_dataclass(core) and isinstance(core, type) else None


def _core(kind: Any) -> Any:
    """T of `T | None`; everything else as it is."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        return members[0] if len(members) == 1 else kind
    return kind


def _docs(cls: type) -> dict[str, str]:
    """The strings under the fields, those of base classes included; nothing where the source is out of reach."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError, SyntaxError):
            continue
        for field, below in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def _build(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """The instance; fields that nobody named keep their defaults."""
    kinds, chosen = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, inner = prefix + field.name, _inner(kinds[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in values:
            chosen[field.name] = values[name]
        elif inner is not None and (required or any(key.startswith(f"{name}.") for key in values)):
            chosen[field.name] = _build(inner, values, prefix=f"{name}.")
        elif required and field.init:
            raise ValueError(f"--{name}: missing, expected {_describe(kinds[field.name])}; it has no default")
    return cls(**chosen)


# ---- where values come from


def _flags(argv: list[str], knobs: Mapping[str, _Knob]) -> Iterator[tuple[str, Any, str]]:
    """(name, text or list of texts, label for errors) of each flag and each key=value."""
    lists_seen, at = set(), 0
    while at < len(argv):
        token, at = argv[at], at + 1
        match = _FLAG.fullmatch(token) or _PAIR.fullmatch(token)
        if match is None:
            raise ValueError(f"{token!r}: a value without a flag, expected --key value, --key=value or key=value")
        name, value = match[1].replace("-", "_"), match[2]
        label = token[: match.end(1)]
        if name not in knobs:
            raise ValueError(f"{label}: unknown {'flag' if token[0] == '-' else 'key'}; {nearest(name, knobs)}")
        kind = _core(knobs[name].kind)
        if _is_list(kind):
            if name in lists_seen:
                raise ValueError(f"{label}: given twice, expected once; put all its values after one flag")
            lists_seen.add(name)
        if value is None:
            stop = at + (len(argv) if _is_list(kind) else 1)
            taken = _values(argv[at:stop], knobs)
            if kind is bool and (not taken or taken[0].lower() not in _BOOLS):
                taken, value = [], "true"
            elif not taken:
                raise ValueError(f"{label}: no value, expected {_describe(kind)}; a value like --x goes in {label}=--x")
            else:
                value = taken if _is_list(kind) else taken[0]
            at += len(taken)
        yield name, value, label


def _values(tokens: list[str], knobs: Mapping[str, _Knob]) -> list[str]:
    """The leading tokens that are neither a flag nor a key=value of a known key."""
    taken = []
    for token in tokens:
        pair = _PAIR.fullmatch(token)
        if _FLAG.fullmatch(token) or (pair and pair[1].replace("-", "_") in knobs):
            break
        taken.append(token)
    return taken


def _flatten(tree: Mapping, knobs: Mapping[str, _Knob], *, where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a file's mapping, which may nest or use dotted keys."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in knobs:
            yield name, value
        elif any(known.startswith(f"{name}.") for known in knobs):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{where}: {name}: got {value!r}, expected a mapping of its settings")
            yield from _flatten(value or {}, knobs, where=where, prefix=f"{name}.")
        else:
            raise ValueError(f"{where}: unknown key {name!r}; {nearest(name, knobs)}")


def _read(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; ValueError where it is malformed or names a key twice."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such config file")
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        tree = json.loads(text, object_pairs_hook=_unique) if path.endswith(".json") else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{path}: got a {type(tree).__name__}, expected a mapping of settings, `key: value`")
    return tree or {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError when it names a key twice."""
    for at, (key, _) in enumerate(pairs):
        if any(key == earlier for earlier, _ in pairs[:at]):
            raise ValueError(f"key {key!r} given twice, expected once")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key named twice, where YAML libraries keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} given twice (line {key_node.start_mark.line + 1}), expected once")
            seen.append(key)
        return super().construct_mapping(node, deep=deep)


# ---- values and types


def _checked(knob: _Knob, value: Any, label: str, *, text: bool) -> Any:
    """The value in the knob's type; the ValueError says got, expected and remedy under the label of its source."""
    try:
        return _convert(knob.kind, value, text=text)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def _convert(kind: Any, value: Any, *, text: bool) -> Any:
    """`value` as `kind`; text: it comes from a flag, so that "3" may be a number."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(kind, value, text=text)
    if origin is Literal:
        return _choice(members, value)
    if origin in (list, tuple) or kind in (list, tuple):
        return _sequence(kind, value, text=text)
    if kind is Any or kind is dict or origin in (dict, Mapping):
        tree = _yaml(value) if text else value
        if kind is not Any and not isinstance(tree, dict):
            raise ValueError(f"got {value!r}, expected a mapping, in a flag written {{key: value}}")
        return tree
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and (isinstance(value, bool) or (text and value.lower() in _BOOLS)):
        return value if isinstance(value, bool) else _BOOLS[value.lower()]
    if kind in (int, float):
        return _amount(kind, value, text=text)
    remedy = "; put it in quotes" if kind in (str, Path) and isinstance(value, (bool, int, float)) else ""
    raise ValueError(f"got {value!r}, expected {_describe(kind)}{remedy}")


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
        raise ValueError(f"got {value!r}, expected {_describe(kind)}")
    if kind is int:
        raise ValueError(f"got {value!r}, expected a whole number; write {int(number)}")
    return number


def _union(kind: Any, value: Any, *, text: bool) -> Any:
    """None where it is allowed, else the first member that takes the value; str is asked last."""
    members = typing.get_args(kind)
    if type(None) in members and (value is None or (text and value in ("none", "null", "None", ["none"]))):
        return None
    reason = f"got {value!r}, expected {_describe(kind)}"
    wanted = sorted((member for member in members if member is not type(None)), key=lambda member: member is str)
    for member in wanted:
        try:
            return _convert(member, value, text=text)
        except ValueError as error:
            reason = str(error) if len(wanted) == 1 else reason
    raise ValueError(reason)


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    """The Literal member that equals the value or is written like it."""
    for choice in choices:
        if value == choice and type(value) is type(choice) or isinstance(value, str) and value == str(choice):
            return choice
    raise ValueError(f"got {value!r}, expected one of {', '.join(map(str, choices))}")


def _sequence(kind: Any, value: Any, *, text: bool) -> Any:
    """A list or tuple; a single value counts as a list of one, and a flag may say [a, b]."""
    outer, members = typing.get_origin(kind) or kind, typing.get_args(kind)
    if text and isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value, text = _yaml(value), False
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None:
        raise ValueError(f"got nothing, expected {_describe(kind)}; [] is an empty list")
    kinds: list[Any] = [members[0] if members else Any] * len(items)
    if outer is tuple and members and members[-1] is not Ellipsis:
        kinds = list(members)
    if len(kinds) != len(items):
        raise ValueError(f"got {len(items)} value(s), expected {len(kinds)}")
    return outer(_convert(each, item, text=text) for each, item in zip(kinds, items, strict=True))


def _is_list(kind: Any) -> bool:
    """Whether a flag of this type takes several values."""
    return typing.get_origin(kind) in (list, tuple) or kind in (list, tuple)


def _yaml(text: str) -> Any:
    """The value that a flag's text means in YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"got {text!r}, expected YAML ({' '.join(str(error).split())})") from None


def _plain(value: Any) -> Any:
    """Lists, dicts and scalars that YAML can write."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _describe(kind: Any) -> str:
    """A type in words."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if member is type(None) else _describe(member) for member in members)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if _is_list(kind):
        return f"a list, each {_describe(members[0])}" if members else "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(kind, "a mapping" if kind is dict or origin in (dict, Mapping) else "any value")


def _metavar(kind: Any) -> str:
    """A type as the placeholder in `--help`."""
    core = _core(kind)
    members = typing.get_args(core)
    if typing.get_origin(core) is Literal:
        return "{" + ",".join(map(str, members)) + "}"
    if _is_list(core):
        return f"{_metavar(members[0]) if members else 'VALUE'} ..."
    names = {int: "INT", float: "FLOAT", bool: "[true|false]", str: "TEXT", Path: "PATH"}
    return names.get(core, "VALUE")


def _default_text(knob: _Knob) -> str:
    """The default in brackets."""
    if knob.default is dataclasses.MISSING:
        return "(required)"
    if knob.default is None or knob.default == "" or (_is_list(_core(knob.kind)) and not knob.default):
        return "(default: none)"
    listed = knob.default if isinstance(knob.default, (list, tuple)) else [knob.default]
    return f"(default: {' '.join(str(item).lower() if isinstance(item, bool) else str(item) for item in listed)})"

"""The knobs of a dataclass: names, types, defaults and the strings under the fields, which are all of its `--help`.

Must not know where values come from.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from accessory.config.values import core_of, describe, is_list

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting: a leaf field of the dataclass or of a dataclass inside it."""

    name: str
    kind: Any
    default: Any
    doc: str


def knobs_of(cls: type, *, prefix: str = "") -> Iterator[Knob]:
    """All leaf fields, depth first, with dotted names."""
    kinds, docs = typing.get_type_hints(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        inner = _inner(kinds[field.name])
        if inner is not None:
            yield from knobs_of(inner, prefix=f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Knob(prefix + field.name, kinds[field.name], default, docs.get(field.name, ""))


def _inner(kind: Any) -> type | None:
    """The dataclass that a field nests (also when optional), None for a leaf."""
    inner = core_of(kind)
    return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


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


def build(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """The instance; fields that nobody named keep their defaults."""
    kinds, chosen = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, inner = prefix + field.name, _inner(kinds[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in values:
            chosen[field.name] = values[name]
        elif inner is not None and (required or any(key.startswith(f"{name}.") for key in values)):
            chosen[field.name] = build(inner, values, prefix=f"{name}.")
        elif required and field.init:
            raise ValueError(f"--{name}: missing, expected {describe(kinds[field.name])}; it has no default")
    return cls(**chosen)


def help_text(cls: type, *, prog: str, description: str = "") -> str:
    """The `--help` of a dataclass: each field's flag, type, docstring and default."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"usage: {prog} [CONFIG.yaml] [--KEY VALUE | KEY=VALUE ...]", ""]
    if description:
        lines += [*textwrap.wrap(description, width), ""]
    for knob in knobs_of(cls):
        lines.append(f"  --{knob.name} {_metavar(knob.kind)}")
        text = " ".join(part for part in (knob.doc, _default_text(knob)) if part)
        lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def _metavar(kind: Any) -> str:
    """A type as the placeholder in `--help`."""
    kind = core_of(kind)
    members = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, members)) + "}"
    if is_list(kind):
        return f"{_metavar(members[0]) if members else 'VALUE'} ..."
    names = {int: "INT", float: "FLOAT", bool: "[true|false]", str: "TEXT", Path: "PATH"}
    return names.get(kind, "VALUE")


def _default_text(knob: Knob) -> str:
    """The default in brackets."""
    if knob.default is dataclasses.MISSING:
        return "(required)"
    if knob.default is None or knob.default == "" or (is_list(core_of(knob.kind)) and not knob.default):
        return "(default: none)"
    listed = knob.default if isinstance(knob.default, (list, tuple)) else [knob.default]
    return f"(default: {' '.join(str(item).lower() if isinstance(item, bool) else str(item) for item in listed)})"

"""From a command line to a dataclass: default < file < flag, strictly, in the settings' own words or another tool's.

Must not know what a word means: other tools' words are handed to a translator.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from accessory.config.knobs import Knob, build, help_text, knobs_of
from accessory.config.tree import SUFFIXES, read
from accessory.config.values import BOOLS, convert, core_of, describe, is_list, plain

T = TypeVar("T")

_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_PAIR = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """What was said about one word."""

    value: Any
    label: str
    """Where, for errors: `--seed`, `run.yaml: seed`."""
    text: bool
    """From a flag, so that "3" may be a number."""


class Translation(Protocol):
    """Words as the settings know them."""

    dialect: str
    values: Mapping[str, Any]
    origin: Mapping[str, str]
    """The word that was given for a value; none for a default of the dialect."""


class Translator(Protocol):
    """Makes a tool's words the settings' words; `names` are all that it can translate."""

    names: Collection[str]

    def __call__(self, words: Mapping[str, Any], known: Collection[str]) -> Translation:
        """Translate all words at once. known: the settings' own. ValueError for what cannot be."""
        ...


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    description: str = "",
    translate: Translator | None = None,
) -> T:
    """An instance of the dataclass `cls`: default < file < flag.

    argv (None: the process's): an optional leading config file (.yaml, .yml, .json), then `--key value`,
    `--key=value` or `key=value` in any order. Nested dataclasses have dotted keys; `-` in a flag counts as `_`; a bool
    may stand bare; a list takes every value up to the next flag; `none` empties what is optional. Of a setting given
    twice the last counts; a list must not be given twice. `--help` prints the help and ends the process.
    translate: rewrites the words before unknown ones are refused; without it there are only the settings' own.
    Raises ValueError (unknown key, wrong type, missing value), FileNotFoundError (no such config file).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    knobs = {knob.name: knob for knob in knobs_of(cls)}
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(help_text(cls, prog=prog, description=description))
        raise SystemExit(0)
    if translate is None:
        given = collect(argv, knobs)
        return build(cls, {name: _checked(knobs[name], said) for name, said in given.items()})
    given = collect(argv, knobs, others=translate.names)
    done = translate({name: said.value for name, said in given.items()}, knobs)
    values = {}
    for name, value in done.values.items():
        said = given.get(done.origin.get(name, ""), Given(value, f"{name}, {done.dialect}'s default", text=True))
        if name not in knobs:
            raise ValueError(f"{said.label}: unknown key; {nearest(name, knobs, others=translate.names)}")
        values[name] = _checked(knobs[name], Given(value, said.label, said.text and _is_text(value)))
    return build(cls, values)


def collect(
    argv: Sequence[str], knobs: Mapping[str, Knob] | None = None, *, others: Collection[str] | None = None
) -> dict[str, Given]:
    """What file and flags say about each word, unchecked; of a word given twice the last.

    knobs: the settings; others: further words, of which any number of values is taken; None: none of them, and words
    that are no knob are refused. Raises ValueError and FileNotFoundError as `parse` does.
    """
    argv, knobs = list(argv), {} if knobs is None else knobs
    given: dict[str, Given] = {}
    if argv and argv[0].endswith(SUFFIXES) and not _PAIR.fullmatch(argv[0]):
        path = argv.pop(0)
        for name, value in _flatten(read(path), knobs, where=path, strict=others is None):
            given[name] = Given(value, f"{path}: {name}", text=False)
    for name, value, label in _flags(argv, knobs, others):
        given[name] = Given(value, label, text=True)
    return given


def dump(instance: Any, path: str | Path) -> None:
    """Write a dataclass instance as YAML that `parse` reads back to an equal instance; parent folders must exist."""
    text = yaml.safe_dump(plain(dataclasses.asdict(instance)), sort_keys=False, allow_unicode=True, width=120)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def nearest(name: str, names: Collection[str], *, others: Collection[str] = ()) -> str:
    """`did you mean X?` for the closest of the names (or of others), or which names there are."""
    close = difflib.get_close_matches(name, [*names, *others], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def _flags(
    argv: list[str], knobs: Mapping[str, Knob], others: Collection[str] | None
) -> Iterator[tuple[str, Any, str]]:
    """(name, text or list of texts, label for errors) of each flag and each key=value."""
    lists_seen, at, names = set(), 0, {*knobs, *(others or ())}
    while at < len(argv):
        token, at = argv[at], at + 1
        match = _FLAG.fullmatch(token) or _PAIR.fullmatch(token)
        if match is None:
            raise ValueError(f"{token!r}: a value without a flag, expected --key value, --key=value or key=value")
        name, value = match[1].replace("-", "_"), match[2]
        label = token[: match.end(1)]
        if name not in knobs and others is None:
            raise ValueError(f"{label}: unknown {'flag' if token[0] == '-' else 'key'}; {nearest(name, knobs)}")
        kind = core_of(knobs[name].kind) if name in knobs else None
        if value is None:
            taken = _values(argv[at : len(argv) if kind is None or is_list(kind) else at + 1], names)
            at += len(taken)
            if kind is bool and taken and taken[0].lower() not in BOOLS:
                taken, at = [], at - 1
            if not taken and kind not in (bool, None):
                raise ValueError(f"{label}: no value, expected {describe(kind)}; a value like --x goes in {label}=--x")
            alone = kind is None and len(taken) == 1
            value = "true" if not taken else taken if kind is None and not alone or is_list(kind) else taken[0]
        if is_list(kind) or isinstance(value, list):
            if name in lists_seen:
                raise ValueError(f"{label}: given twice, expected once; put all its values after one flag")
            lists_seen.add(name)
        yield name, value, label


def _values(tokens: list[str], names: Collection[str]) -> list[str]:
    """The leading tokens that are neither a flag nor a key=value of a known key."""
    taken = []
    for token in tokens:
        pair = _PAIR.fullmatch(token)
        if _FLAG.fullmatch(token) or (pair and pair[1].replace("-", "_") in names):
            break
        taken.append(token)
    return taken


def _flatten(
    tree: Mapping, knobs: Mapping[str, Knob], *, where: str, strict: bool, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a file's mapping, which may nest or use dotted keys."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in knobs:
            yield name, value
        elif any(known.startswith(f"{name}.") for known in knobs):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{where}: {name}: got {value!r}, expected a mapping of its settings")
            yield from _flatten(value or {}, knobs, where=where, strict=strict, prefix=f"{name}.")
        elif strict:
            raise ValueError(f"{where}: unknown key {name!r}; {nearest(name, knobs)}")
        else:
            yield name, value


def _checked(knob: Knob, given: Given) -> Any:
    """The value in the knob's type; the ValueError says got, expected and remedy under the label of its source."""
    try:
        return convert(knob.kind, given.value, text=given.text)
    except ValueError as error:
        raise ValueError(f"{given.label}: {error}") from None


def _is_text(value: Any) -> bool:
    """Whether a value is still as it was written in a flag."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))

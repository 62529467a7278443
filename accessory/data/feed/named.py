"""The sources that names stand for: entries of dataset_info.json, data files, folders, the reference's META lists.

Must not open data files nor know what a row means.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from accessory.config import nearest
from accessory.data.feed.registry import INFO, SHIPPED, find, known
from accessory.data.feed.sources import KINDS, Source

log = logging.getLogger(__name__)

META = ("path", "type", "preprocess", "prompt_type", "root", "ratio")
_HUB = re.compile(r"[\w-]+/[\w-]+")
_NUMBERED = re.compile(r"(.+)#(-?\d+)")


def read_sources(
    datasets: Sequence[str],
    *,
    root: str | None = None,
    dataset_dir: str | None = None,
    fill: Mapping[str, str] | None = None,
) -> list[Source]:
    """The sources that names stand for, in their order; several may stand in one text, between commas.

    A name: an entry of dataset_info.json in `dataset_dir` (none: data), a data file or a folder of them (from the
    working directory, else in dataset_dir), a YAML with a META list, else a set that ships with this package. NAME#N
    takes N rows. root: folder of pictures where META names none. fill: texts for {{placeholders}} of entries that
    declare them. `$NAME` and `~` are replaced; relative paths in a YAML hold from the working directory, else from the
    YAML's folder. Raises ValueError or FileNotFoundError for names that stand for nothing, a YAML that is none, an
    unknown key or format, an unset variable. Whether the data is there is asked when it is opened.
    """
    found: list[Source] = []
    root = None if root is None else _expand(root, "media_dir")
    home = None if dataset_dir is None else _expand(dataset_dir, "dataset_dir")
    for name in (part for text in datasets for part in _apart(text)):
        if name.lower().endswith((".yaml", ".yml")):
            found += _read_meta(Path(_expand(name, "dataset")), root)
        else:
            found.append(_named(name, root, home, fill or {}))
    return found


def _apart(text: str) -> list[str]:
    """Names between commas, unless the whole text is a path that is there."""
    if "," not in text or os.path.exists(text):
        return [text]
    return [name.strip() for name in text.split(",") if name.strip()]


def _named(text: str, root: str | None, home: str | None, fill: Mapping[str, str]) -> Source:
    """The source of one name, with or without a number of rows."""
    numbered = None if os.path.exists(text) else _NUMBERED.fullmatch(text)
    name, samples = (numbered[1].strip(), int(numbered[2])) if numbered else (text, None)
    if numbered and name.lower().endswith((".yaml", ".yml")):
        raise ValueError(f"dataset: got {text!r}, expected a number behind single sets; give META's entries a ratio")
    if samples is not None and samples < 1:
        raise ValueError(f"dataset: got {text!r}, expected a number of rows above 0 behind #; change it")
    folder = Path(home or "data")
    source = find(name, folder, root=root, fill=fill)
    if source is not None:
        return source if samples is None else replace(source, samples=samples)
    path = _beside(_expand(name, "dataset"), folder)
    if not os.path.exists(path):
        source = find(name, SHIPPED, root=root, fill=fill)
        if source is not None:
            log.info("dataset %s: the set that ships with this package", name)
            return source if samples is None else replace(source, samples=samples)
        if Path(path).suffix.lower() not in KINDS and not os.path.dirname(path):
            names = {**known(folder), **known(SHIPPED)}
            there = "" if (folder / INFO).is_file() else f" ({folder} has no {INFO})"
            raise ValueError(
                f"dataset: got {name!r}, which is neither a data file nor a name of {INFO}{there}; "
                f"{nearest(name, names)}"
            )
        if _HUB.fullmatch(name):
            raise FileNotFoundError(
                f"dataset: {path}: no such file or folder; check the path, or write HF::{name} for a set of the hub"
            )
    return Source(path, root=root, samples=samples)


def _read_meta(path: Path, root: str | None) -> Iterator[Source]:
    """The entries of a YAML's META list."""
    if not path.is_file():
        raise FileNotFoundError(f"dataset: {path}: no such file; check the path")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}; mend the YAML") from error
    entries = tree.get("META") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: got no META, expected `META:` and a list of entries with a `path` each; add it")
    for number, entry in enumerate(entries, start=1):
        try:
            yield _read_entry(entry, path.parent, root)
        except ValueError as error:
            raise ValueError(f"{path}: entry {number} of META: {error}") from None


def _read_entry(entry: Any, folder: Path, root: str | None) -> Source:
    """One entry of META."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"got {entry!r}, expected a mapping with a `path`")
    given: dict[str, Any] = {} if root is None else {"root": root}
    for key, value in entry.items():
        if key not in META:
            raise ValueError(f"unknown key {key!r}; {nearest(str(key), META)}")
        if key == "prompt_type" and value is None:
            value = "none"  # the reference writes None for a bare instruction
        if value is None:
            continue
        if not isinstance(value, (int, float) if key == "ratio" else str) or isinstance(value, bool):
            raise ValueError(f"{key}: got {value!r}, expected {'a number' if key == 'ratio' else 'text'}")
        given[key] = _beside(_expand(value, key), folder) if key in ("path", "root") else value
    return Source(**given)


def _expand(text: str, label: str) -> str:
    """A path with its variables and `~` replaced."""
    path = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$(?:\{(\w+)\}|(\w+))", path)
    if missing:
        name = missing[1] or missing[2]
        raise ValueError(f"{label}: {text}: ${name} is not set; set it to the folder that holds the data")
    return path


def _beside(path: str, folder: Path) -> str:
    """A relative path from the working directory, else from a folder if it is there."""
    return str(folder / path) if not os.path.exists(path) and (folder / path).exists() else path

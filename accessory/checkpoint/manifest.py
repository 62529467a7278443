"""The manifest of a folder that we wrote: sizes and SHA-256 of its files, by which a cut-short write is recognised.

Must not know what the files hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "manifest.json"
UNFINISHED = ".unfinished"  # lies in a folder while files are added to it
VERSION = 1
READERS = 4  # files hashed side by side


@dataclass(frozen=True)
class Entry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


def write(folder: Path, names: Iterable[str], *, to: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Hash the named files of `folder` and write the manifest to the file `to`; `known` were hashed when written."""
    known = known or {}
    files = {
        name: asdict(known[name] if name in known else Entry((folder / name).stat().st_size, sha256(folder / name)))
        for name in sorted(names)
    }
    to.write_text(json.dumps({"version": VERSION, "files": files}, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Entry] | None:
    """Return the manifest's entries by file name; None when there is none.

    Raises ValueError when it is not a manifest, or names a file outside of its folder.
    """
    path = folder / NAME
    if not path.exists():
        return None
    table = load_json(path)
    files = table.get("files")
    if table.get("version") != VERSION or not isinstance(files, dict):
        raise ValueError(f"{path}: not a manifest of version {VERSION}; write the folder again, or remove the file")
    entries = {}
    for name, entry in files.items():
        plain = PurePosixPath(name).name == name and name not in ("", ".", "..") and "\\" not in name
        if not plain or not isinstance(entry, dict):
            raise ValueError(f"{path}: names {name!r}, expected plain names of files beside it; do not use this folder")
        size, digest = entry.get("size"), entry.get("sha256")
        if type(size) is not int or not isinstance(digest, str) or len(digest) != 64:
            raise ValueError(f"{path}: {name}: has no size and SHA-256; write the folder again")
        entries[name] = Entry(size, digest)
    return entries


def faults(folder: Path, *, hashes: bool = False, watch: Callable[[str], None] | None = None) -> list[str]:
    """Return what is wrong with a folder by its manifest, a sentence a file: missing, wrong size, wrong SHA-256.

    An ordinary load compares sizes; `hashes` reads every byte. `watch` is told each file's name before it is hashed.
    """
    entries = read(folder) or {}

    def fault(name: str) -> str | None:
        path, entry = folder / name, entries[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.size:
            return f"{name} has {path.stat().st_size} bytes instead of {entry.size}"
        if hashes:
            if watch is not None:
                watch(name)
            if sha256(path) != entry.sha256:
                return f"{name} has another SHA-256 than when it was written: its content changed"
        return None

    with ThreadPoolExecutor(READERS) as pool:
        return [found for found in pool.map(fault, entries) if found is not None]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, naming the file, when it is anything else (NaN and Infinity included)."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        table = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); correct it or fetch it again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds a {type(table).__name__}, expected a JSON object; correct it")
    return table

"""One look at a data file: its SHA-256, and stretches of it that several processes can read side by side.

Must not know what a row means. What was found is remembered beside the cache, for files that did not change since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from accessory.data.feed.files import BLOCK, LONGEST_TEXT, Span, read_rows, sniff
from accessory.data.feed.sources import Source
from accessory.data.feed.store import open_store

log = logging.getLogger(__name__)

STRETCH = 1 << 20  # bytes of a stretch, about
ROWS = 2048  # rows of a stretch, about, where places count rows
LARGEST = 32 << 20  # bytes of such a stretch, about: rows may have pictures in them
VERSION = 4
_EMPTY_LINE = re.compile(rb"\n[ \t\r]*\n")
_SETTLED = 2.0  # seconds after which a file system surely tells two changes apart


@dataclass(frozen=True)
class Survey:
    """What is known of a data file without reading its rows again."""

    path: str
    size: int
    changed: int
    """Modification time in nanoseconds."""
    sha256: str
    kind: str
    rows: int
    """Row numbers are 1 to this; empty lines have one as well."""
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Stretch:
    """A part of a file that one process tokenises."""

    file: int
    """Number of the file over all sources."""
    source: Source
    survey: Survey
    span: Span
    keep: np.ndarray | None = None
    """int64: how often each of its row numbers is used; None: each once."""

    def times(self, number: int) -> int:
        """How often a row is used."""
        return 1 if self.keep is None else int(self.keep[number - self.span.number])


def survey(path: Path, memory: Path | None) -> Survey:
    """Look at a file, or remember it: what `memory`, a folder, has of its path, size and time of change is taken.

    Raises OSError or ValueError for a file that is not what its suffix says.
    """
    state = path.stat()
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    note = None if memory is None else memory / f"{name}.survey"
    known = _remembered(note, path, state) if note is not None else None
    if known is not None:
        return known
    kind = sniff(path)
    sha256, rows, spans = _SURVEYS.get(kind, _rows)(path)
    check_unchanged(path, state.st_size, state.st_mtime_ns)
    found = Survey(str(path), state.st_size, state.st_mtime_ns, sha256, kind, rows, tuple(spans))
    if note is not None and time.time() - state.st_mtime > _SETTLED:
        _remember(note, found, state)
    return found


def check_unchanged(path: Path, size: int, changed: int) -> None:
    """ValueError where a file is no more what it was."""
    state = path.stat()
    if (state.st_size, state.st_mtime_ns) != (size, changed):
        raise ValueError(f"{path}: changed while it was read; let no one write to it, and start again")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            total.update(block)
    return total.hexdigest()


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file, in order."""
    while block := file.read(BLOCK):
        yield block


def _jsonl(path: Path) -> tuple[str, int, list[Span]]:
    """Stretches between lines."""
    return _cut(path, lambda data: data.rfind(b"\n") + 1)


def _txt(path: Path) -> tuple[str, int, list[Span]]:
    """Stretches between empty lines."""

    def end(data: bytearray) -> int:
        ends = [match.end() for match in _EMPTY_LINE.finditer(data)]
        return ends[-1] if ends else data.rfind(b"\n") + 1 if len(data) >= LONGEST_TEXT else 0

    return _cut(path, end)


def _cut(path: Path, end: Callable[[bytearray], int]) -> tuple[str, int, list[Span]]:
    """SHA-256, lines and stretches; `end` says how much of the bytes so far is whole rows."""
    total, spans, held = hashlib.sha256(), [], bytearray()
    begin, number = 0, 1
    with path.open("rb") as file:
        for block in _blocks(file):
            total.update(block)
            held += block
            whole = end(held) if len(held) >= STRETCH and b"\n" in block else 0
            if whole:
                spans.append(Span(begin, number, begin + whole))
                number += held.count(b"\n", 0, whole)
                begin, held = begin + whole, held[whole:]
    if held:
        spans.append(Span(begin, number, begin + len(held)))
        number += held.count(b"\n") + (not held.endswith(b"\n"))
    return total.hexdigest(), number - 1, spans


def _rows(path: Path) -> tuple[str, int, list[Span]]:
    """Stretches of a json list or a csv file, between rows."""
    spans: list[Span] = []
    begin, number, rows = 0, 1, 0
    for raw in read_rows(path):
        rows = raw.number
        if raw.place - begin >= STRETCH:
            spans.append(Span(begin, number, raw.place))
            begin, number = raw.place, raw.number
    if rows:
        spans.append(Span(begin, number, None))
    return sha256_of(path), rows, spans


def _parquet(path: Path) -> tuple[str, int, list[Span]]:
    """Stretches of rows that do not cross row groups."""
    import pyarrow
    import pyarrow.parquet

    try:
        meta = pyarrow.parquet.ParquetFile(path).metadata
    except pyarrow.ArrowException as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as parquet ({words[:200]}); fetch it again") from error
    spans, first = [], 0
    for group in range(meta.num_row_groups):
        rows, size = meta.row_group(group).num_rows, meta.row_group(group).total_byte_size
        last, step = first + rows, min(ROWS, max(1, LARGEST * rows // max(size, 1)))
        spans += [Span(at, at + 1, min(at + step, last)) for at in range(first, last, step)]
        first = last
    return sha256_of(path), first, spans


def _packed(path: Path) -> tuple[str, int, list[Span]]:
    """The rows and SHA-256 that the file says, after a check that its bytes are these."""
    store = open_store(path, verify=True)
    return store.sha256, len(store), []


_SURVEYS: dict[str, Callable[[Path], tuple[str, int, list[Span]]]] = {
    "jsonl": _jsonl,
    "txt": _txt,
    "parquet": _parquet,
    "packed": _packed,
}


def _remembered(note: Path, path: Path, state: os.stat_result) -> Survey | None:
    """What an earlier look at the same file found."""
    try:
        told: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        known = (told.pop("version"), told["size"], told["changed"], told.pop("touched"))
        if known != (VERSION, state.st_size, state.st_mtime_ns, state.st_ctime_ns):
            return None
        told |= {"path": str(path), "spans": tuple(Span(**span) for span in told["spans"])}
        return Survey(**told)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(note: Path, found: Survey, state: os.stat_result) -> None:
    """Write a note for the next look, whole or not at all.

    Tools can set the time of change as they like; the inode's own time (ctime) tells.
    """
    temporary = note.with_name(f"{note.name}.{secrets.token_hex(4)}.tmp")  # containers share numbers of processes
    text = json.dumps({"version": VERSION, "touched": state.st_ctime_ns, **asdict(found)})
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, note)
    except OSError as error:  # somebody else's cache, or a full one
        log.warning("%s is not remembered, the next run looks at it again: %s", found.path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

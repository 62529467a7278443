"""Rows of data files as they lie there, one after the other from any place on, each with the number people find it by.

Must not know what a row means. What cannot be read is a `Bad` row with its reason, and the rows behind it go on.
"""

from __future__ import annotations

import codecs
import csv
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from accessory.data.feed.sources import kind_of

BLOCK = 1 << 20  # bytes that are read at once
LONGEST_TEXT = 16 << 20  # bytes of a txt document without an empty line; a longer one is cut at the end of a line
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Bad:
    """Why a row cannot be read or makes no sense."""

    reason: str


@dataclass(frozen=True)
class Raw:
    """One row: bytes that are still to be parsed, a mapping, or a Bad."""

    number: int
    """Line (jsonl, txt: the first one), element (json) or record (csv, parquet), from 1 on."""
    place: int
    """Where it begins: a byte, or in a parquet file the number of rows before it."""
    value: Any
    cut: bool = False
    """Whether it goes on in the next row: a txt document beyond LONGEST_TEXT."""


@dataclass(frozen=True)
class Span:
    """A stretch of a file: from a place on, whose row has this number, up to a place; None: to the end."""

    begin: int = 0
    number: int = 1
    end: int | None = None


def read_rows(path: Path, span: Span = Span()) -> Iterator[Raw]:
    """The rows of a stretch of a file; empty lines are none. ValueError or OSError for a file that is no such thing."""
    return READERS[sniff(path)](path, span)


def parse(raw: Raw) -> Any:
    """The value of a row: a mapping if it is well, a Bad for what is no UTF-8 or no JSON."""
    if not isinstance(raw.value, bytes):
        return raw.value
    try:
        return json.loads(raw.value.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(f"is no UTF-8 text (its byte {error.start + 1})")
    except ValueError as error:
        return Bad(f"is no JSON ({error})")
    except RecursionError:
        return Bad("is JSON that nests too deep")


def sniff(path: Path) -> str:
    """The format of a file: by its suffix; a .json that is no list, nor a mapping with one, has a value per line."""
    kind = kind_of(path)
    if kind == "json":
        state = path.stat()
        return "json" if _layout(path, state.st_size, state.st_mtime_ns)[0] is not None else "jsonl"
    return kind


def _jsonl(path: Path, span: Span) -> Iterator[Raw]:
    """A value per line."""
    for number, place, line in _lines(path, span):
        value = (line.removeprefix(_BOM) if place == 0 else line).strip()
        if value:
            yield Raw(number, place, value)


def _lines(path: Path, span: Span) -> Iterator[tuple[int, int, bytes]]:
    """(number, place, line with its end)."""
    place, number = span.begin, span.number
    with path.open("rb", buffering=BLOCK) as file:
        file.seek(place)
        while (span.end is None or place < span.end) and (line := file.readline()):
            yield number, place, line
            place, number = place + len(line), number + 1


def _txt(path: Path, span: Span) -> Iterator[Raw]:
    """Documents between empty lines."""
    held: list[bytes] = []
    first, begin, size = 0, 0, 0
    number, place, line = span.number, span.begin, b""
    for number, place, line in _lines(path, span):
        words = (line.removeprefix(_BOM) if place == 0 else line).rstrip(b"\r\n")
        if words.strip():
            if not held:
                first, begin, size = number, place, 0
            held.append(words)
            size += len(line)
        if held and (not words.strip() or size >= LONGEST_TEXT):
            yield Raw(first, begin, _document(held), cut=bool(words.strip()))
            held = []
    if held:
        yield Raw(first, begin, _document(held))


def _document(lines: list[bytes]) -> Any:
    """Lines as the text of one row."""
    try:
        return {"text": b"\n".join(lines).decode("utf-8")}
    except UnicodeDecodeError:
        return Bad("is no UTF-8 text")


def _json(path: Path, span: Span) -> Iterator[Raw]:
    """The elements of a list, found by their brackets; none but the one at hand is in memory."""
    state = path.stat()
    first, alone = _layout(path, state.st_size, state.st_mtime_ns)
    if not first:  # nothing but blanks
        return
    data, number = _map(path), span.number
    for begin, end in _elements(path, data, span.begin or first, number, alone=alone):
        if span.end is not None and begin >= span.end:
            return
        value = data[begin:end].strip()
        if value:
            yield Raw(number, begin, value)
        elif number > 1 or data[end : end + 1] == b",":
            yield Raw(number, begin, Bad("is no JSON (nothing stands there)"))
        number += 1


_SIGNS = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)
_NO_BLANK = re.compile(rb"\S")
_OF_A_ROW = re.compile(rb'"(conversations|messages)"\s*:\s*$')


def _signs(data: mmap.mmap, place: int) -> Iterator[tuple[int, bytes]]:
    """(place, sign) of every bracket, brace and comma outside of strings, from a place that is in none."""
    in_string = False
    for match in _SIGNS.finditer(data, place):
        sign = match[0]
        if sign == b'"':
            in_string = not in_string
        elif not in_string and len(sign) == 1:
            yield match.start(), sign


def _elements(path: Path, data: mmap.mmap, place: int, number: int, *, alone: bool) -> Iterator[tuple[int, int]]:
    """(begin, end) of each element of the list that `place` is in, at its beginning.

    alone: nothing may stand behind the list.
    """
    begin, depth = place, 1
    for at, sign in _signs(data, place):
        depth += (sign in b"[{") - (sign in b"]}")
        if depth > 1 or (depth == 1 and sign != b","):
            continue
        yield begin, at
        begin, number = at + 1, number + 1
        if depth == 0:
            rest = _NO_BLANK.search(data, at + 1) if alone else None
            if rest:
                more = data[rest.start() : rest.start() + 20]
                raise ValueError(f"{path}: goes on with {more!r} behind its list; mend or convert the file")
            return
    raise ValueError(f"{path}: row {number}: the list has no end, so the file is cut short or its JSON broken; mend it")


@lru_cache(maxsize=256)
def _layout(path: Path, size: int, changed: int) -> tuple[int | None, bool]:
    """(where the first element of a JSON file's list begins, whether nothing else is there): of a list, or of the one
    list in a mapping. 0: nothing but blanks; None: no such list, so a value per line."""
    if not size:
        return 0, True
    data = _map(path)
    start = _NO_BLANK.search(data, len(_BOM) if data[: len(_BOM)] == _BOM else 0)
    if start is None:
        return 0, True
    if start[0] == b"[":
        return start.end(), True
    if start[0] != b"{":
        head = data[start.start() : start.start() + 20]
        raise ValueError(f"{path}: begins with {head!r}, expected a JSON list, or a mapping per line; convert it")
    lists, depth = [], 0
    for at, sign in _signs(data, start.start()):
        depth += (sign in b"[{") - (sign in b"]}")
        if depth == 2 and sign == b"[" and _holds_rows(data, at):
            lists.append(at + 1)
        if not depth:
            whole = _NO_BLANK.search(data, at + 1) is None
            return (lists[0] if whole and len(lists) == 1 else None), False
    return None, False


def _holds_rows(data: mmap.mmap, at: int) -> bool:
    """Whether a list in a mapping has mappings in it, and is none that a row itself has."""
    inside = _NO_BLANK.search(data, at + 1)
    return inside is not None and inside[0] == b"{" and not _OF_A_ROW.search(data[max(0, at - 64) : at])


def _map(path: Path) -> mmap.mmap:
    """The bytes of a file that is not empty."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _csv(path: Path, span: Span) -> Iterator[Raw]:
    """Comma- or tab-separated records under a line of names."""
    csv.field_size_limit(sys.maxsize)
    with path.open("rb", buffering=BLOCK) as file:
        lines = _CsvLines(file)
        head = file.readline()
        file.seek(0)
        delimiter = "\t" if b"\t" in head else ","
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: names a column twice in {', '.join(names)}; rename one")
        if span.begin:
            lines.seek(span.begin)
        number = span.number
        while span.end is None or lines.place < span.end:
            place = lines.place
            try:
                values = next(reader, None)
            except csv.Error as error:
                values = [str(error)]
                record: Any = Bad(f"is no record of a csv file ({error})")
            else:
                if values is None:
                    return
                record = _record(names, values)
            if values:
                yield Raw(number, place, record)
                number += 1


class _CsvLines:
    """Lines of a csv file as text, and the byte at which the next one begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.place = file, 0
        self._pieces: Iterator[bytes] = iter(())

    def seek(self, place: int) -> None:
        """Go on from a byte at which a record begins."""
        self._file.seek(place)
        self._pieces, self.place = iter(()), place

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._pieces, b"")
        if not line:
            self._pieces = iter(self._file.readline().splitlines(keepends=True))  # a lone CR ends a line as well
            line = next(self._pieces)
        begin, self.place = self.place, self.place + len(line)
        return (line.removeprefix(_BOM) if begin == 0 else line).decode("utf-8", "surrogateescape")


def _record(names: list[str], values: list[str]) -> Any:
    """One record of a csv file as a mapping."""
    if len(values) != len(names):
        return Bad(f"has {len(values)} values for the {len(names)} columns {', '.join(names)[:80]}")
    if any(_is_escaped(value) for value in values):
        return Bad("is no UTF-8 text")
    return dict(zip(names, values, strict=True))


def _is_escaped(text: str) -> bool:
    """Whether bytes were no UTF-8."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _parquet(path: Path, span: Span) -> Iterator[Raw]:
    """Rows of a parquet file, a row group at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        first = 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if last > span.begin and (span.end is None or first < span.end):
                index = first
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    for record in batch.to_pylist() if index + len(batch) > span.begin else [None] * len(batch):
                        if index >= span.begin and (span.end is None or index < span.end):
                            yield Raw(index + 1, index, record)
                        index += 1
            first = last
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as parquet ({words[:200]}); fetch it again") from error


READERS: dict[str, Callable[[Path, Span], Iterator[Raw]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "txt": _txt,
}

"""The file of answers: a line per row, flushed to the disk before the next, gone on with after a kill.

Must not know models or how rows are read. While a run lasts each data-parallel rank appends to a file of its own; at
the end the lines stand in one file, in the order of the rows.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import yaml

log = logging.getLogger(__name__)

_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?\.jsonl")


class Journal:
    """One rank's file: `append` returns when the line is on the disk."""

    def __init__(self, path: str | Path, *, rank: int = 0) -> None:
        """path: of the whole file, which rank 0 itself appends to; the others write beside it."""
        self.path = part_of(Path(path), rank)
        self._file: BinaryIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises OSError where the disk is full or gone."""
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """A second call does nothing."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> BinaryIO:
        """The file, made when there is something to write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        file = self.path.open("ab")
        _lock(file, self.path)
        if fresh:
            _sync_folder(self.path.parent)
        return file


def check_free(path: Path) -> None:
    """ValueError where another run, on this host, is writing to a file of answers or to one of its ranks' parts."""
    for file in parts(path):
        with file.open("rb") as opened:
            _lock(opened, file)


def part_of(path: Path, rank: int) -> Path:
    """Where a data-parallel rank writes."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}.jsonl")


def new_path(folder: Path) -> Path:
    """A name that no file of the folder has: the time, and a number where that is taken."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (folder / f"{stamp}{'' if n == 1 else f'-{n:04}'}.jsonl" for n in range(1, 10_000))
    return next(path for path in names if not path.exists())


def newest(folder: Path, wanted: Mapping[str, Any]) -> Path | None:
    """The newest results in a folder whose settings, as noted beside them, agree with `wanted`; None without any."""
    found = [path for path in folder.glob("*.jsonl") if _STAMP.fullmatch(path.name)] if folder.is_dir() else []
    for path in sorted(found, key=lambda path: path.stem, reverse=True):
        note = path.with_suffix(".yaml")
        told = yaml.safe_load(note.read_text(encoding="utf-8")) if note.is_file() else None
        if isinstance(told, dict) and all(told.get(name) == value for name, value in wanted.items()):
            return path
    return None


def read_lines(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """The records of a file and of its ranks' parts; mend: cut a last line that a kill left unfinished.

    Raises ValueError for a damaged line before the last.
    """
    records: list[dict[str, Any]] = []
    for file in parts(path):
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and mend:
            log.info("%s: its last line was cut short by the end of a run; that row is answered again", file)
            with file.open("r+b") as opened:
                opened.truncate(whole)
                os.fsync(opened.fileno())
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: is no JSON ({error}); remove the line, or begin anew") from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: got {line[:40]!r}, expected an object; remove the line")
            records.append(record)
    return records


def finish(path: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """Put all lines into one file in the order of these ids, at once or not at all; the records in that order.

    Lines with other ids, of rows that were not asked for this time, follow behind.
    """
    place = {name: number for number, name in enumerate(order)}
    lines = {str(record.get("id")): record for record in read_lines(path)}
    records = sorted(lines.values(), key=lambda record: place.get(str(record.get("id")), len(place)))
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)
    _remove(part for part in parts(path) if part != path)
    return [record for record in records if str(record.get("id")) in place]


def parts(path: Path) -> list[Path]:
    """The file, and those of its ranks."""
    return [*([path] if path.exists() else []), *sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))]


def _lock(file: BinaryIO, path: Path) -> None:
    """Hold a file until it is closed or the process ends. ValueError where another one holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path}: another run is writing to it; wait for its end, or choose another folder") from None
    except OSError as error:  # a file system without locks
        log.info("%s: cannot be locked (%s)", path, error)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

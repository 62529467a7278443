"""trainer_log.jsonl and its like: one line per logged step, numbers that read back bit for bit.

Must not know training: it keeps lines, and a run that resumes cuts off those it is about to write again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "trainer_log.jsonl"


class Journal:
    """The lines up to step `first` of an earlier run, and behind them those of this one.

    A line is handed to the system as soon as it is written, so that a killed process loses none. Where the disk is
    full, lines are kept in memory and written when there is room again; that is said once.
    """

    def __init__(self, path: Path, *, first: int, key: str = "current_steps", closing: str | None = None) -> None:
        """key: what the step is called; closing: a key that only a run's last line has, which is cut off too.

        Raises OSError for a file that cannot be written.
        """
        self._path = path
        self.lines = _cut_back(path, first, key, closing)
        """What was kept of the earlier run."""
        self._file = path.open("ab", buffering=0)
        self._backlog = b""
        self._warned = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; floats keep every bit (their repr), and infinite ones are strings that float() reads."""
        entry = {key: plain(value) for key, value in line.items()}
        self._backlog += json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            while self._backlog:
                self._backlog = self._backlog[self._file.write(self._backlog) :]
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written, training goes on and its lines wait: %s", self._path, error)
            self._warned = True

    def close(self) -> None:
        """Let go of the file. Lines that found no room are counted."""
        if lost := self._backlog.count(b"\n"):
            log.warning("%s lacks its last %d lines: they could not be written", self._path, lost)
        self._backlog = b""
        self._file.close()


def duration(seconds: float) -> str:
    """Seconds as people read them, and LLaMA-Factory writes them: 1:02:03, or 2 days, 1:02:03."""
    return str(timedelta(seconds=int(seconds)))


def seconds_of(text: object) -> float:
    """The seconds of a `duration`; 0 for anything else."""
    match = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d)", str(text))
    if match is None:
        return 0.0
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def plain(value: Any) -> Any:
    """A value that JSON has: NaN and infinities become their names."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cut_back(path: Path, first: int, key: str, closing: str | None) -> list[dict[str, Any]]:
    """Keep the whole lines up to step `first`, in place of the file at once, and return them."""
    if not path.exists():
        return []
    raw = path.read_bytes().splitlines(keepends=True)
    parsed = [(line, _parse(line, key)) for line in raw]
    kept = [(line, entry) for line, entry in parsed if entry is not None and entry[key] <= first]
    kept = [(line, entry) for line, entry in kept if closing not in entry]
    if len(kept) < len(raw):
        log.info("%s: %d lines after step %d are cut off, to be written again", path, len(raw) - len(kept), first)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            file.writelines(line for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    return [entry for _, entry in kept]


def _parse(line: bytes, key: str) -> dict[str, Any] | None:
    """A line's content; None for one that a dying process left unfinished."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get(key), int) and line.endswith(b"\n")
    return entry if whole else None

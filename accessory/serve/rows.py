"""Answers a dataset: rows dealt to the data-parallel ranks, many at once on each, every answer on disk when it is made.

Must not know files of weights or how a row is read; a row's pictures are fetched beside the answers that are made.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accessory.serve.repl import RULE

if TYPE_CHECKING:
    from PIL.Image import Image

    from accessory.data.feed import RawRow
    from accessory.data.template import Turn
    from accessory.engine import Answer, Engine, Request, Result
    from accessory.engine.prompt import Prompt

log = logging.getLogger(__name__)

_LOADERS = 4  # threads that fetch pictures and encode text
_REPORT = 10.0  # seconds between two lines of progress
# How an engine is opened whose answers never depend on their neighbours, so that a run which is gone on with equals an
# unbroken one: prompts are then read in pieces of this width, whatever is in them.
STEADY: dict[str, Any] = {"deterministic": True, "prefill_chunk": 128}


@dataclass
class Batch:
    """The rows of one data-parallel rank, answered `width` at a time; a row that ends makes room for the next.

    ask: the request of a row's turns and pictures. look: opens a picture. note: the record of an answered row.
    write: keeps a record.
    """

    engine: Engine
    ask: Callable[[RawRow, Sequence[Turn], Sequence[Image]], Request]
    look: Callable[[str], Image]
    note: Callable[[RawRow, Request, Result], dict[str, Any]]
    write: Callable[[dict[str, Any]], None]
    width: int
    default_system: str | None = None
    skip_bad: bool = False
    report: Counter[str] = field(default_factory=Counter)
    """Of rows: answered, refused, cut (the answer ended at a limit), shortened (the question did); and tokens."""
    refused: list[str] = field(default_factory=list)

    def run(self, rows: Sequence[RawRow]) -> None:
        """Answer all rows. Raises ValueError or OSError, with the row's place, for one that cannot be asked."""
        running: dict[Answer, RawRow] = {}
        began = told = time.monotonic()
        with ThreadPoolExecutor(_LOADERS) as pool:
            ready = self._prepared(rows, pool)
            more = True
            try:
                while more or running:
                    while more and len(running) < self.width:
                        more = self._submit(ready, running)
                    self.engine.step()
                    for answer in [answer for answer in running if answer.result is not None]:
                        self._record(answer, running.pop(answer))
                    if time.monotonic() - told > _REPORT:
                        told = time.monotonic()
                        done, total = self.report["answered"] + self.report["refused"], len(rows)
                        rate = self.report["tokens"] / (told - began)
                        log.info("%d of %d rows, %.1f tokens/s", done, total, rate)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for answer in running:
                    self.engine.cancel(answer)

    def tell(self) -> None:
        """Say what was done, and what was not."""
        report = self.report
        log.info("%d rows answered with %d tokens", report["answered"], report["tokens"])
        if report["cut"]:
            log.info("%d answers were cut; --max_new_tokens or --max_seq_len allows more", report["cut"])
        if report["shortened"]:
            log.warning("%d questions lost their oldest text; --cutoff_len allows more", report["shortened"])
        if self.refused:
            log.warning("%d rows were not asked: %s", len(self.refused), "; ".join(self.refused[:5]))

    def _prepared(self, rows: Sequence[RawRow], pool: ThreadPoolExecutor) -> Iterator[tuple[RawRow, Future]]:
        """Rows whose prompts are being made, a few ahead of those that are asked."""
        waiting: deque[tuple[RawRow, Future]] = deque()
        for row in rows:
            waiting.append((row, pool.submit(self._prepare, row)))
            if len(waiting) > 2 * self.width:
                yield waiting.popleft()
        yield from waiting

    def _prepare(self, row: RawRow) -> tuple[Request, Prompt]:
        """What a row asks, as text and as numbers."""
        request = self.ask(row, self._turns(row), [self.look(name) for name in row.pictures])
        return request, self.engine.prepare(request)

    def _submit(self, ready: Iterator[tuple[RawRow, Future]], running: dict[Answer, RawRow]) -> bool:
        """Ask the next row; False where there is none."""
        row, prepared = next(ready, (None, None))
        if row is None or prepared is None:
            return False
        try:
            answer = self.engine.enqueue(*prepared.result())
        except (ValueError, OSError) as error:
            self._refuse(row, error)
            return True
        running[answer] = row
        return True

    def _turns(self, row: RawRow) -> list[Turn]:
        """The row's turns, with the system text of those that bring none."""
        from accessory.data.template import Turn

        if self.default_system is None or row.system is not None:
            return list(row.turns)
        return [Turn("system", self.default_system), *row.turns]

    def _record(self, answer: Answer, row: RawRow) -> None:
        """Keep what was answered."""
        result = answer.result
        assert result is not None, f"row {row.id} is not answered yet"
        if result.finish == "error":
            self._refuse(row, ValueError(result.error))
            return
        self.report["answered"] += 1
        self.report["tokens"] += len(result.ids)
        self.report["cut"] += result.finish == "length"
        self.report["shortened"] += result.dropped > 0
        self.write(self.note(row, answer.request, result))

    def _refuse(self, row: RawRow, error: Exception) -> None:
        """Count a row that cannot be asked or answered. Raises ValueError where none is skipped."""
        reason = f"{row.where}: {' '.join(str(error).split())}"
        if not self.skip_bad:
            raise ValueError(f"{reason}; mend the row, or set on_bad_row to skip") from error
        self.report["refused"] += 1
        self.refused.append(reason)
        log.warning("%s", reason)


class Printer:
    """Prints records as blocks, in the order of the rows, as soon as all before are there."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids, self._next = list(ids), 0
        self._held: dict[str, dict[str, Any]] = {}

    def show(self, record: dict[str, Any]) -> None:
        """Take one record, and print what can be printed now."""
        self._held[record["id"]] = record
        self.flush(all_=False)

    def flush(self, *, all_: bool = True) -> None:
        """Print what waits; all_: also behind rows that were refused."""
        while self._next < len(self._ids):
            record = self._held.pop(self._ids[self._next], None)
            if record is None and not all_:
                return
            self._next += 1
            if record is not None:
                sys.stdout.write(block(record))
        sys.stdout.flush()


def block(record: dict[str, Any]) -> str:
    """One record for human eyes."""
    lines = [f"[SYSTEM]{record['system']}"] if record["system"] else []
    earlier = "".join(f"[QUERY]{query}\n[RESPONSE]{response}\n" for query, response in record["history"])
    lines.append(f"{earlier}[PROMPT]{record['query']}[OUTPUT]{record['response']}")
    lines.append("")
    if record["label"] is not None:
        lines.append(f"[LABELS]{record['label']}")
    if record["images"]:
        lines.append(f"[IMAGES]{record['images']}")
    return "\n".join([*lines, RULE]) + "\n"


def deal(rows: Sequence[RawRow], rank: int, size: int) -> list[RawRow]:
    """The rows of one data-parallel rank: every size-th, so that neighbours of like length are spread."""
    return list(rows[rank::size])

"""From dealt rows to finished steps: pictures read by workers, batches made ahead by a thread, in order.

Must not know how rows are chosen. Who waits for a step gets it or an error, never silence.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from accessory.data.feed.batches import Batch, collate
from accessory.data.feed.corpus import Row
from accessory.data.feed.pixels import Eye, Look
from accessory.data.feed.sources import FeedConfig
from accessory.data.feed.workers import Workers

AHEAD = 3  # steps that are made before they are asked for

Step = tuple[Any, list[Batch]]
Ready = queue.Queue[tuple[Step | None, BaseException | None]]


@dataclass(frozen=True)
class Dealt:
    """One step of one rank: where the run is after it, the epoch that its dice are cast for, and its micro-batches."""

    after: Any
    epoch: int
    micros: list[list[list[Row]]]
    """Micro-batches of sequences of rows."""


@dataclass(frozen=True)
class Flow:
    """Makes steps of what is dealt."""

    config: FeedConfig
    workers: int
    """0: nothing is made ahead; else a thread does, and so many processes read its pictures, if it meets any."""
    seed: int
    dtype: torch.dtype = torch.float32
    """Of pixels."""
    pin: bool = False

    def steps(self, dealt: Iterator[Dealt]) -> Iterator[Step]:
        """(where the run is after it, micro-batches) of each step. Errors come in their step's turn."""
        if not self.workers:
            yield from self._make(dealt)
            return
        ready: Ready = queue.Queue(AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(dealt, ready, stop), daemon=True)
        thread.start()
        try:
            while True:
                step, error = _get(ready, thread)
                if error is not None:
                    raise error
                if step is None:
                    return
                yield step
        finally:
            stop.set()
            thread.join(timeout=5)

    def _work(self, dealt: Iterator[Dealt], ready: Ready, stop: threading.Event) -> None:
        """The life of the thread: steps into the queue until it is told to stop."""
        last: tuple[Step | None, BaseException | None] = (None, None)
        try:
            with closing(self._make(dealt)) as steps:
                for step in steps:
                    _put(ready, (step, None), stop)
                    if stop.is_set():
                        return
        except BaseException as error:  # it is raised where the step is asked for
            last = (None, error)
        _put(ready, last, stop)

    def _make(self, dealt: Iterator[Dealt]) -> Iterator[Step]:
        """Steps, their pictures read a few micro-batches ahead."""
        micros = ((step, rows) for step in dealt for rows in step.micros)
        done: list[Batch] = []
        with Workers(Eye, (self.config,), self.workers if self.config.pictures else 0) as workers:
            for (step, rows), seen in workers.map(micros, lambda item: self._looks(*item), _name):
                batch = collate(rows, self.config, seen)
                if batch.pixels is not None:
                    batch.pixels = batch.pixels.to(self.dtype)
                done.append(batch.pinned() if self.pin else batch)
                if len(done) == len(step.micros):
                    yield step.after, done
                    done = []

    def _looks(self, step: Dealt, sequences: Sequence[Sequence[Row]]) -> list[Look] | None:
        """The pictures of a micro-batch, None if it has none."""
        looks = [
            Look(path, row.where, (self.seed, step.epoch, row.index, number), size)
            for rows in sequences
            for row in rows
            for number, (path, size) in enumerate(zip(row.pictures, row.sizes, strict=True))
        ]
        return looks or None


def _name(item: tuple[Dealt, Sequence[Sequence[Row]]]) -> str:
    """A micro-batch for people: its rows that have pictures."""
    rows = [row.where for rows in item[1] for row in rows if row.pictures]
    return f"the pictures of {', '.join(rows[:8])}"


def _get(ready: Ready, thread: threading.Thread) -> Any:
    """The next step; also Ctrl-C gets through, and a thread that is no more is noticed."""
    while True:
        try:
            return ready.get(timeout=1.0)
        except queue.Empty:
            if not thread.is_alive() and ready.empty():
                raise RuntimeError("the thread that prepares batches is gone; this is a bug") from None


def _put(ready: Ready, step: tuple[Step | None, BaseException | None], stop: threading.Event) -> None:
    """Wait for a place in the queue, unless all is over."""
    while not stop.is_set():
        try:
            ready.put(step, timeout=0.2)
            return
        except queue.Full:
            continue

"""Rows without a first pass over the data: read, shuffled in blocks, tokenised and packed as steps need them.

Must not know models or collectives: every rank reads and tokenises all rows and keeps its part of each step, so that
dealing is a function of the rows alone. That bounds a job to what one rank's workers can tokenise; above it, let the
data be tokenised first (streaming false).
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accessory.data.feed.batches import Batch
from accessory.data.feed.corpus import Row, show
from accessory.data.feed.deal import SHOWN, say_skipped, shares
from accessory.data.feed.files import Raw, Span, read_rows, sniff
from accessory.data.feed.flow import Dealt, Flow
from accessory.data.feed.pack import best_fit
from accessory.data.feed.sources import FeedConfig, Source, files_of
from accessory.data.feed.survey import check_unchanged
from accessory.data.feed.tokenise import Refused, Tokeniser, Tokens, remedy, stops
from accessory.data.feed.workers import Workers
from accessory.data.tiles import lay
from accessory.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WINDOW = 1024  # rows that are tokenised and packed together
SLICE = 64  # rows that a worker is given at once
ENDS = 1 << 16  # bytes at both ends of a file that enter its fingerprint


@dataclass(frozen=True)
class _File:
    """A file of the stream as it was at the start."""

    path: Path
    source: Source
    number: int
    """Of its source."""
    size: int
    changed: int


@dataclass(frozen=True)
class _Place:
    """Where a sequence lies: its block by where that begins, its window in the block, its number in the window."""

    epoch: int = 0
    file: int = 0
    """In the order of this epoch."""
    begin: int = 0
    number: int = 1
    window: int = 0
    taken: int = 0
    """Sequences of the window that are done with."""


class Stream:
    """The steps of one data-parallel rank, for ever, without a first pass; otherwise as `Feed`.

    `buffer` rows in the order of their files are shuffled and fed before the next ones are read; the order of files is
    another one in each epoch. `state` says where the block begins that is being fed and how much of it is done, so that
    a resumed run reads at most `buffer` rows and tokenises one window again.
    """

    steps_per_epoch = None

    def __init__(
        self,
        config: FeedConfig,
        tokenizer: Tokenizer,
        *,
        batch: int,
        accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        buffer: int = 16384,
        workers: int = 0,
        pixels_dtype: torch.dtype = torch.float32,
        pin: bool = False,
    ) -> None:
        """workers: processes that tokenise, and as many again that read pictures; 0: all happens when asked for.

        Raises ValueError for max_samples, share_pictures and packed files, which are for a corpus, and for files that
        are none.
        """
        if config.max_samples is not None:
            raise ValueError(f"max_samples: got {config.max_samples} with streaming, expected none; set max_steps")
        if any(source.samples is not None for source in config.sources):
            raise ValueError("dataset: got a number of rows (name#N) with streaming, expected none; set max_steps")
        if config.share_pictures:
            raise ValueError("share_pictures: got true with streaming, expected false; let the data be tokenised first")
        if config.pictures and not config.slots:
            config = replace(config, packing=False)
        self.config, self.seed, self.shuffle, self.buffer = config, seed, shuffle, max(1, buffer)
        self.batch, self.accumulation, self.dp_rank, self.dp_size = batch, accumulation, dp_rank, dp_size
        self.report: Counter[str] = Counter()
        """Of the rows that this process read."""
        self.skipped = 0
        self._files = _open(config)
        self._make = (replace(config, sources=()), tokenizer, [file.source for file in self._files])
        self._workers = workers
        self._flow = Flow(config, workers, seed, pixels_dtype, pin)
        self._at = self._last = _Place()
        self.fingerprint = _fingerprint(self._files)

    @property
    def global_batch(self) -> int:
        """Sequences of a step over all ranks."""
        return self.batch * self.accumulation * self.dp_size

    def state(self, *, untaken: int = 0) -> dict[str, Any]:
        """As `Feed.state`."""
        at = self._last if untaken else self._at
        place = [at.epoch, at.file, at.begin, at.number, at.window, at.taken]
        return {"place": place, "skipped": self.skipped, "order": self._order(), "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; dp_size may be another. ValueError where files or settings are not those of the state."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "resume: the data files are not those of the checkpoint (names, sizes or contents differ); bring them"
                " back, or begin in another folder"
            )
        if state["order"] != self._order():
            raise ValueError(
                f"resume: the order of rows is another than the checkpoint's, got {self._order()}, expected"
                f" {state['order']}; set them back, or begin in another folder"
            )
        self._at = self._last = _Place(*state["place"])
        self.skipped = int(state["skipped"])

    def __iter__(self) -> Iterator[list[Batch]]:
        for at, batches in self._flow.steps(self._deal(self._at)):
            self._last, self._at = self._at, at
            self.skipped += say_skipped(batches, self.skipped)
            yield batches

    def first(self) -> list[Batch]:
        """The micro-batches of the next step, without taking it."""
        return next(Flow(self.config, 0, self.seed).steps(self._deal(self._at)))[1]

    def example(self, tokenizer: Tokenizer) -> str:
        """The first row of the files that can be learned, as `Corpus.example` shows it; empty where there is none."""
        read = _Reader(*self._make)
        for _, file, raw in self._raws(_Place()):
            for found in read([(file, raw)]).results[0]:
                if isinstance(found, Tokens):
                    where = f"{self._files[file].path}:{raw.number}"
                    row = _row(found, where, self.config, raw.number)
                    return f"{where}\n{show(row, tokenizer, counts=self.config.geometry.count(row.sizes))}"
        return ""

    def told(self) -> str:
        """The counts in words."""
        counts = [(name, count) for name, count in self.report.items() if count and name != "refused"]
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts) or "no row"

    def _order(self) -> dict[str, Any]:
        """All that decides the order of sequences besides the files."""
        config = self.config
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "buffer": self.buffer,
            "packing": config.packing,
            "cutoff_len": config.cutoff_len,
        }

    def _deal(self, at: _Place) -> Iterator[Dealt]:
        """This rank's rows of each step from there on."""
        step: list[list[Row]] = []
        for after, rows in self._sequences(at):
            step.append(rows)
            if len(step) == self.global_batch:
                parts = shares(len(step), self.accumulation, self.dp_rank, self.dp_size)
                yield Dealt(after, 0, [step[part] for part in parts])
                step = []

    def _sequences(self, at: _Place) -> Iterator[tuple[_Place, list[Row]]]:
        """Sequences of rows from there on, each with the place behind it."""
        fruitful = at.epoch
        with Workers(_Reader, self._make, self._workers) as workers:
            rows: list[Row] = []
            for part, read in workers.map(self._slices(at), lambda part: part.raws, self._name):
                place = part.place
                rows += self._rows(place.epoch, part.raws, read)
                if not part.last:
                    continue
                sequences, rows = self._packed(rows, place), []
                for number in range(at.taken if place == replace(at, taken=0) else 0, len(sequences)):
                    fruitful = place.epoch
                    yield replace(place, taken=number + 1), sequences[number]
                if place.epoch > fruitful + 1:
                    raise ValueError(f"dataset: got {self.report['read']} rows, expected at least one to learn from")

    def _packed(self, rows: list[Row], place: _Place) -> list[list[Row]]:
        """Rows of a window as sequences, in the order in which they are fed."""
        if not self.config.packing:
            return [[row] for row in rows]
        packs = best_fit([len(row.ids) for row in rows], self.config.cutoff_len)
        order = self._dice(place, place.window + 1).permutation(len(packs)) if self.shuffle else range(len(packs))
        return [[rows[at] for at in packs[number]] for number in order]

    def _slices(self, at: _Place) -> Iterator[_Slice]:
        """Work for the tokenising processes: windows in order, from that of a place on."""
        for place, block in self._blocks(replace(at, window=0, taken=0)):
            order = self._dice(place, 0).permutation(len(block)) if self.shuffle else np.arange(len(block))
            first = at.window if place == replace(at, window=0, taken=0) else 0
            for window in range(first, -(-len(block) // WINDOW)):
                own = order[window * WINDOW : (window + 1) * WINDOW]
                for start in range(0, len(own), SLICE):
                    raws = [block[index] for index in own[start : start + SLICE]]
                    yield _Slice(replace(place, window=window), raws, last=start + SLICE >= len(own))

    def _blocks(self, at: _Place) -> Iterator[tuple[_Place, list[tuple[int, Raw]]]]:
        """(place of its first row, rows with the number of their file) of each block; a block ends with its epoch."""
        while True:
            block: list[tuple[int, Raw]] = []
            begin, read = at, 0
            for place, file, raw in self._raws(at):
                begin, read = begin if block else place, read + 1
                block.append((file, raw))
                if len(block) == self.buffer:
                    yield begin, block
                    block = []
            if block:
                yield begin, block
            if not read and at == _Place(at.epoch):
                raise ValueError("dataset: got no row in any file, expected at least one")
            at = _Place(at.epoch + 1)

    def _raws(self, at: _Place) -> Iterator[tuple[_Place, int, Raw]]:
        """Rows of an epoch from a place on, each with its place and the number of its file."""
        order = np.random.default_rng([self.seed, at.epoch]).permutation(len(self._files))
        order = order if self.shuffle else np.arange(len(self._files))
        for index in range(at.file, len(order)):
            file = self._files[order[index]]
            check_unchanged(file.path, file.size, file.changed)
            span = Span(at.begin, at.number) if index == at.file else Span()
            for raw in read_rows(file.path, span):
                if file.source.ratio < 1:
                    dice = random.Random(f"{self.config.seed} {file.number} {order[index]} {raw.number}")
                    if dice.random() >= file.source.ratio:
                        continue
                yield _Place(at.epoch, index, raw.place, raw.number), int(order[index]), raw
            check_unchanged(file.path, file.size, file.changed)

    def _rows(self, epoch: int, raws: Sequence[tuple[int, Raw]], read: _Read) -> Iterator[Row]:
        """Rows of numbers out of what a worker made. ValueError where one is to end the run."""
        self.report.update(read.counts)
        for (file, raw), results in zip(raws, read.results, strict=True):
            self.report["read"] += 1
            where = f"{self._files[file].path}:{raw.number}"
            for found in results:
                if isinstance(found, Tokens):
                    self.report["used"] += 1
                    yield _row(found, where, self.config, (epoch << 80) + (file << 48) + raw.number)
                    continue
                if stops(found, self.config):
                    raise ValueError(f"{where}: {found.reason}; {remedy(found.kind)}")
                self.report[found.kind] += 1
                self.report["refused"] += 1
                if self.report["refused"] <= SHOWN:
                    log.warning("not used: %s: %s", where, found.reason)

    def _dice(self, place: _Place, purpose: int) -> np.random.Generator:
        """Random numbers of a block."""
        return np.random.default_rng([self.seed, place.epoch, place.file, place.begin, purpose])

    def _name(self, part: _Slice) -> str:
        """A slice for people."""
        return ", ".join(f"{self._files[file].path}:{raw.number}" for file, raw in part.raws[:4]) + ", ..."


@dataclass(frozen=True)
class _Slice:
    """Rows of a window that are tokenised by one process, each with the number of its file."""

    place: _Place
    raws: list[tuple[int, Raw]]
    last: bool
    """Whether the window ends with them."""


@dataclass
class _Read:
    """What some rows gave, row by row."""

    results: list[list[Tokens | Refused]]
    counts: Counter[str]


class _Reader:
    """Tokenises rows in a worker."""

    def __init__(self, config: FeedConfig, tokenizer: Tokenizer, sources: list[Source]) -> None:
        self.tokeniser, self.sources = Tokeniser(config, tokenizer), sources

    def __call__(self, raws: list[tuple[int, Raw]]) -> _Read:
        counts: Counter[str] = Counter()
        rows = self.tokeniser.scout.ahead((raw, self.sources[file]) for file, raw in raws)
        results = [list(self.tokeniser.row(raw, source, counts)) for raw, source in rows]
        return _Read(results, counts)


def _row(tokens: Tokens, where: str, config: FeedConfig, index: int) -> Row:
    """A row of numbers as a corpus would give it."""
    sizes = tuple(tokens.sizes or [(1, 1)] * len(tokens.pictures))
    starts, counts = (tokens.slots, config.geometry.count(sizes)) if config.slots else ((), ())
    slots = lay(len(tokens.ids), starts, counts)
    learn = np.ones(len(tokens.ids), bool) if tokens.learn is None else np.asarray(tokens.learn, bool)
    learn[:1] = False
    ids, documents = np.asarray(tokens.ids, np.int32), np.zeros(1, np.int64)
    return Row(ids, learn, slots, tuple(tokens.pictures), where, documents, index, sizes)


def _open(config: FeedConfig) -> list[_File]:
    """The files of all sources."""
    files = []
    for number, source in enumerate(config.sources):
        for path in files_of(source):
            if sniff(path) == "packed":
                raise ValueError(f"{path}: is tokenised already and read as it is needed; set streaming false")
            state = path.stat()
            rooted = replace(source, root=source.root or str(path.parent))
            files.append(_File(path, rooted, number, state.st_size, state.st_mtime_ns))
    if not files:
        raise ValueError("dataset: got no source, expected at least one data file")
    return files


def _fingerprint(files: list[_File]) -> str:
    """SHA-256 over names, sizes and both ends of the files."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.path.name} {file.size} ".encode())
        with file.path.open("rb") as data:
            total.update(data.read(ENDS))
            data.seek(max(0, file.size - ENDS))
            total.update(data.read(ENDS))
    return total.hexdigest()

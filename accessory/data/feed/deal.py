"""The endless, resumable sampler that deals the rows of a corpus to data-parallel ranks.

Must not know models, files or collectives: every rank computes the same order and takes its part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from accessory.data.feed.batches import Batch
from accessory.data.feed.corpus import Corpus, Row
from accessory.data.feed.flow import Dealt, Flow
from accessory.data.feed.pack import Packs, pack
from accessory.data.feed.share import behind_one
from accessory.data.feed.sources import FeedConfig

log = logging.getLogger(__name__)

SHOWN = 5  # rows that are named


class Feed:
    """The steps of one data-parallel rank, for ever: each a list of `accumulation` micro-batches.

    What shares a sequence is packed once; the order of sequences is a function of (seed, epoch) alone. A step takes
    batch * accumulation * dp_size of them, the same set however they are dealt; the last step of an epoch has what is
    left, spread evenly, and a rank without any gets one position that teaches nothing. `state` counts sequences of all
    ranks in steps that were taken, whatever was prepared ahead, so a run may go on with another dp_size.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: FeedConfig,
        *,
        batch: int,
        accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        pixels_dtype: torch.dtype = torch.float32,
        pin: bool = False,
    ) -> None:
        """workers: 0: all happens when a step is asked for; else steps are made ahead, pictures by so many processes.
        pin: tensors in page-locked memory."""
        alone = config.pictures and not config.slots and corpus.has_pictures
        if alone and config.packing:
            log.info("pictures go into the adapter's prompt, one per row: rows are not packed")
            config = replace(config, packing=False)
        self.corpus, self.config, self.seed, self.shuffle = corpus, config, seed, shuffle
        self.batch, self.accumulation, self.dp_rank, self.dp_size = batch, accumulation, dp_rank, dp_size
        self._flow = Flow(config, workers, seed, pixels_dtype, pin)
        order = np.random.default_rng([seed, 0xFEED]).permutation(len(corpus)) if shuffle else np.arange(len(corpus))
        shares_pictures = config.share_pictures and config.packing and corpus.has_pictures
        self._beginnings = corpus.beginnings() if shares_pictures else None
        room = config.cutoff_len if config.packing else None
        self._packs: Packs = pack(corpus.lengths, order, room=room, beginnings=self._beginnings)
        self.epoch, self.taken, self.skipped = 0, 0, 0
        self._before = self.state()

    @property
    def global_batch(self) -> int:
        """Sequences of a step over all ranks."""
        return self.batch * self.accumulation * self.dp_size

    @property
    def sequences(self) -> int:
        """Sequences of an epoch."""
        return len(self._packs)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.sequences // self.global_batch)

    def state(self, *, untaken: int = 0) -> dict[str, Any]:
        """Where the run is: epoch, sequences of it that all ranks took, and what they belong to.

        untaken: 1 where the last step that was handed out did not become an update, and is to come again.
        """
        assert untaken in (0, 1), untaken
        if untaken:
            return dict(self._before)
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "skipped": self.skipped,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sequences": self.sequences,
            "shared": self._beginnings is not None,
            "fingerprint": self.corpus.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state. ValueError where what decides the order of rows is not what it was."""
        own = self.state()
        for name in ("fingerprint", "seed", "shuffle", "sequences", "shared"):
            now = own[name]
            if state.get(name, now) != now:
                raise ValueError(
                    f"resume: the rows or their order are not the checkpoint's ({name} was {str(state[name])[:12]}, is"
                    f" {str(now)[:12]}); give the same data, seed, cutoff_len, packing, disable_shuffling and"
                    " share_pictures, or begin in another folder"
                )
        self.epoch, self.taken, self.skipped = int(state["epoch"]), int(state["taken"]), int(state.get("skipped", 0))
        self._before = self.state()

    def __iter__(self) -> Iterator[list[Batch]]:
        for (epoch, taken), batches in self._flow.steps(self._deal(self.epoch, self.taken)):
            self._before = self.state()
            self.epoch, self.taken = epoch, taken
            self.skipped += say_skipped(batches, self.skipped)
            yield batches

    def first(self) -> list[Batch]:
        """The micro-batches of the next step, without taking it."""
        return next(Flow(self.config, 0, self.seed).steps(self._deal(self.epoch, self.taken)))[1]

    def _deal(self, epoch: int, taken: int) -> Iterator[Dealt]:
        """This rank's rows of each step from there on."""
        if not self.sequences:
            raise ValueError("dataset: got no row, expected at least one")
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
            order = order if self.shuffle else np.arange(self.sequences)
            while taken < self.sequences:
                step = order[taken : taken + self.global_batch]
                taken += len(step)
                micros = [
                    [self._sequence(int(sequence)) for sequence in step[part]]
                    for part in shares(len(step), self.accumulation, self.dp_rank, self.dp_size)
                ]
                yield Dealt((epoch, taken), epoch, micros)
            epoch, taken = epoch + 1, 0

    def _sequence(self, number: int) -> list[Row]:
        """The rows of a sequence, one behind the other."""
        indexes = self._packs[number]
        rows = [self.corpus.row(int(index)) for index in indexes]
        shared = 0 if self._beginnings is None else self._beginnings.of(indexes)
        return behind_one(rows, shared) if shared else rows


def say_skipped(batches: list[Batch], before: int) -> int:
    """How many rows of a step have a picture that cannot be read; the first ones of a run are named."""
    found = [reason for batch in batches for reason in batch.skipped]
    for reason in found[: max(0, SHOWN - before)]:
        log.warning("not learned: %s", reason)
    return len(found)


def shares(count: int, accumulation: int, dp_rank: int, dp_size: int) -> list[slice]:
    """Which of a step's sequences this rank's micro-batches take: parts of equal size, or as equal as can be."""
    parts = accumulation * dp_size
    mine = [micro * dp_size + dp_rank for micro in range(accumulation)]
    return [slice(part * count // parts, (part + 1) * count // parts) for part in mine]

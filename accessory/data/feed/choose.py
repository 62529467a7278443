"""Which rows of the data files are used, and how often: ratio, samples and max_samples.

Must not know what a row means; training and whoever asks for the same rows later get them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from accessory.data.feed.files import read_rows
from accessory.data.feed.sources import FeedConfig, Source
from accessory.data.feed.split import drawn
from accessory.data.feed.survey import Stretch, Survey


@dataclass(frozen=True)
class File:
    """A data file, how it is read, and what a look at it found."""

    path: Path
    source: Source
    """With its root."""
    survey: Survey
    number: int
    """Of its source."""


def stretches(files: list[File], config: FeedConfig) -> Iterator[Stretch]:
    """The parts of all files that are used; ratio, samples and max_samples leave rows out, or use some again."""
    left: dict[int, int] = {}
    for index, (file, keep) in enumerate(zip(files, kept(files, config), strict=True)):
        ends = [*(span.number for span in file.survey.spans[1:]), file.survey.rows + 1]
        for span, end in zip(file.survey.spans, ends, strict=False):
            part = None if keep is None else keep[span.number - 1 : end - 1]
            stretch = Stretch(index, file.source, file.survey, span, part)
            if config.max_samples is None:
                yield stretch
                continue
            room = left.setdefault(file.number, config.max_samples)
            if not room:
                break
            part = np.ones(end - span.number, np.int64) if part is None else part.copy()
            taken = 0
            for raw in read_rows(file.path, span):
                place = raw.number - span.number
                part[place] = min(part[place], room - taken)
                taken += int(part[place])
            left[file.number] = room - taken
            yield replace(stretch, keep=part)


def kept(files: list[File], config: FeedConfig) -> list[np.ndarray | None]:
    """For each file how often its row numbers are used: `ratio` and `samples` draw from all rows of a source."""
    chosen: list[np.ndarray | None] = [None] * len(files)
    for number, source in enumerate(config.sources):
        own = [index for index, file in enumerate(files) if file.number == number]
        if source.samples is not None and own:
            for index, times in zip(own, _samples([files[at] for at in own], source.samples, config.seed), strict=True):
                chosen[index] = times
        if source.ratio == 1 or not own:
            continue
        ends = np.cumsum([files[index].survey.rows for index in own])
        used = np.zeros(ends[-1], np.int64)
        dice = np.random.default_rng([config.seed, number])
        used[dice.choice(int(ends[-1]), round(source.ratio * int(ends[-1])), replace=False)] = 1
        for index, end in zip(own, ends, strict=True):
            chosen[index] = used[end - files[index].survey.rows : end]
    return chosen


def _samples(files: list[File], count: int, seed: int) -> list[np.ndarray]:
    """For each file of a source how often each of its row numbers is used, so that there are `count` rows in all."""
    numbers = [
        np.arange(file.survey.rows)
        if file.survey.kind == "packed"
        else np.fromiter((raw.number - 1 for raw in read_rows(file.path)), np.int64)
        for file in files
    ]
    times = drawn(sum(map(len, numbers)), count, seed, files[0].number)
    kept, first = [], 0
    for file, own in zip(files, numbers, strict=True):
        kept.append(np.zeros(file.survey.rows, np.int64))
        kept[-1][own] = times[first : first + len(own)]
        first += len(own)
    return kept

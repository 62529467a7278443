"""Which rows share a sequence: best fit among the rows of a window. A function of lengths and order alone.

Must not know tokens, files or epochs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from accessory.data.feed.share import Beginnings

WINDOW = 4096  # rows among which partners are sought; rows further apart keep their order


@dataclass(frozen=True)
class Packs:
    """Sequences of rows: sequence i holds rows[bounds[i] : bounds[i + 1]]."""

    rows: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[self.bounds[index] : self.bounds[index + 1]]


def pack(lengths: np.ndarray, order: np.ndarray, *, room: int | None, beginnings: Beginnings | None = None) -> Packs:
    """Every row of `order` once, in sequences of at most `room` positions; None: each row by itself.

    beginnings: rows that begin alike share sequences in which that beginning counts once, whatever lies between them;
    who finds no partner is packed as usual. Raises ValueError for a row that is longer than the room.
    """
    if room is None:
        return Packs(order, np.arange(len(order) + 1))
    found = list(_alike(lengths, order, room, beginnings)) if beginnings is not None else []
    if found:
        rest = np.setdiff1d(order, np.concatenate(found), assume_unique=True)
        places = np.empty(int(order.max()) + 1, np.int64)
        places[order] = np.arange(len(order))
        found += _near(lengths, rest[np.argsort(places[rest])], room)
        found.sort(key=lambda rows: places[rows[0]])
    else:
        found = list(_near(lengths, order, room))
    flat = np.concatenate(found) if found else np.zeros(0, np.int64)
    sizes = [len(rows) for rows in found]
    return Packs(flat, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64))


def _near(lengths: np.ndarray, order: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Rows that share a sequence, among those of a window."""
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for places in best_fit(lengths[window].tolist(), room):
            yield window[places]


def _alike(lengths: np.ndarray, order: np.ndarray, room: int, beginnings: Beginnings) -> Iterator[np.ndarray]:
    """At least two rows each that begin alike and fit behind that beginning."""
    groups = beginnings.groups[order]
    by_group = np.argsort(groups, kind="stable")
    by_group = by_group[np.searchsorted(groups[by_group], 0) :]
    for places in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
        if len(places) < 2:
            continue
        rows = order[places]
        shared = int(beginnings.lengths[rows[0]])
        for chosen in best_fit((lengths[rows] - shared).tolist(), room - shared):
            if len(chosen) > 1:
                yield rows[chosen]


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best fit decreasing (Johnson 1974): from the longest on, each into the fullest sequence that has room for it.

    Gives the places in `lengths` that share a sequence, in their order; sequences by their first place.
    """
    sequences: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (positions left, sequence), sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        if length > room:
            raise ValueError(f"packing: got a row of {length} positions, expected at most {room}; raise cutoff_len")
        at = bisect.bisect_left(left, (length, -1))
        if at < len(left):
            free, number = left.pop(at)
        else:
            free, number = room, len(sequences)
            sequences.append([])
        sequences[number].append(place)
        if free > length:
            bisect.insort(left, (free - length, number))
    return sorted((sorted(sequence) for sequence in sequences), key=lambda sequence: sequence[0])

"""Which rows begin alike with one picture, so that a sequence needs that beginning once, and rows behind it.

Must not know batches, epochs or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from accessory.data.feed.store import Store

if TYPE_CHECKING:
    from accessory.data.feed.corpus import Row


@dataclass(frozen=True)
class Beginnings:
    """Of each row the group of rows that begin as it does, and how many positions that beginning has."""

    groups: np.ndarray
    """int64; -1 where a row has no picture or several, or learns something before its picture ends."""
    lengths: np.ndarray
    """int64; 0 where there is no group."""

    def of(self, rows: np.ndarray) -> int:
        """Positions that the rows of a sequence share; 0 for one row, and for rows of several groups."""
        groups = self.groups[rows]
        return int(self.lengths[rows[0]]) if len(rows) > 1 and groups[0] >= 0 and (groups == groups[0]).all() else 0


def find_beginnings(
    parts: Iterable[tuple[Store, np.ndarray, np.ndarray]], *, counts: Callable[[Store], Sequence[int]]
) -> Beginnings:
    """Compare all that stands up to a picture's last slot, and the picture's path.

    parts: stores, the rows of each (int64), and the positions at which they begin. counts: the slots of each picture
    of a store; none where pictures take no place in the sequence. Where the
    token behind the picture is learned, as in a bare caption, the last slot that predicts it stays with its row.
    """
    groups, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    known: dict[tuple[bytes, bytes], int] = {}
    for store, rows, begins in parts:
        groups.append(np.full(len(rows), -1, np.int64))
        lengths.append(np.zeros(len(rows), np.int64))
        slots = counts(store) if "pictures" in store.arrays else []
        if not len(slots):
            continue
        ids, learn, names, name_ends = (store.arrays[name] for name in ("ids", "learn", "names", "name_ends"))
        pictures = store.arrays["pictures"]
        for place in np.flatnonzero(pictures[rows + 1] - pictures[rows] == 1).tolist():
            picture, begin = int(pictures[rows[place]]), int(begins[place])
            end = begin + int(store.arrays["slots"][picture]) + slots[picture]
            end -= int(learn[end])
            if learn[begin:end].any():
                continue
            name = names[int(name_ends[picture - 1]) if picture else 0 : int(name_ends[picture])]
            key = (name.tobytes(), ids[begin:end].tobytes())
            groups[-1][place] = known.setdefault(key, len(known))
            lengths[-1][place] = end - begin
    return Beginnings(np.concatenate(groups), np.concatenate(lengths))


def behind_one(rows: Sequence[Row], length: int) -> list[Row]:
    """The rows of one sequence that share so many positions: the first one whole, of the others what comes behind."""
    first, *others = rows
    cut = [
        replace(
            row,
            ids=row.ids[length:],
            supervised=row.supervised[length:],
            slots=row.slots[length:],
            pictures=(),
            sizes=(),
            shared=length,
        )
        for row in others
    ]
    return [replace(first, shared=length), *cut]

"""What the rows of the cache hold, and which row a prompt takes, so that a shared beginning is computed once.

Must not know tensors of the model or scheduling. A position is known by its key: a token's id, or for a picture's slot
a negative number made of the picture's pixels and the slot's place in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 16  # positions: copying fewer saves nothing
SPARE = 64  # a row that goes on with what it holds may lose this many positions; otherwise the beginning is copied


NOTHING = np.zeros(0, dtype=np.int64)
"""The keys of a prompt that shares nothing."""


@dataclass(frozen=True)
class Seat:
    """The row for a prompt, and the row whose first `length` positions it begins with (itself: they are in place)."""

    row: int
    source: int
    length: int


class Rows:
    """The rows of one cache. reuse: whether beginnings are shared at all; multiple: only so many positions at once."""

    def __init__(
        self, rows: int, *, size: int, reuse: bool = True, multiple: int = 1, usable: Collection[int] | None = None
    ) -> None:
        """usable: rows that requests may have; None: all."""
        self.free = set(range(rows) if usable is None else usable)
        self._keys = np.zeros((rows, size), dtype=np.int64)
        self._held = [0] * rows  # positions that are in the cache
        self._used = [0] * rows  # when the row was last taken
        self._clock = 0
        self._reuse, self._multiple = reuse, multiple

    def take(self, keys: np.ndarray) -> Seat | None:
        """A free row for a prompt; None where there is none. keys int64 [T], of which the last is never shared."""
        if not self.free:
            return None
        shared = [self._common(row, keys) for row in range(len(self._held))] if self._reuse else [0] * len(self._held)
        best = max(range(len(shared)), key=lambda row: (shared[row], row in self.free, -row))
        length = shared[best]
        if length < LEAST:
            length = 0
        stays = length and best in self.free and self._held[best] - length <= SPARE
        row = best if stays else min(self.free, key=lambda row: (self._held[row] > 0, self._used[row], row))
        self.free.remove(row)
        self._clock += 1
        self._used[row] = self._clock
        if length:
            self._used[best] = self._clock
        self._keys[row, : len(keys)] = keys
        self._held[row] = length
        return Seat(row, best if length else row, length)

    def feed(self, row: int, upto: int) -> None:
        """The prompt's positions before `upto` are in the cache."""
        self._held[row] = upto

    def say(self, row: int, position: int, token: int) -> None:
        """A token of an answer was fed at this position."""
        if self._multiple == 1 and position == self._held[row]:
            self._keys[row, position] = token
            self._held[row] = position + 1

    def release(self, row: int, *, keep: bool = True) -> None:
        """Nobody uses the row; keep: what it holds may be shared."""
        self.free.add(row)
        if not keep:
            self.forget(row)

    def forget(self, row: int) -> None:
        """What the row holds is no longer what was said."""
        self._held[row] = 0

    def _common(self, row: int, keys: np.ndarray) -> int:
        """Positions that a row shares with a prompt, in multiples."""
        length = min(self._held[row], len(keys) - 1)
        if length < LEAST:
            return 0
        differs = self._keys[row, :length] != keys[:length]
        if differs.any():
            length = int(differs.argmax())
        return length // self._multiple * self._multiple


def digest(*parts: bytes) -> int:
    """63 bits of a picture: of its pixels, and of what else decides its features."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return int.from_bytes(found.digest(), "little") >> 1


def keys_of(ids: Sequence[int], slots: Sequence[int], digests: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The key of every position, int64 [T].

    slots: -1, or rows of the features of all pictures; counts: how many of them each picture has. Pictures that take no
    slots (an adapter's prompt) change every position: they mark the first.
    """
    keys = np.asarray(ids, dtype=np.int64).copy()
    places = np.asarray(slots, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]) if counts else np.zeros(1, dtype=np.int64)
    seen = places >= 0
    if seen.any():
        whose = np.searchsorted(starts, places[seen], side="right") - 1
        marks = np.asarray(digests, dtype=np.int64)[whose]
        keys[seen] = _negative(marks, places[seen] - starts[whose])
    elif digests:
        whole = digest(b"".join(mark.to_bytes(8, "little") for mark in digests))
        keys[:1] = _negative(np.asarray([whole], dtype=np.int64), keys[:1])
    return keys


def _negative(marks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """One number below 0 for each pair."""
    mixed = marks.astype(np.uint64) + offsets.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed | np.uint64(1 << 63)).astype(np.int64)

"""Which rows are drawn: by a seed and a row's number alone, so that any later run draws the same ones again.

Must not know files, tokens or what a row holds.
"""

from __future__ import annotations

import numpy as np

_SPLIT, _SAMPLE, _AGAIN = 0x5B17, 0x5A3B, 0xA6A1  # purposes, so that no draw repeats another


def held_out(size: int, amount: float, seed: int) -> np.ndarray:
    """The rows of `size` that are kept for validation: their numbers from 0 on, int64, rising.

    amount: a number of rows, or below 1 a share, which is at least one row. The rows are those that were read, good or
    bad, in the order of sources and files. Raises ValueError where that leaves no row on one side.
    """
    count = max(1, round(amount * size)) if amount < 1 else int(amount)
    if amount <= 0 or not 0 < count < size:
        raise ValueError(f"val_size: got {amount:g} of {size} rows, expected at least 1 and fewer than all; change it")
    return _lowest(size, count, seed, _SPLIT)


def drawn(size: int, count: int, seed: int, source: int) -> np.ndarray:
    """How often each of `size` rows is used where `count` rows are asked for, int64 [size].

    Each at most once where there are enough; else each once, and the rest drawn from all with replacement. source:
    number of the source among those of the run.
    """
    if count <= size:
        times = np.zeros(size, np.int64)
        times[_lowest(size, count, seed, _SAMPLE + (source << 16))] = 1
        return times
    again = _hashed(np.arange(count - size, dtype=np.uint64), seed, _AGAIN + (source << 16)) % np.uint64(max(size, 1))
    return np.bincount(again.astype(np.int64), minlength=size) + 1 if size else np.zeros(0, np.int64)


def _lowest(size: int, count: int, seed: int, purpose: int) -> np.ndarray:
    """The numbers below size with the `count` lowest hashes, rising."""
    hashes = _hashed(np.arange(size, dtype=np.uint64), seed, purpose)
    order = np.lexsort((np.arange(size), hashes))
    return np.sort(order[:count]).astype(np.int64)


def _hashed(numbers: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014) of numbers; numpy's own generators may change between versions."""
    state = _mixed(np.asarray([(seed * 2 + 1) & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.uint64(purpose)
    return _mixed(numbers + _mixed(state)[0])


def _mixed(state: np.ndarray) -> np.ndarray:
    """One step of it; uint64 wraps around."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

"""Keys and values of running requests: fixed rows, written at positions, read up to an extent.

Must not know tokens, text or scheduling: whoever owns the cache says which row and which positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.native import attends, store, widen, zeros

STEP = 64  # what is read grows in such steps: few shapes, for kernels that are prepared per shape


@dataclass(frozen=True)
class Place:
    """Where the tokens of one forward go, computed once for all layers."""

    rows: Tensor | None
    """[B]; None: rows 0 .. B-1."""
    index: tuple[Tensor, slice, Tensor]
    """Of the tokens' slots in a layer's keys."""
    mask: Tensor | None
    """Which keys each query may see, bool [B, 1, T, read]; None: the tokens are all there is, causal by index."""
    read: int
    """Slots that are read."""
    reads: list[int] | None = None
    """Of each row by itself, where no row may share a product with others."""


class Cache:
    """k, v per layer of shape [rows, kv_heads, size + 1, head_dim]; the last slot takes what padding (-1) writes.

    A row is a request. Masks come from positions: a query at position p sees keys 0..p of its row, so a row is reused
    without clearing. `extent` (host side, so that nothing waits for the device) bounds what is read: set it to at
    least the highest position + 1 before a forward; `reads` says the same of each row, where rows must not share
    products.
    `prompts` holds a zero-init adapter's keys and values, [rows, kv_heads, prompt length, head_dim] per layer.
    """

    def __init__(
        self,
        layers: int,
        *,
        rows: int,
        size: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (rows, kv_heads, size + 1, head_dim)
        # filled, so that what does not fit is known now
        self.keys = [zeros(shape, device=device, dtype=dtype).zero_() for _ in range(layers)]
        self.values = [zeros(shape, device=device, dtype=dtype).zero_() for _ in range(layers)]
        for tensor in (*self.keys, *self.values):
            widen(tensor)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows, self.size, self.extent = rows, size, size
        self.reads: list[int] | None = None
        self.by_row = attends(self.keys[0])
        """Whether new tokens are attended to by a kernel that reads each row as far as it goes."""
        self._slots = torch.arange(size, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def clear(self, row: int, start: int = 0) -> None:
        """Zero a row from a position on. Only what may hold NaN needs it: a masked NaN is still NaN in a product."""
        for tensor in (*self.keys, *self.values):
            tensor[row, :, start:].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` positions of row `source`, and its adapter's prompt."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
        for pair in self.prompts.values():
            for tensor in pair:
                tensor[target] = tensor[source]

    def place(self, rows: Tensor | None, positions: Tensor) -> Place:
        """The slots of tokens at positions [B, T] of rows [B] (None: 0..B-1), and what they may see; padding: key 0."""
        batch, length = positions.shape
        assert 0 < self.extent <= self.size, f"extent {self.extent} of a cache of {self.size}"
        if self.by_row and not torch.compiler.is_compiling():  # kernels look no further
            last, row = int(positions.max()), batch - 1 if rows is None else int(rows.max())
            assert last < self.size and row < self.rows, f"{last} of {self.size} positions, {row} of {self.rows} rows"
        index = (self._slots[:batch] if batch <= self.size else torch.arange(batch)) if rows is None else rows
        where = (index.to(positions.device)[:, None], slice(None), positions)
        if self.extent == length and _starts_over(positions):
            return Place(rows, where, None, length)
        read = self._rounded(self.extent)
        reads = None if self.reads is None else [self._rounded(extent) for extent in self.reads]
        seen = self._slots[:read] <= positions.clamp(min=0).unsqueeze(-1)
        return Place(rows, where, seen.unsqueeze(1), read, reads)

    def _rounded(self, extent: int) -> int:
        """Slots that are read for so many positions."""
        return min(-(-max(extent, 1) // STEP) * STEP, self.size)

    def write(self, layer: int, place: Place, k: Tensor, v: Tensor) -> None:
        """Store k, v [B, T, kv_heads, D] of one layer."""
        keys, values = self.keys[layer], self.values[layer]
        if self.by_row and k.dtype == v.dtype == keys.dtype and not torch.compiler.is_compiling():
            return store(k, v, keys, values, place.index[2], place.rows)
        keys[place.index] = k.to(keys.dtype)
        values[place.index] = v.to(values.dtype)

    def read(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        """All that may be seen in one layer where there is a mask, [B, kv_heads, read, D] each.

        These are views of the cache for rows 0..B-1, copies for other rows.
        """
        rows = slice(0, len(place.index[2])) if place.rows is None else place.rows
        return self.keys[layer][rows, :, : place.read], self.values[layer][rows, :, : place.read]


def _starts_over(positions: Tensor) -> bool:
    """Whether every row begins at 0, so that the tokens see but each other; only asked where looking costs no wait."""
    return positions.device.type == "cpu" and not positions[:, 0].any()

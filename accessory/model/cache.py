"""Keys and values of running requests: fixed rows, written at positions, read up to an extent.

Must not know tokens, text or scheduling: whoever owns the cache says which row and which positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """k, v per layer of shape [rows, kv_heads, size + 1, head_dim]; the last slot takes what padding (-1) writes.

    A row is a request. Masks come from positions: a query at position p sees keys 0..p of its row, so a row is reused
    without clearing. `extent` (host side, so that nothing waits for the device) bounds what is read: set it to at
    least the highest position + 1 before a forward; equal extents give static shapes.
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
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows, self.size, self.extent = rows, size, size
        self._slots = torch.arange(size, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def write(self, layer: int, rows: Tensor | None, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, kv_heads, D] at positions [B, T] of rows [B] (None: rows 0..B-1); return all keys, values.

        Returns [B, kv_heads, extent, D] each; views of the cache when rows is None.
        """
        keys, values = self.keys[layer], self.values[layer]
        index = self._index(positions) if rows is None else rows
        keys[index[:, None], :, positions] = k.to(keys.dtype)
        values[index[:, None], :, positions] = v.to(values.dtype)
        if rows is None:
            return keys[: len(k), :, : self.extent], values[: len(k), :, : self.extent]
        return keys[rows, :, : self.extent], values[rows, :, : self.extent]

    def mask(self, positions: Tensor) -> Tensor:
        """Which keys each query may see: positions [B, T] -> bool [B, 1, T, extent]; padding sees key 0."""
        seen = self._slots[: self.extent] <= positions.clamp(min=0).unsqueeze(-1)
        return seen.unsqueeze(1)

    def _index(self, positions: Tensor) -> Tensor:
        return torch.arange(positions.shape[0], device=positions.device)

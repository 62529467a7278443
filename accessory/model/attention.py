"""Grouped-query attention with rotary positions, over a cache, packed segments or a plain causal row.

Must not know tokens, the layers around it, or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import native
from accessory.dist import Shard
from accessory.model.cache import Cache, Place
from accessory.model.parallel import Column, Row, together
from accessory.model.rope import rotate
from accessory.model.spelled import spelled_out


@dataclass
class Step:
    """What every layer of one forward shares. mask: bool [B, 1, T, S], None for plain causal."""

    positions: Tensor
    turns: Tensor
    mask: Tensor | None
    cache: Cache | None = None
    rows: Tensor | None = None
    place: Place | None = None
    prompt: Callable[[int, Tensor], Tensor | None] | None = None
    """(layer, q [B, T, H, D]) -> what a zero-init adapter adds to the attention's output, [B, T, H * D]."""
    starts: list[int] | None = None
    """Where segments are packed, on a CPU: the first key that each block of queries may see."""
    window: int | None = None
    """Of layers that slide: how many tokens a query sees."""
    near: Tensor | None = None
    """The mask of these layers."""
    near_starts: list[int] | None = None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over this rank's heads."""

    def __init__(
        self,
        layer: int,
        *,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        slides: bool,
        qkv_bias: bool,
        shard: Shard,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.slides = layer, head_dim, slides
        place = {"shard": shard, "device": device, "dtype": dtype}
        kv = n_kv_heads * head_dim
        self.wq = Column(dim, n_heads * head_dim, units=n_heads, bias=qkv_bias, **place)
        self.wk = Column(dim, kv, units=n_kv_heads, bias=qkv_bias, **place)
        self.wv = Column(dim, kv, units=n_kv_heads, bias=qkv_bias, **place)
        self.wo = Row(n_heads * head_dim, dim, **place)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in together(x, (self.wq, self.wk, self.wv)))
        q, k = rotate(q, step.turns), rotate(k, step.turns)  # (B, T, H, D)
        y = self._attend(q, k, v, step)
        if step.prompt is not None and (extra := step.prompt(self.layer, q)) is not None:
            y = y + extra
        return self.wo(y)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """What this layer's queries see, [B, T, H * D]; keys and values go to the cache, where there is one."""
        mask, starts = (step.near, step.near_starts) if self.slides else (step.mask, step.starts)
        cache, place = step.cache, step.place
        if cache is None:
            return attend(q, k.transpose(1, 2), v.transpose(1, 2), mask=mask, starts=starts)
        cache.write(self.layer, place, k, v)
        if cache.by_row and q.dtype == torch.bfloat16:
            window = step.window if self.slides else None
            return native.attend(
                q, cache.keys[self.layer], cache.values[self.layer], step.positions, place.rows, window
            )
        if place.mask is None:
            return attend(q, k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        keys, values = cache.read(self.layer, place)
        return attend(q, keys, values, mask=mask) if place.reads is None else apart(q, keys, values, mask, place.reads)


def apart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, reads: list[int]) -> Tensor:
    """`attend`, row by row: none's result depends on how many there are, nor on how far the others read."""
    assert mask is not None, "rows that are read apart have a mask"
    parts = []
    for row, read in enumerate(reads):
        at = slice(row, row + 1)
        parts.append(attend(q[at], k[at, :, :read], v[at, :, :read], mask=mask[at, ..., :read]))
    return torch.cat(parts)


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, starts: list[int] | None = None) -> Tensor:
    """Attention of q [B, T, H, D] over k, v [B, G, S, D], G dividing H -> [B, T, H * D].

    mask: bool [B or 1, 1, T, S], True where a query may look; None: causal by index (T = S). On CUDA torch's fused
    kernels run; on a CPU `spelled_out`, whose `starts` these are.
    """
    if q.device.type == "cuda":
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[1]
        )
        return y.transpose(1, 2).flatten(2)
    with torch.autocast(q.device.type, enabled=False):
        return spelled_out(q, k.to(q.dtype), v.to(q.dtype), mask=mask, starts=starts)

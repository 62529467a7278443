"""The Q-Former: a small BERT whose learned queries read a picture through cross-attention (BLIP-2, arXiv 2301.12597).

Must not know which tower wrote the tokens it reads, nor what its rows are for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.vision.config import VisionConfig
from accessory.vision.init import fill, fill_layers, grid_code


class QFormer(nn.Module):
    """Queries [N, Q, hidden] and the tower's tokens [N, T, width] -> [N, Q, hidden]. No dropout: same input, same rows.

    Only the query branch exists, as in every BLIP-2 that feeds a language model.
    """

    def __init__(self, config: VisionConfig, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.layernorm = nn.LayerNorm(config.hidden, eps=config.eps)
        self.key_positions = nn.Parameter(torch.empty(1, tokens, width)) if config.key_positions else None
        crossing = [width if index % config.cross_every == 0 else None for index in range(config.layers)]
        self.layers = nn.ModuleList(QFormerLayer(config, width) for width in crossing)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        keys = tokens if self.key_positions is None else tokens + self.key_positions
        h = queries if self.norm_first else self.layernorm(queries)
        for layer in self.layers:
            h = layer(h, keys, tokens)
        return self.layernorm(h) if self.norm_first else h

    def init_weights(self, generator: torch.Generator, *, side: int | None = None) -> None:
        """Draw the first weights.

        side: patches along the picture's side; then key positions start as the sin/cos code of their patch, and
        cross-attention compares queries and keys as they come (both weights 1.2 times the identity).
        """
        fill_layers(self, generator)
        if self.key_positions is not None:
            fill(self.key_positions, generator)
        if side is None:
            return
        with torch.no_grad():
            if self.key_positions is not None:
                self.key_positions[0, -side * side :].copy_(grid_code(side, self.key_positions.shape[2], side=side))
            for layer in self.layers:
                if layer.crossattention is not None:
                    for linear in (layer.crossattention.query, layer.crossattention.key):
                        linear.weight.copy_(1.2 * torch.eye(*linear.weight.shape))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention to tokens of `width` (None: without), feed-forward; each summed and normed."""

    def __init__(self, config: VisionConfig, width: int | None) -> None:
        super().__init__()
        hidden, heads, eps = config.hidden, config.heads, config.eps
        self.norm_first = config.norm_first
        self.attention = Attention(hidden, hidden, heads)
        self.attention_norm = nn.LayerNorm(hidden, eps=eps)
        self.crossattention = None if width is None else Attention(hidden, width, heads)
        self.crossattention_norm = None if width is None else nn.LayerNorm(hidden, eps=eps)
        self.up = nn.Linear(hidden, config.intermediate)
        self.down = nn.Linear(config.intermediate, hidden)
        self.feed_forward_norm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        h = self._add(h, self.attention_norm, lambda x: self.attention(x, x, x))
        if self.crossattention is not None:
            h = self._add(h, self.crossattention_norm, lambda x: self.crossattention(x, keys, values))
        return self._add(h, self.feed_forward_norm, lambda x: self.down(F.gelu(self.up(x))))

    def _add(self, h: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Add a sublayer, normed before it or after the sum."""
        return h + sublayer(norm(h)) if self.norm_first else norm(h + sublayer(h))


class Attention(nn.Module):
    """Multi-head attention without mask: queries of width `hidden`, keys and values of width `width`."""

    def __init__(self, hidden: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (self._split(x) for x in (self.query(queries), self.key(keys), self.value(values)))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v over [N, heads, T, d]; spelled out on CPU, where fused bf16 is far slower."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

"""Attention as matmul, softmax, matmul, in blocks of queries, with its backward pass: what CPUs run.

Must not know layers, positions or caches: heads and a mask come in. Torch's fused kernels are several times slower here
in the backward pass of bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128  # queries whose scores are held at once
FEW = 32  # queries of a head, up to which bf16 scores are cheaper as k q^T: 0.2 for 1.5 ms (16 x 12 heads, 256 keys)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, starts: list[int] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q [B, T, H, D] over k, v [B, G, S, D], G dividing H -> [B, T, H * D].

    mask: bool [B or 1, 1, T, S], True where a query may look; None: causal by index (T = S). starts: of each block of
    queries the first key that any of it may see, None for 0.
    """
    if torch.compiler.is_compiling():
        starts = None  # which would be compiled anew for every batch
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, mask, starts)
    parts = [_forward(_fold(q, at, k), k, v, at, mask)[0] for at in _blocks(q, k, mask, starts)]
    folded = [_unfold(part, q) for part in parts]
    return folded[0] if len(folded) == 1 else torch.cat(folded, dim=1)


def first_keys(mask: Tensor) -> list[int]:
    """The first key that any query of each block may see, by a mask [B, 1, T, S] in which every query sees one."""
    seen = mask[:, 0].any(0)
    return [int(rows.any(0).int().argmax()) for rows in seen.split(BLOCK)]


class _Attention(torch.autograd.Function):
    """The gradients by hand: no masked score is touched again, and those of keys and values are summed in fp32."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        starts: list[int] | None,
    ) -> Tensor:
        ctx.blocks = list(_blocks(q, k, mask, starts))
        k, v = k.contiguous(), v.contiguous()  # each is multiplied many times
        parts, weights = zip(*(_forward(_fold(q, at, k), k, v, at, mask) for at in ctx.blocks), strict=True)
        ctx.save_for_backward(q, k, v, *weights)
        return torch.cat([_unfold(part, q) for part in parts], dim=1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        grad = grad.unflatten(-1, q.shape[2:])
        wide = torch.float32 if len(weights) > 1 else k.dtype
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for at, p in zip(ctx.blocks, weights, strict=True):
            queries, keys = at
            dy = _fold(grad, at, k, scale=1.0)
            grad_v[:, :, keys] += p.transpose(-1, -2) @ dy
            ds = torch.ops.aten._softmax_backward_data(dy @ v[:, :, keys].transpose(-1, -2), p, -1, p.dtype)
            grad_k[:, :, keys] += ds.transpose(-1, -2) @ _fold(q, at, k)
            part = _unfold(ds @ k[:, :, keys], q)
            grad_q[:, queries] = part.unflatten(-1, q.shape[2:]) * q.shape[-1] ** -0.5
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _blocks(q: Tensor, k: Tensor, mask: Tensor | None, starts: list[int] | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that they may see) of each block; keys after a block's last query are seen by none of it."""
    length, total = q.shape[1], k.shape[2]
    for number, start in enumerate(range(0, length, BLOCK)):
        stop = min(start + BLOCK, length)
        causal = mask is None or starts is not None
        yield slice(start, stop), slice(0 if starts is None else starts[number], stop if causal else total)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T of q [B, G, n, D] and k [B, G, S, D]; for few bf16 queries a CPU's library would copy all keys."""
    if q.dtype != torch.bfloat16 or q.shape[2] > FEW or torch.compiler.is_compiling():
        return q @ k.transpose(-1, -2)
    scores = torch.bmm(k.flatten(0, 1), q.flatten(0, 1).transpose(1, 2))
    return scores.transpose(1, 2).reshape(*q.shape[:3], k.shape[2])


def _fold(x: Tensor, at: tuple[slice, slice], k: Tensor, *, scale: float | None = None) -> Tensor:
    """A block of x [B, T, H, D], scaled, with the heads that share a key folded into its rows: [B, G, H / G * T, D]."""
    block = x[:, at[0]]
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    block = block if scale == 1.0 else block * scale
    return block.unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(y: Tensor, q: Tensor) -> Tensor:
    """[B, G, H / G * T, D] -> [B, T, H * D]."""
    return y.reshape(len(q), q.shape[2], -1, q.shape[3]).transpose(1, 2).flatten(2)


def _forward(
    folded: Tensor, k: Tensor, v: Tensor, at: tuple[slice, slice], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(softmax(scores) v, softmax(scores)) of one block."""
    queries, keys = at
    length = queries.stop - queries.start
    scores = _products(folded, k[:, :, keys])
    by_head = scores.unflatten(2, (-1, length))  # (B, G, H / G, T, S)
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        by_head.masked_fill_(~mask[:, :, queries, keys].unsqueeze(2), lowest)
    elif length > 1:  # only the block's own keys can lie ahead of a query
        ahead = torch.ones(length, length, dtype=torch.bool, device=folded.device).triu(1)
        by_head[..., queries.start - keys.start :].masked_fill_(ahead, lowest)
    p = scores.softmax(-1)
    return p @ v[:, :, keys], p

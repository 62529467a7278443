"""LoRA on one linear: two factors beside its weight, in the decoder inside the reduction, elsewhere by a hook.

Must not know which linears get it, nor how the factors are named in other people's files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.dist import Cut
from accessory.model.parallel import Column, Linear, enter_region, own


class Factor(nn.Module):
    """One factor of a low-rank product; `cuts` as everywhere."""

    def __init__(self, cut: Cut, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.cuts = {"weight": cut}
        self.weight = nn.Parameter(torch.empty(cut.local_shape, device=device, dtype=dtype))


@dataclass(frozen=True)
class Lora:
    """scale * b(a(x)), added to a Linear's local product (arXiv 2106.09685).

    Column: `a` is replicated, `b` cut as the output. Row: `a` is cut as the input, `b` replicated. The replicated
    factor passes `enter_region`, without which each rank would see but a part of its gradient.
    """

    scale: float
    dropout: float

    def __call__(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        a, b, shard = linear.lora_a.weight, linear.lora_b.weight, linear.shard
        if isinstance(linear, Column):
            a, b = enter_region(a, shard), own(b, linear.lora_b.cuts["weight"], shard)
        else:
            b = enter_region(b, shard)
        return self.add(y, x, a, b, training=linear.training)

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, *, training: bool) -> Tensor:
        """y + scale * b(a(dropout(x)))."""
        x = F.dropout(x, self.dropout, training=training and self.dropout > 0)
        a, b = a.to(x.dtype), b.to(x.dtype)
        if torch.compiler.is_compiling():
            return y + F.linear(F.linear(x, a), b) * self.scale
        return _LowRank.apply(y.flatten(0, -2), x.flatten(0, -2), a, b, self.scale).view(y.shape)


class _LowRank(torch.autograd.Function):
    """y + scale x A' B' of rows. What has rank columns is held as rows, whose products are up to twice as fast."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low = a @ x.t()  # (rank, tokens)
        ctx.scale = scale
        ctx.save_for_backward(x, a, b, low)
        return torch.addmm(y, low.t(), b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        back = (b.t() @ dy.t()).mul_(ctx.scale)  # (rank, tokens)
        dx = back.t() @ a if ctx.needs_input_grad[1] else None
        da = back @ x if ctx.needs_input_grad[2] else None
        db = (low @ dy).mul_(ctx.scale).t() if ctx.needs_input_grad[3] else None
        return dy, dx, da, db, None


def add_lora(linear: nn.Module, rank: int, lora: Lora, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Hang uninitialised factors on one linear: keys `lora_a.weight` [r, in], `lora_b.weight` [out, r].

    A plain nn.Linear, of the projector or the tower, is whole on every rank, and so are its factors.
    """
    if not isinstance(linear, Linear):
        a, b = Cut((rank, linear.in_features)), Cut((linear.out_features, rank))
        linear.register_forward_hook(Beside(lora))
    else:
        cut = linear.cuts["weight"]
        d_out, d_in = cut.shape
        if isinstance(linear, Column):
            a, b = Cut((rank, d_in)), replace(cut, shape=(d_out, rank))
        else:
            a, b = replace(cut, shape=(rank, d_in)), Cut((d_out, rank))
    linear.lora_a = Factor(a, device=device, dtype=dtype)
    linear.lora_b = Factor(b, device=device, dtype=dtype)
    linear.adapter = lora  # outside of the decoder only where others look for its dropout


@dataclass(frozen=True)
class Beside:
    """A forward hook that adds LoRA to what a plain linear gave."""

    lora: Lora

    def __call__(self, linear: nn.Linear, given: tuple[Tensor], y: Tensor) -> Tensor:
        return self.lora.add(y, given[0], linear.lora_a.weight, linear.lora_b.weight, training=linear.training)

"""The norm and the gate of a block, with backward passes that keep little: their inputs, and one number per row.

Must not know tensor parallelism or layers. What is compiled takes the plain formula, which a compiler fuses better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim (arXiv 1910.07467), the division in fp32, the result as x."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and not torch.compiler.is_compiling():
        return _Norm.apply(x, weight, eps)
    if native.serves(x) and weight.dtype == x.dtype:
        return native.norm(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad) and not torch.compiler.is_compiling():
        return _SwiGlu.apply(gate, up)
    if native.serves(gate):
        return native.swiglu(gate, up)
    return F.silu(gate) * up


class _Norm(torch.autograd.Function):
    """With n = x / rms: dx = (g - n mean(g n)) / rms, g = dy weight; dweight = sum(dy n)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps if native.serves(x) and weight.dtype == x.dtype else None
        if ctx.eps is not None:
            ctx.save_for_backward(x, weight)
            return native.norm(x, weight, eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).type_as(x) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.eps is not None:
            return *native.norm_backward(*ctx.saved_tensors, dy, ctx.eps, of_weight=ctx.needs_input_grad[1]), None
        x, weight, scale = ctx.saved_tensors
        normed, grad, wide = x.float() * scale, dy.float(), weight.float()
        products = grad * normed
        mean = (products.flatten(0, -2) @ wide).view_as(scale) / x.shape[-1]
        dweight = products.flatten(0, -2).sum(0).type_as(weight) if ctx.needs_input_grad[1] else None
        dx = (grad * wide).addcmul_(normed, mean, value=-1).mul_(scale)
        return dx.type_as(x), dweight, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) is computed again in the backward pass: two tensors are kept, not three."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if native.serves(gate):
            return native.swiglu(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if native.serves(gate):
            return native.swiglu_backward(gate, up, dy)
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)

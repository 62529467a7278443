"""The norm, the gate and the rotation of a block, in one pass each, with the roundings of `model`'s formulas.

Must not know layers, nor how torch finds gradients: what computes them is called by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.native.building import library

MULTIPLE = 16  # numbers that are worked on at once


def serves(x: Tensor) -> bool:
    """Whether these can be called for x: bf16 on a CPU where there are kernels, and nothing is being compiled."""
    if torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return x.shape[-1] % MULTIPLE == 0 and library() is not None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim; weight bf16."""
    flat, y = _rows(x), x.new_empty(x.shape)
    rows, width = flat.shape
    threads = torch.get_num_threads()
    library().norm(flat.data_ptr(), flat.stride(0), weight.data_ptr(), y.data_ptr(), rows, width, eps, threads)
    return y


def norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, *, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and, where wanted, of the weight, which is summed in fp32."""
    x, dy, threads = x.contiguous(), dy.contiguous(), torch.get_num_threads()
    width, dx = x.shape[-1], torch.empty_like(x)
    parts = x.new_zeros(threads, width, dtype=torch.float32) if of_weight else None
    library().norm_backward(
        x.data_ptr(),
        weight.data_ptr(),
        dy.data_ptr(),
        dx.data_ptr(),
        None if parts is None else parts.data_ptr(),
        x.numel() // width,
        width,
        eps,
        threads,
    )
    return dx, None if parts is None else parts.sum(0).type_as(weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    assert gate.dtype == up.dtype and gate.shape == up.shape, f"{gate.dtype} {gate.shape}, {up.dtype} {up.shape}"
    left, right, y = _rows(gate), _rows(up), gate.new_empty(gate.shape)
    if left.stride(0) != right.stride(0):
        left, right = left.contiguous(), right.contiguous()
    threads = torch.get_num_threads()
    library().swiglu(left.data_ptr(), right.data_ptr(), left.stride(0), y.data_ptr(), *left.shape, threads)
    return y


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dgate, dup, threads = torch.empty_like(gate), torch.empty_like(up), torch.get_num_threads()
    pointers = [tensor.data_ptr() for tensor in (gate, up, dy, dgate, dup)]
    library().swiglu_backward(*pointers, gate.numel(), threads)
    return dgate, dup


def rotate(x: Tensor, turns: Tensor, *, backwards: bool = False) -> Tensor:
    """The pairs of x [B, T, H, D] turned by turns [B, T, 1, D / 2, 2], fp32 cosines and sines; or turned back."""
    batch, length, heads, width = x.shape
    flat, y = _rows(x.flatten(2)), x.new_empty(x.shape)
    turns = turns.expand(batch, length, 1, width // 2, 2).contiguous()
    library().rotate(
        flat.data_ptr(),
        flat.stride(0),
        turns.data_ptr(),
        y.data_ptr(),
        batch * length,
        heads,
        width,
        backwards,
        torch.get_num_threads(),
    )
    return y


def _rows(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n] whose numbers lie side by side, copied only where they do not."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()

"""Rotary position embedding on interleaved pairs, as in Meta's LLaMA, with the published ways to stretch it.

Must not know layers or caches: positions come in, cosines and sines go out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory import native

KINDS = ("none", "linear", "ntk", "dynamic", "llama3")


class Rope:
    """Cosines and sines of positions (RoFormer, arXiv 2104.09864).

    scaling: None; a float f, by which positions are multiplied (the reference's `rope_scaling`: 0.5 doubles the
    window); or Hugging Face's dict with `rope_type` linear | dynamic | llama3 (or ntk, its fixed form) and `factor`.
    With dynamic, keys that were cached keep the base of their time, as in transformers: beyond the window a prompt fed
    in pieces then differs from a whole one.
    """

    def __init__(
        self, head_dim: int, theta: float, scaling: float | dict[str, Any] | None = None, *, max_seq_len: int = 2048
    ) -> None:
        self.head_dim, self.theta, self.max_seq_len = head_dim, theta, max_seq_len
        self.scaling = _normal(scaling)
        self._frequencies: dict[torch.device, Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [B, T] -> (cos, sin) pairs [B, T, 1, head_dim / 2, 2], fp32. Padding (-1) counts as position 0."""
        positions = positions.clamp(min=0)
        angles = positions.unsqueeze(-1).float() * self._inverse(positions)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(2)

    def _inverse(self, positions: Tensor) -> Tensor:
        """Radians per position of each pair: [head_dim / 2], or [B, 1, head_dim / 2] where it grows with the row."""
        kind, factor = self.scaling["rope_type"], self.scaling["factor"]
        if kind == "dynamic":  # the base grows once a row is longer than the trained window
            window = self.scaling.get("original_max_position_embeddings") or self.max_seq_len
            length = (positions.amax(-1).float() + 1).clamp(min=window)
            stretch = (factor * length / window - (factor - 1)) ** (self.head_dim / (self.head_dim - 2))
            return 1.0 / (self.theta * stretch[:, None, None]) ** self._exponents(positions.device)
        if positions.device not in self._frequencies:
            self._frequencies[positions.device] = self._fixed(kind, factor, positions.device)
        return self._frequencies[positions.device]

    def _fixed(self, kind: str, factor: float, device: torch.device) -> Tensor:
        """The frequencies of every kind that does not depend on the length."""
        stretch = factor ** (self.head_dim / (self.head_dim - 2)) if kind == "ntk" else 1.0
        plain = 1.0 / (self.theta * stretch) ** self._exponents(device)
        if kind == "linear":
            return plain / factor
        return self._llama3(plain, factor) if kind == "llama3" else plain

    def _llama3(self, plain: Tensor, factor: float) -> Tensor:
        """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between interpolated."""
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        window = self.scaling["original_max_position_embeddings"]
        waves = 2 * math.pi / plain
        smooth = ((window / waves - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - smooth) * plain / factor + smooth * plain

    def _exponents(self, device: torch.device) -> Tensor:
        return torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim


def grows(scaling: float | dict[str, Any] | None) -> bool:
    """Whether a position's rotation depends on how long its row has become."""
    return _normal(scaling)["rope_type"] == "dynamic"


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of x [B, T, H, D] by `turns`; computed in fp32, returned as x."""
    if native.serves(x) and not turns.requires_grad:
        return _Rotation.apply(x, turns) if torch.is_grad_enabled() and x.requires_grad else native.rotate(x, turns)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # compilers do not fuse complex numbers
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.view_as_complex(turns)).flatten(-2).to(x.dtype)
    (even, odd), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """By kernel; backward turns the gradient back."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return native.rotate(x, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return native.rotate(dy, *ctx.saved_tensors, backwards=True), None


def _normal(scaling: float | dict[str, Any] | None) -> dict[str, Any]:
    """Any accepted form as one dict; ValueError for others."""
    if scaling is None:
        return {"rope_type": "none", "factor": 1.0}
    if isinstance(scaling, int | float):
        if not scaling > 0:
            raise ValueError(f"rope_scaling: got {scaling}, expected a positive multiplier of positions such as 0.5")
        return {"rope_type": "linear", "factor": 1.0 / scaling}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling: got {scaling!r}, expected a number or a dict with rope_type and factor")
    kind = scaling.get("rope_type", scaling.get("type"))
    kind = "none" if kind == "default" else kind
    if kind not in KINDS:
        raise ValueError(f"rope_scaling: got type {kind!r}, expected one of {', '.join(KINDS)}, or a number")
    normal = {"factor": 1.0, **scaling, "rope_type": kind}
    needed = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    if missing := [key for key in (*needed, *(("factor",) if kind != "none" else ())) if key not in scaling]:
        raise ValueError(f"rope_scaling: got {kind} without {', '.join(missing)}; add them from the model's config")
    for key in ("factor", *needed) if kind != "none" else ():
        if not isinstance(normal[key], int | float) or not normal[key] > 0:
            raise ValueError(f"rope_scaling: got {key} {normal[key]!r}, expected a positive number")
    return normal

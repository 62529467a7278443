"""Logits to the next id: greedy, temperature, top-k, top-p, min-p, repetition penalty.

Must not know text or models. A request's randomness comes from (seed, position), never from a shared generator, so a
result does not depend on who else is in the batch, and every rank that asks would draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens."""

    temperature: float = 0.0
    """0: greedy. Above: the higher, the more even."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keep this many tokens; 0: all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: logits of ids already seen are divided by this, or multiplied where negative (arXiv 1909.05858)."""
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (all) or a positive count"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number > 0; 1 is none"),
        )
        for name, fine, expected in checks:
            if not fine:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {expected}")


def sample(
    logits: Tensor, params: Sequence[Sampling], positions: Sequence[int], *, seen: Sequence[Tensor | None] = ()
) -> Tensor:
    """Choose one id per row: logits [B, V] fp32 -> ids [B] int64 on the same device.

    positions: the position that each chosen token will take. seen: per row the ids so far [n] int64, needed (and
    read) only where a repetition penalty is set.
    """
    assert len(params) == len(positions) == len(logits), (len(params), len(positions), len(logits))
    if any(p.repetition_penalty != 1.0 for p in params):
        logits = logits.clone()
        for row, (p, ids) in enumerate(zip(params, seen, strict=True)):
            if p.repetition_penalty != 1.0 and ids is not None:
                logits[row, ids] = _penalised(logits[row, ids], p.repetition_penalty)
    chosen = logits.argmax(-1)
    drawing = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        some = [params[row] for row in drawing]
        uniforms = [uniform(p.seed, positions[row]) for row, p in zip(drawing, some, strict=True)]
        chosen[rows] = _draw(logits[rows], some, uniforms)
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: splitmix64 applied to both."""
    mixed = _splitmix(_splitmix(seed & _MASK) ^ (position & _MASK))
    return (mixed >> 11) * 2.0**-53


def _draw(logits: Tensor, params: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Inverse-transform sampling from the filtered distribution, most likely token first."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    ordered, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    temperature = column([max(p.temperature, 1e-6) for p in params])
    probs = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    before = probs.cumsum(-1) - probs
    rank = torch.arange(probs.shape[1], device=logits.device)
    keep = before < column([p.top_p for p in params])
    keep &= rank < column([p.top_k or probs.shape[1] for p in params])
    keep &= probs >= column([p.min_p for p in params]) * probs[:, :1]
    keep[:, 0] = True
    edges = (probs * keep).cumsum(-1)
    target = column(list(uniforms)) * edges[:, -1:]
    at = torch.searchsorted(edges, target, right=True).clamp(max=probs.shape[1] - 1)
    # rounding may land on a dropped token past the last kept one: step back to it
    last = (keep * (rank + 1)).amax(-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(at, last))[:, 0]


def _penalised(logits: Tensor, penalty: float) -> Tensor:
    """Push seen ids down, whatever the sign of their logits."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _splitmix(x: int) -> int:
    """One round of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)

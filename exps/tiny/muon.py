"""Muon for matrices and AdamW for the rest, with fp32 masters of 16-bit weights.
Knows tensors and groups of them, no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from accessory.train.muon import orthogonal


class MuonAdamW:
    """One optimiser over named parameters.

    matrices: 2-D hidden weights, updated by Muon (momentum orthogonalised by five Newton-Schulz steps; Jordan et al.
    2024, scaled by 0.2 sqrt(longer side) as in Moonlight so that one learning rate serves both). Weights whose name
    ends in `qkv.weight` are three matrices. rest: AdamW. Parameters may be bf16; their masters are fp32.
    """

    def __init__(self, matrices: Iterable[tuple[str, Tensor]], rest: Iterable[Tensor], *, decay: float = 0.05) -> None:
        self.decay = decay
        self.matrices = [
            (p, p.detach().float().clone(), 3 if name.endswith("qkv.weight") else 1) for name, p in matrices
        ]
        self.momenta = [torch.zeros_like(master) for _, master, _ in self.matrices]
        self.rest = list(rest)
        self.masters = [p.detach().float().clone() for p in self.rest]
        self.adam = torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.97), weight_decay=0.0, fused=True)

    def step(self, lr: float, *, clip: float = 1.0) -> float:
        """Apply the gradients clipped to norm `clip`, clear them, and return their norm."""
        used = [p for p, _, _ in self.matrices] + self.rest
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in used]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm([g.float() for g in grads]))))
        scale = min(1.0, clip / (norm + 1e-6))
        self._step_matrices(grads[: len(self.matrices)], lr, scale)
        for master, grad in zip(self.masters, grads[len(self.matrices) :], strict=True):
            master.grad = grad.float() * scale
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.rest, self.masters)
        for p in used:
            p.grad = None
        return norm

    @torch.no_grad()
    def _step_matrices(self, grads: list[Tensor], lr: float, scale: float) -> None:
        """Muon, matrices of one shape at a time."""
        groups: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = defaultdict(list)
        for i, ((_, _, parts), grad) in enumerate(zip(self.matrices, grads, strict=True)):
            momentum, grad = self.momenta[i], grad.float() * scale
            momentum.lerp_(grad, 0.05)
            nesterov = torch.lerp(grad, momentum, 0.95)
            for part, piece in enumerate(nesterov.chunk(parts)):
                wide = piece if piece.shape[0] <= piece.shape[1] else piece.T
                groups[tuple(wide.shape)].append((i, part, wide))
        for shape, entries in groups.items():
            updates = orthogonal(torch.stack([wide for _, _, wide in entries])).float() * (0.2 * max(shape) ** 0.5)
            for (i, part, _), update in zip(entries, updates, strict=True):
                _, master, parts = self.matrices[i]
                target = master.chunk(parts)[part]
                update = update if update.shape == target.shape else update.T
                target.mul_(1 - lr * self.decay).add_(update, alpha=-lr)
        torch._foreach_copy_([p for p, _, _ in self.matrices], [master for _, master, _ in self.matrices])

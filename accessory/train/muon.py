"""Muon (Jordan et al. 2024) over matrices of one shape at a time: many small products become few batched ones.

Must not know what the matrices are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic iteration, Jordan's
EPS = 1e-7
TOGETHER = 1 << 26  # elements that are orthogonalised at once, in bf16


class Muon(torch.optim.Muon):
    """torch's Muon, its state and its numbers, with updates scaled to AdamW's size (arXiv 2502.16982)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(parameter.shape)].append(parameter)
            for shape, parameters in alike.items():
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for some in _portions(parameters):
                    updates = orthogonal(torch.stack([self._direction(one, group["momentum"]) for one in some]))
                    torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(some, [update.to(some[0].dtype) for update in updates], alpha=-scale)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient smoothed, with Nesterov's look ahead, in bf16."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, buffer, momentum).bfloat16()


def orthogonal(x: Tensor, *, steps: int = 5) -> Tensor:
    """[N, rows, columns] -> about U V' of each matrix's singular value decomposition, in bf16."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT.bfloat16() if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


def _portions(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of at most so many elements, at least one matrix each."""
    count = max(1, TOGETHER // parameters[0].numel())
    for start in range(0, len(parameters), count):
        yield parameters[start : start + count]

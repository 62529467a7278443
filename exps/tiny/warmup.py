"""Throw-away heads that teach the vision encoder to see before it has to speak: dense labels of patches and cells.
Knows the encoder's tokens and rows, no language."""

from __future__ import annotations

import torch
from pool import EMPTY
from scenes import COLORS, SHAPES, SIZES
from torch import Tensor, nn
from torch.nn import functional as F

PROPERTIES = (1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES))
CLASSES = EMPTY + 1
NOTHING = 0.25  # weight of cells and patches where nothing is
PLACE = (
    4.0  # weight of where a shape is in the whole picture: comparing two of them is the language model's hardest task
)


class DenseHeads(nn.Module):
    """Linear heads on the tower's tokens [N, patches, width] and the Q-Former's rows [N, cells, dim]."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(PROPERTIES))
        self.cell = nn.Linear(dim, sum(PROPERTIES))
        self.place = nn.Linear(dim, 2)
        self.tower_class = nn.Linear(width, CLASSES)
        self.row_class = nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor, rows: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The summed loss, and the share of right answers per head."""
        scores: dict[str, float] = {}
        loss = self._places(self.patch(tokens), labels["patches"], "patch", scores)
        loss = loss + self._places(self.cell(rows), labels["cells"], "cell", scores)
        there = labels["cells"][..., 0] > 0
        if there.any():
            loss = loss + PLACE * F.mse_loss(self.place(rows)[there].float(), labels["places"][there])
        for name, head, x in (("tower", self.tower_class, tokens), ("rows", self.row_class, rows)):
            logits = head(x.mean(1)).float()
            loss = loss + F.cross_entropy(logits, labels["classes"])
            right = logits.argmax(-1) == labels["classes"]
            digit = labels["classes"] < 10
            scores[f"{name} digit"] = right[digit].float().mean().item()
            scores[f"{name} other"] = right[~digit].float().mean().item()
        return loss, scores

    @staticmethod
    def _places(logits: Tensor, labels: Tensor, name: str, scores: dict[str, float]) -> Tensor:
        """Cross-entropy of the three properties of each place."""
        there = labels[..., 0] > 0
        weight = torch.where(there, 1.0, NOTHING)
        total, right = torch.zeros(()), torch.ones_like(there)
        for i, part in enumerate(logits.split(PROPERTIES, dim=-1)):
            each = F.cross_entropy(part.flatten(0, 1).float(), labels[..., i].flatten(), reduction="none")
            total = total + (each * weight.flatten()).sum() / weight.sum()
            right = right & (part.argmax(-1) == labels[..., i])
        scores[name] = right[there].float().mean().item()
        return total

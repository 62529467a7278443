"""Tower and decoder as one module from a micro-batch to its loss: the root that gradients, shards and hooks hang on.

Must not know optimisers, ranks or how many parameters are trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.model import Llama


class Joined(nn.Module):
    """loss(llama(ids, features = vision(pixels)), labels); `blank`: pictures are read even where there are none."""

    def __init__(self, llama: Llama, *, blank: bool = False) -> None:
        """blank: a micro-batch without pictures reads one blank picture that no slot names.

        Data-parallel ranks that share the vision part's weights need it: their collectives must match.
        """
        super().__init__()
        self.llama, self.blank = llama, blank

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        slots: Tensor | None = None,
        pixels: Tensor | None = None,
        order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses, number of targets), both fp32 scalars.

        ids, positions, labels, segments, slots [B, T] int64, as in `Llama.forward`; pixels [tiles, 3, side, side];
        order [rows] int64: which rows of all tiles are the feature rows that slots count, None: all as they stand. For
        a vision part that gives rows for an adapter's prompt instead, slots[:, 0] says which picture each row of the
        batch has (-1: none), and without slots picture n belongs to row n.
        """
        inputs: dict[str, Tensor | None] = {}
        if pixels is None and self.blank:
            pixels, slots = self._nothing(ids.device), torch.full_like(ids, -1)
        if pixels is not None:
            features = self.llama.vision(pixels, order)
            if self.llama.vision.prompt_rows:
                inputs["visual"] = _of_rows(features, slots, len(ids))
            else:
                inputs |= {"features": features.reshape(-1, features.shape[-1]), "slots": slots}
        return self.llama(ids, positions, segments=segments, labels=labels, **inputs)

    def _nothing(self, device: torch.device) -> Tensor:
        """One blank picture."""
        side = self.llama.vision.config.image_size
        return torch.zeros(1, 3, side, side, device=device)


def _of_rows(features: Tensor, slots: Tensor | None, rows: int) -> Tensor:
    """What each row's picture adds to the prompt, zeros where it has none: [rows, prompt rows, dim]."""
    if slots is None:
        if len(features) != rows:
            raise ValueError(
                f"pixels: got {len(features)} pictures for {rows} rows, expected one picture per row for a model whose"
                " pictures go into its prompt; set packing false"
            )
        return features
    which = slots[:, 0]
    return torch.where((which >= 0)[:, None, None], features[which.clamp(min=0)], 0.0)

"""LLaVA's encoder (arXiv 2310.03744): an inner layer of a CLIP tower through a projector, tiles in, feature rows out.

Must not know a language model, nor which tiles a picture was cut into: the order of rows is told.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.dist import Shard
from accessory.vision.config import VisionConfig
from accessory.vision.init import fill_layers
from accessory.vision.projector import stack
from accessory.vision.tower import build_tower, init_tower, patch_side, read_layer


class LlavaEncoder(nn.Module):
    """rows[order] of rows = proj(tower(tiles)), where order -1 is the learned `image_newline`.

    On several tensor-parallel ranks each reads its share of the tiles (one at least, blank where there are too few, so
    that all ranks run the same modules) and gets the rows of all.
    """

    prompt_rows = 0

    def __init__(self, config: VisionConfig, dim: int, shard: Shard) -> None:
        super().__init__()
        self.config, self.shard = config, shard
        self.tower = build_tower(config)
        self._layer = _block(self.tower, config)
        prefix = self.tower.num_prefix_tokens if config.select_feature == "cls_patch" else 0
        if patch_side(self.tower) != config.side:
            raise ValueError(
                f"tower_args: got a tower of {patch_side(self.tower)} patches a side, expected {config.side} by"
                " patch_size or the tower's name; name the patch_size"
            )
        self.slots = config.side**2 + prefix
        self.proj = stack(config.projector, self.tower.embed_dim, dim, bias=config.projector_bias)
        newline = nn.Parameter(torch.empty(dim)) if config.merge == "spatial_unpad" else None
        self.register_parameter("image_newline", newline)

    def tokens(self, pixels: Tensor) -> Tensor:
        cls_too = self.config.select_feature == "cls_patch"
        return read_layer(self.tower, pixels, size=self.config.image_size, layer=self._layer, prefix=cls_too)

    def forward(self, pixels: Tensor, order: Tensor | None = None) -> Tensor:
        """Pixels [T, 3, size, size], order int64 [rows] -> [rows, dim]. None: each tile is a picture of its own."""
        rows = self._rows(pixels)  # (T, slots, dim)
        if self.image_newline is None:
            rows = rows.flatten(0, 1)
            return rows if order is None else rows[order.to(rows.device)]
        newline = self.image_newline.to(rows.dtype)
        if order is None:
            return torch.cat([rows, newline.expand(len(rows), 1, -1)], dim=1).flatten(0, 1)
        order = order.to(rows.device)
        return torch.where((order >= 0)[:, None], rows.flatten(0, 1)[order.clamp(min=0)], newline)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the first weights for training from scratch from a CPU generator."""
        init_tower(self.tower, self.config, generator)
        fill_layers(self.proj, generator)
        if self.image_newline is not None:
            dim = len(self.image_newline)
            with torch.no_grad():
                self.image_newline.copy_(torch.randn(dim, generator=generator) * dim**-0.5)

    @property
    def unread(self) -> frozenset[str]:
        """Parameters behind the layer that is read."""
        behind = tuple(f"tower.blocks.{number}." for number in range(self._layer + 1, len(self.tower.blocks)))
        return frozenset(name for name, _ in self.named_parameters() if name.startswith((*behind, "tower.norm.")))

    @property
    def partial(self) -> frozenset[str]:
        """Parameters whose gradient on a rank is that of its own tiles."""
        if self.shard.size == 1:
            return frozenset()
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(("tower.", "proj.")))

    def _rows(self, pixels: Tensor) -> Tensor:
        """The rows of every tile: [T, slots, dim]."""
        if self.shard.size == 1 or pixels.is_meta:
            return self.proj(self.tokens(pixels))
        count = len(pixels)
        share = max(1, -(-count // self.shard.size))
        mine = pixels[self.shard.rank * share :][:share]
        mine = F.pad(mine, (0, 0) * 3 + (0, share - len(mine)))
        return _Gather.apply(self.proj(self.tokens(mine)), self.shard)[:count]


class _Gather(torch.autograd.Function):
    """Everyone's rows one behind the other; backward: one's own part of a gradient that all ranks have in whole."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, shard: Shard) -> Tensor:
        from fairscale.nn.model_parallel.initialize import get_model_parallel_group

        ctx.place = slice(shard.rank * len(rows), (shard.rank + 1) * len(rows))
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(shard.size)]
        torch.distributed.all_gather(parts, rows, group=get_model_parallel_group())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.place], None


def _block(tower: nn.Module, config: VisionConfig) -> int:
    """The number of the block behind which the tower is left."""
    blocks = getattr(tower, "blocks", None)
    if blocks is None or not hasattr(tower, "forward_intermediates"):
        raise ValueError(f"vision tower {config.tower!r}: has no layers to choose from, expected a ViT; choose another")
    depth, layer = len(blocks), config.select_layer
    if not 1 <= abs(layer) <= depth:
        raise ValueError(
            f"select_layer: got {layer} for a tower of {depth} blocks, expected 1 to {depth} or -1 to -{depth}"
        )
    return layer - 1 if layer > 0 else depth + layer

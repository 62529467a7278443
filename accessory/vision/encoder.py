"""The encoders: tower, reader and projection of one picture put together.

Must not know a language model: `dim` is the width of the rows, and where they go is decided elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.dist import Shard
from accessory.vision.config import VisionConfig
from accessory.vision.init import fill, fill_layers, grid_code
from accessory.vision.llava import LlavaEncoder
from accessory.vision.projector import Perceiver, projection
from accessory.vision.qformer import QFormer
from accessory.vision.tower import build_tower, init_tower, patch_side, read_tokens, token_shape


def build_vision(
    config: VisionConfig,
    dim: int,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    shard: Shard | None = None,
) -> nn.Module:
    """Return the encoder of `config` whose rows are `dim` wide.

    On the meta device nothing is allocated: load a state dict with assign=True, or call `to_empty` and `init_weights`.
    On any other device the weights are drawn from `generator` (a CPU one; seed 0 when None): same seed, same bits.

    The module has
      slots        feature rows of a tile in the token sequence (qformer 34, clip 257, llava 576, perceiver 0),
      prompt_rows  rows that are added to an adapter's prefix instead (perceiver 10, else 0),
      unread       names of parameters that no row depends on, and
      partial      of those whose gradient on a tensor-parallel rank is only a part of a sum over the ranks,
      tokens       pixels [N, 3, image_size, image_size] -> what the tower makes of them [N, tokens, width],
      forward      pixels, order=None -> [N, slots or prompt_rows, dim], without any randomness; kind llava: flat rows
                   [rows, dim] of all pictures, in the order that `data.tiles.Geometry.order` gives.
    shard: the place among tensor-parallel ranks, which share the tiles of kind llava; the other kinds read all of them
    on each rank. Raises ValueError for sizes that do not fit together and for a tower that timm does not build.
    """
    with torch.device("meta"):
        if config.kind == "llava":
            module: nn.Module = LlavaEncoder(config, dim, shard or Shard())
        else:
            module = (QFormerEncoder if config.kind == "qformer" else ClipEncoder)(config, dim)
        module = module.to(dtype)
    if torch.device(device).type != "meta":
        module.to_empty(device=device)
        module.init_weights(generator or torch.Generator().manual_seed(0))
    return module


class QFormerEncoder(nn.Module):
    """[start] proj(qformer(queries, tower(pixels))) [end], as BLIP-2 reads a picture and Accessory frames it."""

    prompt_rows = 0
    unread = partial = frozenset[str]()

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.slots = config.queries + 2
        self.tower = build_tower(config)
        tokens, width = token_shape(self.tower, config.image_size)
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.hidden))
        self.qformer = QFormer(config, tokens, width)
        self.proj = projection(config.hidden, dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.end = nn.Parameter(torch.empty(dim))

    def tokens(self, pixels: Tensor) -> Tensor:
        return read_tokens(self.tower, pixels, size=self.config.image_size)

    def forward(self, pixels: Tensor, order: Tensor | None = None) -> Tensor:
        assert order is None, "rows of one tile each stand in the order of their pictures"
        tokens = self.tokens(pixels)
        count = tokens.shape[0]
        rows = self.proj(self.qformer(self.query_tokens.expand(count, -1, -1), tokens))
        start, end = (tag.to(rows.dtype).expand(count, 1, -1) for tag in (self.start, self.end))
        return torch.cat([start, rows, end], dim=1)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the first weights for training from scratch from a CPU generator."""
        side = patch_side(self.tower) if self.config.grid_queries else None
        init_tower(self.tower, self.config, generator)
        self.qformer.init_weights(generator, side=side)
        fill_layers(self.proj, generator)
        for parameter in (self.query_tokens, self.start, self.end):
            fill(parameter, generator)
        if side is not None:
            with torch.no_grad():
                self.query_tokens[0].copy_(grid_code(round(self.config.queries**0.5), self.config.hidden, side=side))


class ClipEncoder(nn.Module):
    """proj(tower_proj(tower(pixels))): every token of CLIP's last layer, class token first.

    Kind clip makes them `dim` wide and is done. Kind perceiver makes them `hidden` wide, and its queries read them:
    rows for an adapter's prefix, none for the sequence.
    """

    unread = partial = frozenset[str]()

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.tower = build_tower(config)
        tokens, width = token_shape(self.tower, config.image_size)
        self.tower_proj = nn.Linear(width, config.tower_proj, bias=False) if config.tower_proj else nn.Identity()
        perceives = config.kind == "perceiver"
        self.proj = projection(config.tower_proj or width, config.hidden if perceives else dim)
        self.perceiver = Perceiver(config, dim) if perceives else nn.Identity()
        self.slots, self.prompt_rows = (0, config.queries) if perceives else (tokens, 0)

    def tokens(self, pixels: Tensor) -> Tensor:
        return read_tokens(self.tower, pixels, size=self.config.image_size)

    def forward(self, pixels: Tensor, order: Tensor | None = None) -> Tensor:
        assert order is None, "rows of one tile each stand in the order of their pictures"
        return self.perceiver(self.proj(self.tower_proj(self.tokens(pixels))))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the first weights for training from scratch from a CPU generator."""
        init_tower(self.tower, self.config, generator)
        for part in (self.tower_proj, self.proj, self.perceiver):
            fill_layers(part, generator)
        if self.prompt_rows:
            fill(self.perceiver.query, generator)

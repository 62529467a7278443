"""From the width of vision to the width of the language model.

Must not know where features come from. timm is imported when the first perceiver is built.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from accessory.vision.config import MLP, VisionConfig
from accessory.vision.tower import choose_attention


def projection(width: int, dim: int) -> nn.Sequential:
    """Linear and LayerNorm (eps 1e-5): [.., width] -> [.., dim]."""
    return nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))


def stack(kind: str, width: int, dim: int, *, bias: bool = True) -> nn.Sequential:
    """LLaVA's projector, [.., width] -> [.., dim]: linear, mlpNx_gelu (N linears, exact GELU between them), identity.

    The linears are numbers 0, 2, 4, ... as at LLaVA. ValueError for an identity between widths that differ.
    """
    if kind == "identity":
        if width != dim:
            raise ValueError(
                f"vision projector: got identity from {width} to {dim}, expected equal widths; choose linear"
            )
        return nn.Sequential()
    depth = 1 if kind == "linear" else int(MLP.fullmatch(kind)[1])
    layers: list[nn.Module] = [nn.Linear(width, dim, bias=bias)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(dim, dim, bias=bias)]
    return nn.Sequential(*layers)


class Perceiver(nn.Module):
    """Learned queries travel with a picture's features through ViT blocks: [N, T, hidden] -> [N, queries, dim].

    LLaMA-Adapter V2's visual branch (arXiv 2304.15010).
    """

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        norm = partial(nn.LayerNorm, eps=1e-5)
        ratio = (config.intermediate + 0.5) / config.hidden  # timm rounds hidden * ratio down
        self.query = nn.Parameter(torch.empty(config.queries, config.hidden))
        self.blocks = nn.ModuleList(
            Block(config.hidden, config.heads, ratio, qkv_bias=True, norm_layer=norm) for _ in range(config.layers)
        )
        self.proj = projection(config.hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        choose_attention(self, fused=features.is_cuda)
        h = torch.cat([self.query.expand(features.shape[0], -1, -1), features], dim=1)
        for block in self.blocks:
            h = block(h)
        return self.proj(h[:, : self.query.shape[0]])

"""First values of weights that are trained from scratch.

Must not know what the weights are for. Draws are made on the CPU in fp32: a seed gives the same weights everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CODE_BASE = 100.0  # wavelengths 2 pi to 200 pi cells: grids here have 4 to 32 cells a side


def fill(parameter: Tensor, generator: torch.Generator, *, std: float = 0.02) -> None:
    """Fill with a normal of this deviation, cut at two of them."""
    with torch.no_grad():
        values = torch.empty(parameter.shape)
        parameter.copy_(nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator))


def fill_layers(module: nn.Module, generator: torch.Generator) -> None:
    """Fill the Linear weights inside, zero their biases, and make every LayerNorm the plain one."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            fill(layer.weight, generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def grid_code(cells: int, width: int, *, side: int) -> Tensor:
    """Return [cells * cells, width] fp32: the 2-D sin/cos code of the cells of a square picture, row by row.

    Places are measured in patches of a picture that is `side` patches wide, so that codes of a coarse and of a fine
    grid over one picture are alike where the cells lie upon each other. The four values of a frequency (sin and cos of
    x and y) stand next to each other: an attention head, which sees a slice of the width, knows both directions.
    """
    if width % 4:
        raise ValueError(f"grid positions: got width {width}, expected a multiple of 4")
    place = (torch.arange(cells, dtype=torch.float32) + 0.5) * side / cells - 0.5
    y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(place, place, indexing="ij"))
    frequency = CODE_BASE ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    waves = (torch.sin(x * frequency), torch.cos(x * frequency), torch.sin(y * frequency), torch.cos(y * frequency))
    return torch.stack(waves, dim=-1).reshape(cells * cells, width)

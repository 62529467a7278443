"""Vision towers: timm models as pictures in, tokens out, under timm's own names.

Must not know what reads the tokens. timm is imported when the first tower is built.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accessory.vision.config import VisionConfig
from accessory.vision.init import grid_code


def build_tower(config: VisionConfig) -> nn.Module:
    """Return the tower, without head and pooling, on the current default device (`with torch.device("meta")`).

    Raises ValueError when timm does not know the model or its arguments, or when the tower keeps values that a state
    dict does not hold (they would be lost on the way over the meta device).
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    args: dict[str, Any] = {**config.tower_args, "img_size": config.image_size, "num_classes": 0, "global_pool": ""}
    if config.tower_eps is not None:
        args["norm_layer"] = partial(nn.LayerNorm, eps=config.tower_eps)
    try:
        tower = VisionTransformer(**args) if config.tower == "vit" else timm.create_model(config.tower, **args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"vision tower {config.tower!r} with {config.tower_args}: timm refuses ({error})") from error
    hidden = {name for name, _ in tower.named_buffers()} - set(tower.state_dict())
    if hidden:
        raise ValueError(f"vision tower {config.tower!r}: {sorted(hidden)} are not in its state dict; choose another")
    return tower


def token_shape(tower: nn.Module, size: int) -> tuple[int, int]:
    """Return (tokens, width) of one picture from a tower that is on the meta device."""
    shape = tower.forward_features(torch.empty(1, 3, size, size, device="meta")).shape
    if len(shape) != 3:
        raise ValueError(f"vision tower: got features of shape {tuple(shape)}, expected 3 dimensions; choose a ViT")
    return shape[1], shape[2]


def read_tokens(tower: nn.Module, pixels: Tensor, *, size: int) -> Tensor:
    """Pixels [N, 3, size, size] of any float dtype -> the tower's last tokens [N, tokens, width] in its own dtype."""
    return tower.forward_features(_prepared(tower, pixels, size))


def read_layer(tower: nn.Module, pixels: Tensor, *, size: int, layer: int, prefix: bool) -> Tensor:
    """Pixels [N, 3, size, size] -> the tokens [N, tokens, width] that block `layer` (0 the first) gives, without norm.

    prefix: class token before those of the patches. Blocks behind it are not run.
    """
    found = tower.forward_intermediates(
        _prepared(tower, pixels, size),
        indices=[layer],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    patches, before = found if isinstance(found, tuple) else (found, None)
    return torch.cat([before, patches], dim=1) if prefix and before is not None else patches


def _prepared(tower: nn.Module, pixels: Tensor, size: int) -> Tensor:
    """Pixels in the tower's dtype, once their shape is right; the tower is told which attention pays."""
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected [N, 3, {size}, {size}]; transform first")
    choose_attention(tower, fused=pixels.is_cuda)
    return pixels.to(next(tower.parameters()).dtype)


def choose_attention(module: nn.Module, *, fused: bool) -> None:
    """Switch timm's attention layers between the fused kernel and the plain formula.

    On CPU the fused kernel in bf16 is several times slower than matmul, softmax, matmul.
    """
    for layer in module.modules():
        if getattr(layer, "fused_attn", fused) != fused:
            layer.fused_attn = fused


def init_tower(tower: nn.Module, config: VisionConfig, generator: torch.Generator) -> None:
    """Give the tower timm's own first values, and with grid_queries the sin/cos code for positions."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # timm draws from the global generator
        _copy(build_tower(config), tower)
    if config.grid_queries:
        side, width = patch_side(tower), tower.pos_embed.shape[-1]
        with torch.no_grad():
            tower.pos_embed[0, -side * side :].copy_(grid_code(side, width, side=side))


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy every tensor of a tower into one that may have more beside them (LoRA)."""
    values = target.state_dict()
    for name, tensor in source.state_dict().items():
        values[name].copy_(tensor)


def patch_side(tower: nn.Module) -> int:
    """Return how many patches lie along the side of the square picture."""
    if getattr(tower, "patch_embed", None) is None or getattr(tower, "pos_embed", None) is None:
        raise ValueError(f"grid_queries: got tower {type(tower).__name__}, expected learned positions; set it false")
    return tower.patch_embed.grid_size[0]

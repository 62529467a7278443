"""Small LLaVA encoders and models, transformers' counterparts with the same weights, pictures; helpers of the tests.

Must not hold tests. transformers is imported inside, since ranks import this module.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_toys import picture
from fixtures import toys
from meta import whole_weights
from torch import Tensor, nn

from accessory.assemble import build, geometry, read_spec
from accessory.checkpoint import write_folder
from accessory.data.tiles import Geometry
from accessory.data.tokenizer import open_tokenizer
from accessory.vision import VisionConfig, build_vision

PATCH, TILE, DIM = 14, 56, 40
SIDE = TILE // PATCH
GRIDS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
FULL = Geometry(
    576,
    size=336,
    transform="anyres",
    canvases=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    side=24,
    unpad=True,
)
"""LLaVA 1.6's own."""
TOWER = {
    "patch_size": PATCH,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 1.5,
    "pre_norm": True,
    "act_layer": "quick_gelu",
}
PLAIN = VisionConfig(kind="llava", tower_args=TOWER, tower_eps=1e-5, image_size=TILE)
"""LLaVA 1.5's form."""
NEXT = replace(PLAIN, aspect="anyres", grid_pinpoints=GRIDS, merge="spatial_unpad")
"""LLaVA 1.6's."""
SIZES: dict[str, Any] = {"dim": DIM, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96}
SHAPES = [(56, 56), (190, 107), (300, 50)]
"""1 x 2, 2 x 2 and 3 x 1 tiles behind the view."""


def look_of(vision: VisionConfig, **more: Any) -> Geometry:
    """The geometry of a configuration."""
    return geometry(vision, vision.side**2 + (vision.select_feature == "cls_patch"), **more)


def pictures() -> list[Any]:
    """Noise of SHAPES."""
    return [picture(number, size) for number, size in enumerate(SHAPES)]


def theirs(vision: VisionConfig, *, vocab_size: int = 200, image: int = 199) -> nn.Module:
    """transformers' model for this configuration with random weights. image: the id of a picture's token."""
    import transformers

    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": 8,
        "model_type": "clip_vision_model",
    }
    text = {
        "model_type": "llama",
        "hidden_size": DIM,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
    }
    name = "LlavaNext" if vision.merge == "spatial_unpad" else "Llava"
    grids = {"image_grid_pinpoints": [list(pair) for pair in vision.grid_pinpoints]} if name == "LlavaNext" else {}
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower,
        text_config=text,
        image_token_index=image,
        vision_feature_layer=vision.select_layer,
        vision_feature_select_strategy="default" if vision.select_feature == "patch" else "full",
        **grids,
    )
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def encoder_of(vision: VisionConfig, peer: nn.Module) -> nn.Module:
    """Our encoder with transformers' weights."""
    module = build_vision(vision, DIM, device="cpu")
    module.load_state_dict(encoder_weights(peer.model.state_dict()), strict=True)
    return module


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' vision tensors under the names of our encoder."""
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in state.items() if "vision_tower" in name}
    tower = {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
    found = {
        "tower.cls_token": tower["embeddings.class_embedding"][None, None],
        "tower.pos_embed": tower["embeddings.position_embedding.weight"][None],
        "tower.patch_embed.proj.weight": tower["embeddings.patch_embedding.weight"],
    }
    for leaf in ("weight", "bias"):
        found[f"tower.norm_pre.{leaf}"] = tower[f"pre_layrnorm.{leaf}"]
        found[f"tower.norm.{leaf}"] = tower[f"post_layernorm.{leaf}"]
        for number in (0, 2):
            found[f"proj.{number}.{leaf}"] = state[f"multi_modal_projector.linear_{1 + number // 2}.{leaf}"]
        for layer in range(3):
            old, new = f"encoder.layers.{layer}.", f"tower.blocks.{layer}."
            found[f"{new}attn.qkv.{leaf}"] = torch.cat([tower[f"{old}self_attn.{x}_proj.{leaf}"] for x in "qkv"])
            for one, other in (
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("self_attn.out_proj", "attn.proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                found[f"{new}{other}.{leaf}"] = tower[f"{old}{one}.{leaf}"]
    if "image_newline" in state:
        found["image_newline"] = state["image_newline"]
    return found


def write_model(folder: Path, vision: VisionConfig = NEXT, **config: Any) -> Path:
    """A folder of random weights in our own form."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    spm = folder.parent / "spm.model"
    spm.write_bytes(toys.sentencepiece_model())
    config = {**SIZES, "max_seq_len": 512, "vocab_size": open_tokenizer(spm).size, "vision": vision.to_dict(), **config}
    weights = whole_weights(build(read_spec(config, llama_type="llava")), std=0.15)
    for name, tensor in weights.items():
        if name.startswith("vision.proj.") and tensor.dim() > 1:
            tensor *= 4  # so that pictures make a difference
    write_folder(folder, weights, config=config, meta={"llama_type": "llava"}, tokenizer=spm)
    return folder

"""Small random models in folders, opened as a user's would be, for the tests of engine and demos.

Must not know what a test asks of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixtures import toys
from meta import whole_weights
from PIL import Image

from accessory.assemble import TYPES, Bundle, build, open_model, read_spec
from accessory.checkpoint import write_folder
from accessory.data.tokenizer import open_tokenizer
from accessory.dist import Ranks, Shard

ONE = Ranks(0, 1, 0, Shard(), 0, 1, torch.device("cpu"))
SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 256}
TOWER = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "qformer": {"queries": 4, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64},
    "llava": {"select_layer": -1},
    "clip": {"tower_proj": 24},
    "perceiver": {"tower_proj": 24, "queries": 3, "hidden": 24, "layers": 1, "heads": 2},
}


def write_model(
    folder: Path, kind: str = "llama_qformerv2", *, sees: bool = True, endless: bool = False, **config: Any
) -> Path:
    """A folder of random weights of this composition; `config` is added to its config.json.

    endless: the model never ends an answer by itself.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    spm = folder.parent / "spm.model"
    spm.write_bytes(toys.sentencepiece_model())
    config = {**SIZES, "vocab_size": open_tokenizer(spm).size, **config}
    vision = TYPES[kind][0]
    if kind == "llama_adapter":
        config |= {"prefix_layers": 1, "prefix_len": 3}
    if sees:
        config["vision"] = {"kind": vision, "image_size": 16, "tower_args": TOWER, **VISION[vision]}
    weights = whole_weights(build(read_spec(config, llama_type=kind)), std=0.1)
    for name, tensor in weights.items():
        if name.startswith(("vision.", "prefix")) and tensor.dim() > 1:
            tensor *= 4  # so that pictures make a difference
    if endless:
        weights["output.weight"][open_tokenizer(spm).eos_id] = 0.0
    write_folder(folder, weights, config=config, meta={"llama_type": kind}, tokenizer=spm)
    return folder


def opened(folder: Path, ranks: Ranks = ONE) -> Bundle:
    """The model of a folder in fp32."""
    return open_model([folder], ranks=ranks, dtype=torch.float32)


def picture(seed: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    """Noise in colour."""
    bits = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(bits.to(torch.uint8).numpy())

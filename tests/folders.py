"""Tiny folders of weights in other writers' forms, for the tests of checkpoint; made with torch and safetensors alone.

Must not use the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DIM, HIDDEN, HEADS, KV, LAYERS, VOCAB = 16, 24, 4, 2, 2, 33
CONFIG = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "vocab_size": VOCAB, "rope_scaling": None}
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "tok_embeddings": 1, "output": 0}


def state(seed: int = 0, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    """A LLaMA's tensors under Meta's names, random."""
    kv = DIM // HEADS * KV
    shapes = {"tok_embeddings.weight": (VOCAB, DIM)}
    for layer in range(LAYERS):
        block = {"wq": (DIM, DIM), "wk": (kv, DIM), "wv": (kv, DIM), "wo": (DIM, DIM)}
        shapes |= {f"layers.{layer}.attention.{name}.weight": shape for name, shape in block.items()}
        block = {"w1": (HIDDEN, DIM), "w2": (DIM, HIDDEN), "w3": (HIDDEN, DIM)}
        shapes |= {f"layers.{layer}.feed_forward.{name}.weight": shape for name, shape in block.items()}
        shapes |= {f"layers.{layer}.{name}.weight": (DIM,) for name in ("attention_norm", "ffn_norm")}
    shapes |= {"norm.weight": (DIM,), "output.weight": (VOCAB, DIM)}
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}


def pieces(tensors: dict[str, Tensor], shards: int, *, embedding: int = 1) -> list[dict[str, Tensor]]:
    """Each shard's part; uneven ones as torch.tensor_split makes them."""
    dims = {**CUT, "tok_embeddings": embedding}
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        dim = dims.get(name.split(".")[-2]) if "." in name else None
        dim = None if dim is not None and dim >= tensor.dim() else dim
        cut = [tensor] * shards if dim is None else tensor.tensor_split(shards, dim)
        for part, piece in zip(parts, cut, strict=True):
            part[name] = piece.clone()
    return parts


def meta(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, embedding: int = 1, **config: Any) -> Path:
    """A folder as Meta releases it, rope.freqs and all."""
    folder.mkdir(parents=True)
    for index, part in enumerate(pieces(tensors, shards, embedding=embedding)):
        torch.save({**part, "rope.freqs": torch.arange(2.0)}, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(json.dumps({**CONFIG, "vocab_size": -1, **config}))
    (folder / "tokenizer.model").write_bytes(b"not a real one")
    return folder


def accessory(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    ext: str = "pth",
    kind: str = "model",
    legacy: bool = False,
    llama_type: str = "llama",
) -> Path:
    """A folder as LLaMA2-Accessory saves it; legacy: without the small files."""
    folder.mkdir(parents=True)
    for index, part in enumerate(pieces(tensors, shards)):
        path = folder / f"consolidated.{index:02d}-of-{shards:02d}.{kind}.{ext}"
        part = {f"llma.{name}": tensor for name, tensor in part.items()}
        if ext == "pth":
            torch.save({"model": part}, path)
        else:
            save_file(part, path)
    if not legacy:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "meta.json").write_text(json.dumps({"llama_type": llama_type}))
        (folder / "tokenizer.model").write_bytes(b"not a real one")
    return folder

"""Random weights of any layout for tests: whole tensors by Meta's names, this rank's slices of them, and HF's names.

Must not know what a test does with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from accessory.dist import Cut, Shard
from accessory.model import Llama, LlamaConfig, cuts_of


def whole_weights(model: nn.Module, *, seed: int = 0, std: float = 0.1) -> dict[str, Tensor]:
    """Full fp32 tensors for every key of a (meta) model; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, cut in sorted(cuts_of(model).items()):
        weights[name] = torch.randn(cut.shape, generator=generator) * std
        if name.endswith("norm.weight"):
            weights[name] += 1
    return weights


def held(full: Tensor, cut: Cut) -> Tensor:
    """The slice of a full tensor that a rank holds, padded."""
    if cut.dim is None:
        return full.clone()
    part = full.narrow(cut.dim, cut.start, cut.stop - cut.start)
    if cut.pad:
        shape = list(part.shape)
        shape[cut.dim] = cut.pad
        part = torch.cat((part, part.new_zeros(shape)), dim=cut.dim)
    return part.clone()


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a meta-device model its slices, strictly."""
    cuts = cuts_of(model)
    model.load_state_dict({name: held(weights[name], cut) for name, cut in cuts.items()}, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def toy(config: LlamaConfig, *, shard: Shard | None = None, seed: int = 0) -> Llama:
    """A random fp32 model on the CPU; equal weights for equal seeds at any tp size."""
    return fill(Llama(config, shard), whole_weights(Llama(config), seed=seed))


def to_hf(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Meta's tensors under Hugging Face's names, q and k rows regrouped from pairs to halves."""
    names = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    names["output.weight"] = "lm_head.weight"
    parts = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out = {}
    for name, tensor in weights.items():
        if name in names:
            out[names[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        module, leaf = rest.rsplit(".", 1)
        if module in ("attention.wq", "attention.wk"):
            tensor = tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        out[f"model.layers.{layer}.{parts[module]}.{leaf}"] = tensor
    return out


def positions_of(ids: Tensor) -> Tensor:
    """0, 1, 2, ... for every row."""
    return torch.arange(ids.shape[1]).expand_as(ids)

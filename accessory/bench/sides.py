"""The sides of a comparison: our model and transformers' at one shape, with random weights, behind one small interface.

Must not time anything.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from accessory.engine.compiled import CompiledStep
from accessory.model import Llama, LlamaConfig
from accessory.quant import settle


class Side(Protocol):
    """A model under measurement: batch 1, one cache."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Start over with a prompt [1, T]; return the next id [1, 1], chosen greedily."""

    def decode(self, token: Tensor) -> Tensor:
        """One more token [1, 1] -> the next id [1, 1]."""


class Ours:
    """The decoder as the engine runs it: its weights in the form for answers, a static cache."""

    def __init__(self, config: LlamaConfig, *, window: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model = Llama(config, device=device, dtype=dtype).eval().requires_grad_(False)
        fill(self.model)
        settle(self.model, rows=1)
        self.cache = self.model.new_cache(rows=1, size=window)
        self.length = 0

    def prefill(self, ids: Tensor) -> Tensor:
        self.length = 0
        return self._step(ids)

    def decode(self, token: Tensor) -> Tensor:
        return self._step(token)

    def _step(self, ids: Tensor) -> Tensor:
        positions = torch.arange(self.length, self.length + ids.shape[1], device=ids.device).unsqueeze(0)
        self.length = self.cache.extent = self.length + ids.shape[1]
        hidden = self.model(ids, positions, cache=self.cache)
        return self.model.output(hidden[:, -1:]).argmax(-1)


class Compiled(Ours):
    """The same, with the step of answers compiled."""

    def __init__(self, config: LlamaConfig, *, window: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, window=window, device=device, dtype=dtype)
        self._compiled = CompiledStep(self.model, self.cache)
        self._compiled.warm()

    def decode(self, token: Tensor) -> Tensor:
        self.length += 1
        logits = self._compiled(token.cpu(), torch.tensor([[self.length - 1]]), self.length)
        return logits.argmax(-1, keepdim=True)


class Transformers:
    """transformers' LlamaForCausalLM with its own dynamic cache and its default attention."""

    def __init__(self, config: LlamaConfig, *, window: int, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(hf_config(config)).to(dtype)
        self.model = model.to_empty(device=device).eval().requires_grad_(False)
        fill(self.model)
        rotary = self.model.model.rotary_emb  # its buffers are computed at build, and were on meta
        self.model.model.rotary_emb = type(rotary)(hf_config(config)).to(device)
        self.past: object | None = None

    def prefill(self, ids: Tensor) -> Tensor:
        self.past = None
        return self._step(ids)

    def decode(self, token: Tensor) -> Tensor:
        return self._step(token)

    def _step(self, ids: Tensor) -> Tensor:
        out = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits.argmax(-1)


SIDES = {"ours": Ours, "ours compiled": Compiled, "transformers": Transformers}


def hf_config(config: LlamaConfig) -> object:
    """transformers' description of the same shape."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Random weights that keep activations in range; speed depends on shapes, not on values."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)

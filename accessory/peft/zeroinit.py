"""The zero-init adapter: prompts that the queries of the last layers attend to (arXiv 2303.16199).

Must not know text, pictures or training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accessory.dist import Cut
from accessory.model.attention import Step, attend
from accessory.model.cache import Cache
from accessory.model.llama import Llama
from accessory.model.parallel import cut_units, enter_region
from accessory.peft.config import PeftConfig


class ZeroInit:
    """The zero-init adapter's prompts: rows that q attends to beside the text, scaled by tanh(gate), no rotation.

    Parameters sit on the model under the reference's names: prefix (L, 1, P, dim), prefix_gate (L, heads), and
    prefix_new_gate (L) where asked for. A request's picture adds its `visual` rows to the prefix; its keys and values
    are computed once, by `store`, and kept with its cache row.
    """

    def __init__(self, model: Llama, config: PeftConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        layers, heads, dim = config.prefix_layers, model.config.n_heads, model.config.dim
        self.first = model.config.n_layers - layers
        cuts = {
            "prefix": Cut((layers, 1, config.prefix_len, dim)),
            "prefix_gate": cut_units((layers, heads), 1, model.shard, units=heads),
        }
        if config.use_prefix_new_gate:
            cuts["prefix_new_gate"] = Cut((layers,))
        for name, cut in cuts.items():
            model.register_parameter(name, nn.Parameter(torch.empty(cut.local_shape, device=device, dtype=dtype)))
        model.cuts.update(cuts)

    def begin(self, model: Llama, step: Step, visual: Tensor | None) -> Any:
        """The function of (layer, q) for one forward: stored prompts where the cache has them, else computed here."""
        stored = step.cache.prompts if step.cache is not None else {}

        def add(layer: int, q: Tensor) -> Tensor | None:
            if layer < self.first:
                return None
            if stored:
                rows = slice(0, q.shape[0]) if step.rows is None else step.rows
                keys, values = (tensor[rows] for tensor in stored[layer])
            else:
                keys, values = (tensor.expand(len(q), -1, -1, -1) for tensor in self._keys(model, layer, visual))
            seen = torch.ones(1, 1, q.shape[1], keys.shape[2], dtype=torch.bool, device=q.device)
            extra = attend(q, keys, values, mask=seen).unflatten(-1, (q.shape[2], -1))
            return (extra * self._gate(model, layer).to(extra.dtype)[:, None]).flatten(2)

        return add

    def store(self, model: Llama, cache: Cache, rows: Tensor, visual: Tensor | None = None) -> None:
        """Compute the prompts' keys and values of requests, once: rows [n], visual [n, P, dim] or None."""
        for layer in range(self.first, model.config.n_layers):
            keys, values = self._keys(model, layer, visual)
            if layer not in cache.prompts:
                shape = (cache.rows, *keys.shape[1:])
                cache.prompts[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
            for kept, new in zip(cache.prompts[layer], (keys, values), strict=True):
                kept[rows] = new.expand(len(rows), -1, -1, -1)

    def _keys(self, model: Llama, layer: int, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer's prompt: [1 or B, G, P, D] each."""
        attention = model.layers[layer].attention
        prompt = model.prefix[layer - self.first]  # (1, P, dim)
        if visual is not None:
            prompt = prompt + visual.to(prompt.dtype)
        prompt = prompt.to(model.norm.weight.dtype)
        keys, values = (
            linear(prompt).unflatten(-1, (-1, attention.head_dim)) for linear in (attention.wk, attention.wv)
        )
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _gate(self, model: Llama, layer: int) -> Tensor:
        """The scale of each local head."""
        gate = model.prefix_gate[layer - self.first].tanh()
        if "prefix_new_gate" in model.cuts:
            gate = gate * enter_region(model.prefix_new_gate, model.shard)[layer - self.first]
        return gate

"""Parameter-efficient finetuning, applied to a built Llama: norm-bias, LoRA, the zero-init adapter; who is trainable.

Must not know text, files or the training loop. Base keys never change name; each method only adds keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.dist import Cut
from accessory.model.attention import Step, attend
from accessory.model.cache import Cache
from accessory.model.llama import Llama
from accessory.model.parallel import Column, Linear, cut_units, enter_region, own

SEVEN = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class PeftConfig:
    """What is added to a model and trained; the reference's names and defaults where it has them."""

    lora_rank: int = -1
    """Rank of LoRA on the chosen linears; 0 or less: none."""
    lora_alpha: float | None = None
    """LoRA is scaled by alpha / rank; null: by 1, the reference's form."""
    lora_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    lora_dropout: float = 0.0
    """Dropout on LoRA's input while training."""
    lora_targets: tuple[str, ...] = SEVEN
    """Which linears get LoRA, by the last part of their name."""
    projector_lora_rank: int = -1
    """Rank of LoRA on the linears between the vision tower and the decoder; 0 or less: none."""
    vision_lora_rank: int = -1
    """Rank of LoRA on the linears of the vision tower; 0 or less: none."""
    bias_tuning: bool = False
    """Add a bias to every linear (the adapter: not to wk and wv) and train it."""
    norm_tuning: bool = False
    """Train every norm's weight."""
    prefix_layers: int = 0
    """Zero-init adapter (arXiv 2303.16199): the last so many layers attend to a learned prompt; 0: none."""
    prefix_len: int = 10
    """Rows of that prompt."""
    use_prefix_new_gate: bool = False
    """A further learned scale per layer on what the prompt adds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if unknown := set(self.lora_targets) - set(SEVEN):
            raise ValueError(f"lora_targets: got {', '.join(sorted(unknown))}, expected some of {', '.join(SEVEN)}")
        if self.prefix_layers < 0:
            raise ValueError(f"prefix_layers: got {self.prefix_layers}, expected 0 (no adapter) or more layers")
        if self.prefix_layers > 0 and self.prefix_len < 1:
            raise ValueError(f"prefix_len: got {self.prefix_len}, expected at least 1; prefix_layers 0 is no adapter")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected a number in [0, 1)")

    @property
    def lora_scale(self) -> float:
        """The factor on LoRA's product in the decoder."""
        return self.scale_of(self.lora_rank)

    def scale_of(self, rank: int) -> float:
        """The factor on the product of factors of this rank."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (math.sqrt(rank) if self.lora_rslora else rank)


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to: vision (the tower), projector (what follows it) or llm."""
    if name.startswith(("vision.tower.", "vision.tower_proj.")):
        return "vision"
    return "projector" if name.startswith("vision.") else "llm"


def apply_peft(
    model: Llama, config: PeftConfig, *, device: torch.device | str = "meta", dtype: torch.dtype | None = None
) -> None:
    """Add the parameters that `config` asks for, uninitialised, as this rank cuts them."""
    dtype = model.norm.weight.dtype if dtype is None else dtype
    if config.prefix_layers > model.config.n_layers:
        raise ValueError(f"prefix_layers: got {config.prefix_layers}, expected at most {model.config.n_layers} layers")
    adapter = config.prefix_layers > 0
    for name, linear in model.linears().items():
        last = name.rpartition(".")[2]
        if config.bias_tuning and linear.bias is None and not (adapter and last in ("wk", "wv")):
            linear.add_bias(device=device, dtype=dtype)
        if config.lora_rank > 0 and last in config.lora_targets:
            add_lora(linear, config, device=device, dtype=dtype)
    if adapter:
        model.prompt = ZeroInit(model, config, device=device, dtype=dtype)
    for part, rank in (("projector", config.projector_lora_rank), ("vision", config.vision_lora_rank)):
        if rank > 0:
            _add_outside(model, part, rank, config, device=device, dtype=dtype)


def trainable_names(model: nn.Module, config: PeftConfig) -> set[str]:
    """The parameters of the language model that this configuration trains, as in the reference's llama_peft."""
    patterns = []
    if config.lora_rank > 0:
        patterns.append(r"layers\..+\.lora_[ab]\.weight")
    if config.bias_tuning:
        patterns.append(r"layers\..+\.bias")
    if config.norm_tuning:
        patterns.append(r"(layers\..+_norm|norm)\.weight")
    if config.prefix_layers > 0:
        patterns.append(r"prefix(_gate|_new_gate)?")
    names = {name for name, _ in model.named_parameters() if any(re.fullmatch(p, name) for p in patterns)}
    if not names:
        raise ValueError(
            "peft: got a configuration that trains nothing, expected bias, norm, lora_rank or prefix_layers"
        )
    return names


class Factor(nn.Module):
    """One factor of a low-rank product; `cuts` as everywhere."""

    def __init__(self, cut: Cut, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.cuts = {"weight": cut}
        self.weight = nn.Parameter(torch.empty(cut.local_shape, device=device, dtype=dtype))


@dataclass(frozen=True)
class Lora:
    """scale * b(a(x)), added to a Linear's local product (arXiv 2106.09685).

    Column: `a` is replicated, `b` cut as the output. Row: `a` is cut as the input, `b` replicated. The replicated
    factor passes `enter_region`, without which each rank would see but a part of its gradient.
    """

    scale: float
    dropout: float

    def __call__(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        a, b, shard = linear.lora_a.weight, linear.lora_b.weight, linear.shard
        if isinstance(linear, Column):
            a, b = enter_region(a, shard), own(b, linear.lora_b.cuts["weight"], shard)
        else:
            b = enter_region(b, shard)
        return self.add(y, x, a, b, training=linear.training)

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, *, training: bool) -> Tensor:
        """y + scale * b(a(dropout(x)))."""
        x = F.dropout(x, self.dropout, training=training and self.dropout > 0)
        a, b = a.to(x.dtype), b.to(x.dtype)
        if torch.compiler.is_compiling():
            return y + F.linear(F.linear(x, a), b) * self.scale
        return _LowRank.apply(y.flatten(0, -2), x.flatten(0, -2), a, b, self.scale).view(y.shape)


class _LowRank(torch.autograd.Function):
    """y + scale x A' B' of rows. What has rank columns is held as rows, whose products are up to twice as fast."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low = a @ x.t()  # (rank, tokens)
        ctx.scale = scale
        ctx.save_for_backward(x, a, b, low)
        return torch.addmm(y, low.t(), b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        back = (b.t() @ dy.t()).mul_(ctx.scale)  # (rank, tokens)
        dx = back.t() @ a if ctx.needs_input_grad[1] else None
        da = back @ x if ctx.needs_input_grad[2] else None
        db = (low @ dy).mul_(ctx.scale).t() if ctx.needs_input_grad[3] else None
        return dy, dx, da, db, None


def add_lora(linear: Linear, config: PeftConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Hang uninitialised factors on one Linear: keys `lora_a.weight` [r, in], `lora_b.weight` [out, r]."""
    cut, rank = linear.cuts["weight"], config.lora_rank
    d_out, d_in = cut.shape
    if isinstance(linear, Column):
        a, b = Cut((rank, d_in)), replace(cut, shape=(d_out, rank))
    else:
        a, b = replace(cut, shape=(rank, d_in)), Cut((d_out, rank))
    linear.lora_a = Factor(a, device=device, dtype=dtype)
    linear.lora_b = Factor(b, device=device, dtype=dtype)
    linear.adapter = Lora(config.lora_scale, config.lora_dropout)


def _add_outside(
    model: Llama, part: str, rank: int, config: PeftConfig, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Hang factors, whole on every rank, on the plain linears of the projector or of the tower."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linears if part_of(f"{name}.") == part]
    if not names:
        raise ValueError(f"{part}_lora_rank: got {rank} for a model without linears there, expected -1; leave it out")
    for name in names:
        linear = model.get_submodule(name)
        shape_a, shape_b = (rank, linear.in_features), (linear.out_features, rank)
        linear.lora_a = Factor(Cut(shape_a), device=device, dtype=dtype)
        linear.lora_b = Factor(Cut(shape_b), device=device, dtype=dtype)
        linear.adapter = Lora(config.scale_of(rank), config.lora_dropout)  # where others look for its dropout
        linear.register_forward_hook(Beside(linear.adapter))


@dataclass(frozen=True)
class Beside:
    """A forward hook that adds LoRA to what a plain linear gave."""

    lora: Lora

    def __call__(self, linear: nn.Linear, given: tuple[Tensor], y: Tensor) -> Tensor:
        return self.lora.add(y, given[0], linear.lora_a.weight, linear.lora_b.weight, training=linear.training)


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


@torch.no_grad()
def init_peft(model: Llama, *, seed: int = 0, names: Collection[str] | None = None) -> None:
    """First values of what PEFT added (or of `names`): the model computes what it did before.

    LoRA a: truncated normal, std 0.02; b, biases and gates 0; new gates 1; the prefix N(0, 1). Equal at any tp size.
    """
    from accessory.model.llama import draw_whole

    added = re.compile(r".+\.lora_[ab]\.weight|layers\..+\.bias|prefix|prefix_gate|prefix_new_gate")
    own_bias = re.compile(r".+\.attention\.w[qkv]\.bias" if model.config.qkv_bias else r"(?!)")  # the base's
    for name, parameter in model.named_parameters():
        chosen = not own_bias.fullmatch(name) if names is None else name in names
        if not (chosen and added.fullmatch(name)):
            continue
        if name == "prefix_new_gate":
            parameter.fill_(1.0)
        elif name == "prefix":
            draw_whole(model, name, lambda full, generator: full.normal_(0.0, 1.0, generator=generator), seed=seed)
        elif name.endswith("lora_a.weight"):
            draw_whole(model, name, _truncated, seed=seed)
        else:
            parameter.zero_()


def _truncated(full: Tensor, generator: torch.Generator) -> None:
    """Normal of std 0.02, cut at 2 on each side, in place."""
    nn.init.trunc_normal_(full, std=0.02, generator=generator)

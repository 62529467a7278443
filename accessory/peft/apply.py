"""Adds what a PeftConfig asks for to a built Llama, gives it first values, and says what of it is trainable.

Must not know text, files or the training loop.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from accessory.model.llama import Llama
from accessory.peft.config import PeftConfig, part_of
from accessory.peft.lora import Lora, add_lora
from accessory.peft.targets import reached
from accessory.peft.zeroinit import ZeroInit


def apply_peft(
    model: Llama, config: PeftConfig, *, device: torch.device | str = "meta", dtype: torch.dtype | None = None
) -> None:
    """Add the parameters that `config` asks for, uninitialised, as this rank cuts them."""
    dtype = model.norm.weight.dtype if dtype is None else dtype
    if config.prefix_layers > model.config.n_layers:
        raise ValueError(f"prefix_layers: got {config.prefix_layers}, expected at most {model.config.n_layers} layers")
    plan = lora_plan(model, config)
    adapter = config.prefix_layers > 0
    if config.bias_tuning:
        for name, linear in model.linears().items():
            if linear.bias is None and not (adapter and name.endswith((".wk", ".wv"))):
                linear.add_bias(device=device, dtype=dtype)
    for name, (rank, scale) in plan.items():
        add_lora(model.get_submodule(name), rank, Lora(scale, config.lora_dropout), device=device, dtype=dtype)
    if adapter:
        model.prompt = ZeroInit(model, config, device=device, dtype=dtype)


def lora_plan(model: Llama, config: PeftConfig) -> dict[str, tuple[int, float]]:
    """Which linears get LoRA: name -> (rank, factor on the product). `lora_modules` overrides the rest.

    Raises ValueError for a target that reaches nothing, and for a linear of `lora_modules` that the model lacks.
    """
    linears, unread = linears_of(model), _unread(model)
    plan: dict[str, tuple[int, float]] = {}
    for part, (rank, targets) in config.ranks().items():
        prefix = "" if part == "llm" else f"{part}_"
        if not linears[part]:
            raise ValueError(
                f"{prefix}lora_rank: got {rank} for a model without linears there, expected -1; leave it out"
            )
        found = reached(targets, linears[part], scope=part)
        if lost := [target for target, names in found.items() if not names]:
            leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears[part]))
            raise ValueError(
                f"{prefix}lora_targets: got {', '.join(lost)}, which no linear of the {part} part is, expected some of"
                f" {leaves}, or all"
            )
        chosen = {name for names in found.values() for name in names if f"{name}.weight" not in unread}
        plan |= {name: (rank, config.scale_of(rank)) for name in linears[part] if name in chosen}
    everywhere = {name for names in linears.values() for name in names}
    if lost := [name for name in config.lora_modules if name not in everywhere]:
        raise ValueError(
            f"lora_modules: got {lost[0]} ({len(lost)} in all), which this model does not have, expected linears of its"
            " own; give the base that the adapter was trained on"
        )
    return plan | {name: (int(rank), float(scale)) for name, (rank, scale) in config.lora_modules.items()}


def linears_of(model: Llama) -> dict[str, list[str]]:
    """The linears that LoRA may hang on, by part of the model; the head and the embedding are not among them."""
    found: dict[str, list[str]] = {"llm": list(model.linears()), "projector": [], "vision": []}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (part := part_of(f"{name}.")) != "llm":
            found[part].append(name)
    return found


def _unread(model: Llama) -> set[str]:
    """Weights of the tower behind the layer that is read: LoRA there would learn nothing."""
    vision = getattr(model, "vision", None)
    return {f"vision.{name}" for name in getattr(vision, "unread", ())}


def trainable_names(model: nn.Module, config: PeftConfig) -> set[str]:
    """The parameters of the language model that this configuration trains, as in the reference's llama_peft."""
    patterns = []
    if config.lora_rank > 0 or config.lora_modules:
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

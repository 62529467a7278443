"""What is trained: the language model, the projector and the vision tower, each frozen, with LoRA, or whole.

Must not know optimisers or ranks; it reads names of parameters and sets `requires_grad`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from accessory.model import Llama, cuts_of
from accessory.peft import PeftConfig, part_of, split_scopes, trainable_names
from accessory.train.settings import Settings

LORA = re.compile(r".+\.lora_[ab]\.weight")
# (bias, norm, LoRA, prompts) that a finetuning_type trains; the adapter trains what llama_adapter does
TUNES: dict[str, tuple[bool, bool, bool, bool]] = {
    "lora": (False, False, True, False),
    "norm_bias": (True, True, False, False),
    "norm_bias_lora": (True, True, True, False),
    "bias": (True, False, False, False),
    "adapter": (True, True, True, True),
}


@dataclass(frozen=True)
class Part:
    """One part of the model and what of it is trained."""

    name: str
    mode: str
    """frozen, lora, full, or a finetuning_type of the language model."""
    lr: float
    """Peak learning rate."""
    names: tuple[str, ...]
    """Trained parameters, in the model's order."""
    trained: int
    """Their elements over all tensor-parallel ranks."""
    total: int
    """Elements of the whole part."""


@dataclass(frozen=True)
class Parts:
    """All of them."""

    llm: Part
    projector: Part
    vision: Part
    names: frozenset[str]
    """Every trained parameter."""

    def __iter__(self) -> Iterator[Part]:
        return iter((self.llm, self.projector, self.vision))

    @property
    def trained(self) -> int:
        """Trained elements."""
        return sum(part.trained for part in self)


def lora_targets(settings: Settings, *, sees: bool = True) -> dict[str, tuple[str, ...]]:
    """The linears that LoRA is asked for, by part of the model: empty where a part gets none.

    A word without a scope never leaves the language model. sees: where there is nothing to see with, `projector:all`
    and `vision:all` ask for nothing; other words of theirs are refused when the model is built.
    Raises ValueError where a scope contradicts train_projector, train_vision or finetuning_type.
    """
    scopes = split_scopes(settings.lora_target)
    lora = settings.finetuning_type in ("lora", "norm_bias_lora")
    found = {"llm": scopes["llm"] if lora else ()}
    if lora and not found["llm"]:
        raise ValueError(
            f"lora_target: got {', '.join(settings.lora_target)} with finetuning_type {settings.finetuning_type},"
            " expected linears of the language model too; add some, or set finetuning_type frozen"
        )
    for part, mode in (("projector", settings.train_projector), ("vision", settings.train_vision)):
        words = scopes[part]
        if words and mode not in (None, "frozen", "lora"):
            raise ValueError(
                f"train_{part}: got {mode} with {part}:{words[0]} in lora_target, expected lora; drop one of them"
            )
        if words == ("all",) and not sees:
            words = ()
        found[part] = words or (("all",) if mode == "lora" else ())
    return found


def peft_config(settings: Settings, *, stored: PeftConfig | None = None, sees: bool = True) -> dict[str, Any]:
    """The fields of PeftConfig that the settings ask for, to be laid over a model's config.

    stored: what the model already has and must keep, trained or not. sees: whether it has a vision part.
    """
    fields: dict[str, Any] = {}
    targets = lora_targets(settings, sees=sees)
    lora = {
        "lora_alpha": settings.lora_alpha,
        "lora_rslora": settings.use_rslora,
        "lora_dropout": settings.lora_dropout,
    }
    kind = settings.finetuning_type
    if targets["llm"]:
        fields |= {"lora_rank": settings.lora_rank, "lora_targets": targets["llm"], **lora}
    if kind in TUNES and kind != "adapter":
        bias, norm, _, _ = TUNES[kind]
        had = stored or PeftConfig()
        fields |= {"bias_tuning": bias or had.bias_tuning, "norm_tuning": norm or had.norm_tuning}
    if kind == "adapter":
        fields |= {"prefix_len": settings.prefix_len, "use_prefix_new_gate": settings.use_prefix_new_gate}
        fields |= {} if settings.prefix_layers is None else {"prefix_layers": settings.prefix_layers}
    for part in ("projector", "vision"):
        if targets[part]:
            fields |= {f"{part}_lora_rank": settings.lora_rank, f"{part}_lora_targets": targets[part], **lora}
    return fields


def choose_parts(model: Llama, settings: Settings, *, pictures: bool) -> Parts:
    """Set `requires_grad` on a built model (on any device, meta too) as the settings say. pictures: in the data.

    Raises ValueError for a part that is asked to train and would train nothing, and where nothing trains at all.
    """
    sees = getattr(model, "vision", None) is not None
    asked = lora_targets(settings, sees=sees)
    projector = "lora" if asked["projector"] else settings.train_projector
    vision = "lora" if asked["vision"] else settings.train_vision
    if projector is None:
        tunes = TUNES.get(settings.finetuning_type, (False,))[0] and settings.finetuning_type != "adapter"
        projector = ("norm_bias" if tunes else "full") if sees and pictures else "frozen"
    chosen = {
        "llm": (settings.finetuning_type, _llm_names(model, settings)),
        "projector": (projector, _outside_names(model, "projector", projector, settings)),
        "vision": (vision, _outside_names(model, "vision", vision, settings)),
    }
    rates = {"projector": settings.projector_lr, "vision": settings.vision_lr}
    sizes = {name: prod(cut.shape) for name, cut in cuts_of(model).items()}
    parts = {}
    for part, (mode, names) in chosen.items():
        if mode != "frozen" and (not names or (part != "llm" and not pictures)):
            raise ValueError(_nothing(part, mode, sees=sees, found=bool(names)))
        lr = rates.get(part)
        parts[part] = Part(
            name=part,
            mode=mode,
            lr=settings.learning_rate if lr is None else lr,
            names=tuple(name for name in sizes if name in names),
            trained=sum(sizes[name] for name in names),
            total=sum(size for name, size in sizes.items() if part_of(name) == part),
        )
    trained = frozenset().union(*(part.names for part in parts.values()))
    if not trained:
        raise ValueError(
            "finetuning_type: got frozen, with projector and vision frozen too, expected a part to train; choose one"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return Parts(**parts, names=trained)


def table(parts: Parts) -> list[str]:
    """Lines that say what is trained of what, part by part."""
    lines = [f"{'part':<10} {'mode':<15} {'trained':>15} {'of':>16}   learning rate"]
    for part in parts:
        rate = f"{part.lr:g}" if part.names else "-"
        lines.append(f"{part.name:<10} {part.mode:<15} {part.trained:>15,} {part.total:>16,}   {rate}")
    total = sum(part.total for part in parts)
    share = 100 * parts.trained / max(1, total)
    lines.append(f"{'all':<10} {'':<15} {parts.trained:>15,} {total:>16,}   {share:.3g} % trained")
    return lines


def _llm_names(model: Llama, settings: Settings) -> set[str]:
    """Trained parameters of the decoder, PEFT's included."""
    kind = settings.finetuning_type
    names = {name for name, _ in model.named_parameters() if part_of(name) == "llm"}
    if kind == "full":
        return names
    if kind == "frozen":
        return set()
    if kind == "freeze":
        layers, count = model.config.n_layers, settings.freeze_trainable_layers
        if not 0 < abs(count) <= layers:
            raise ValueError(
                f"freeze_trainable_layers: got {count}, expected 1 to {layers} layers from the end, or -1 to -{layers}"
                " from the start"
            )
        chosen = range(layers - count, layers) if count > 0 else range(-count)
        starts = tuple(f"layers.{layer}." for layer in chosen)
        return {name for name in names if name.startswith(starts)}
    bias, norm, lora, prompts = TUNES[kind]
    config = PeftConfig(
        lora_rank=1 if lora else -1, bias_tuning=bias, norm_tuning=norm, prefix_layers=1 if prompts else 0
    )
    found = trainable_names(model, config)
    needed = {"prefix": prompts, ".lora_": lora and not prompts, ".bias": bias and not prompts}
    for mark, wanted in needed.items():
        if wanted and not any(mark in name for name in found):
            raise ValueError(
                f"finetuning_type: got {kind} for a model that was built without {mark.strip('._')}, expected one with"
                " these parameters; give a llama_type that ends in _peft or _adapter"
            )
    return found


def _outside_names(model: Llama, part: str, mode: str, settings: Settings) -> set[str]:
    """Trained parameters of the projector or of the tower."""
    names = {name for name, _ in model.named_parameters() if part_of(name) == part}
    names -= {f"vision.{name}" for name in model.vision.unread} if names else set()
    if mode == "lora":
        return {name for name in names if LORA.fullmatch(name)}
    if mode == "norm_bias":  # llama_peft's filter is by name: CLIP's projection has a norm by name, the Q-Former's not
        pattern = r"vision\.proj\.\d+\.bias"
        if TUNES[settings.finetuning_type][1] and model.vision.config.kind == "clip":
            pattern += r"|vision\.proj\.1\.weight"
        return {name for name in names if re.fullmatch(pattern, name)}
    if mode == "projection":
        own = ("vision.proj.", "vision.start", "vision.end", "vision.image_newline")
        return {name for name in names if name.startswith(own)}
    return names if mode == "full" else set()


def _nothing(part: str, mode: str, *, sees: bool, found: bool) -> str:
    """Why a part that should train would not. found: its parameters, which only pictures could teach."""
    if part == "llm":
        return f"finetuning_type: got {mode}, which trains nothing in this model; choose another"
    why = "no linears with LoRA in that part" if sees else "no vision part in this model"
    why = "no picture in the data" if found else why
    return f"train_{part}: got {mode}, but there is {why}, so that nothing would train; set it frozen" + (
        f", without {part}: in lora_target" if mode == "lora" else ""
    )

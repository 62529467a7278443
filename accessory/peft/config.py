"""What PEFT adds to a model, as plain values that a config.json can hold; which part of a model a name belongs to.

Must not know torch, a module or a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from accessory.peft.targets import SEVEN, normal


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
    """Which linears of the decoder get LoRA: by the last part of their name, ours or Hugging Face's, or by regular
    expressions over the whole name; all: the seven of each layer."""
    projector_lora_rank: int = -1
    """Rank of LoRA on the linears between the vision tower and the decoder; 0 or less: none."""
    projector_lora_targets: tuple[str, ...] = ("all",)
    """Which of those."""
    vision_lora_rank: int = -1
    """Rank of LoRA on the linears of the vision tower; 0 or less: none."""
    vision_lora_targets: tuple[str, ...] = ("all",)
    """Which of those."""
    lora_modules: dict[str, Any] = field(default_factory=dict)
    """LoRA that differs between linears, as adapters bring it: name of the linear -> [rank, factor on the product]."""
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
        for name, scope in (("", "llm"), ("projector_", "projector"), ("vision_", "vision")):
            name = f"{name}lora_targets"
            object.__setattr__(self, name, normal(getattr(self, name), scope=scope, what=name))
        for name, entry in self.lora_modules.items():
            sane = isinstance(entry, list | tuple) and len(entry) == 2 and type(entry[0]) is int and entry[0] > 0
            if not sane or not isinstance(entry[1], int | float) or not math.isfinite(entry[1]):
                raise ValueError(f"lora_modules: got {entry!r} for {name}, expected [rank, factor]; write it so")
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

    def ranks(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Rank and targets of each part of the model that gets LoRA of one rank."""
        given = {
            "llm": (self.lora_rank, self.lora_targets),
            "projector": (self.projector_lora_rank, self.projector_lora_targets),
            "vision": (self.vision_lora_rank, self.vision_lora_targets),
        }
        return {part: (rank, targets) for part, (rank, targets) in given.items() if rank > 0}


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to: vision (the tower), projector (what follows it) or llm."""
    if name.startswith(("vision.tower.", "vision.tower_proj.")):
        return "vision"
    return "projector" if name.startswith("vision.") else "llm"

"""Parameter-efficient finetuning, applied to a built Llama: norm-bias, LoRA, the zero-init adapter; who is trainable.

Must not know text, files or the training loop. Base keys never change name; each method only adds keys.
"""

from accessory.peft.apply import apply_peft, init_peft, lora_plan, trainable_names
from accessory.peft.config import SEVEN, PeftConfig, part_of
from accessory.peft.targets import split_scopes

__all__ = [
    "SEVEN",
    "PeftConfig",
    "apply_peft",
    "init_peft",
    "lora_plan",
    "part_of",
    "split_scopes",
    "trainable_names",
]

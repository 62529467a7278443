"""Random adapters written by the peft library, and its logits; helpers of the adapter and export tests.

peft and transformers are imported inside: the ranks of a test must not wait for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf
import torch
from torch import Tensor

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def attach(model: torch.nn.Module, folder: Path, *, seed: int = 7, **config: Any) -> torch.nn.Module:
    """Put a random adapter of peft on a model of transformers, write it to `folder`, and return the two together."""
    import peft

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    both = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if ".lora_" in name else 0.05
                parameter.copy_(torch.randn(parameter.shape) * scale + (0 if ".lora_" in name else parameter))
    both.save_pretrained(folder)
    return both


def reopened(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A model of transformers with the adapter of a folder, which must fit without a warning."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|nexpected).*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def features(both: torch.nn.Module) -> Tensor:
    """Feature rows of two pictures, by transformers."""
    inner = both.get_base_model() if hasattr(both, "get_base_model") else both
    with torch.no_grad():
        found = inner.get_image_features(pixel_values=PIXELS)
    found = getattr(found, "pooler_output", found)
    return torch.cat([*found]).reshape(-1, hf.TEXT["hidden_size"])

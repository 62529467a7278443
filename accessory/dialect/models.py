"""Model types by name: where the weights are, which family they are of, and how conversations with them are written.

Must not open anything: hub ids and templates are names.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelType:
    """One row of the table."""

    hub: str
    """Id on the Hugging Face hub."""
    family: str
    """llava (1.5) or llava_next (1.6)."""
    template: str
    """With its dialect."""


def _row(hub: str, template: str, family: str = "llava_next") -> ModelType:
    return ModelType(hub, family, f"swift/{template}")


MODELS: dict[str, ModelType] = {
    "llava1d6-mistral-7b-instruct": _row("liuhaotian/llava-v1.6-mistral-7b", "llava-mistral-instruct"),
    "llava1d6-yi-34b-instruct": _row("liuhaotian/llava-v1.6-34b", "llava-yi-instruct"),
    "llama3-llava-next-8b": _row("lmms-lab/llama3-llava-next-8b", "llama-llava-next"),
    "llava-next-72b": _row("lmms-lab/llava-next-72b", "llava-qwen-instruct"),
    "llava-next-110b": _row("lmms-lab/llava-next-110b", "llava-qwen-instruct"),
    "llava1_5-7b-instruct": _row("llava-hf/llava-1.5-7b-hf", "llava1_5", "llava"),
    "llava1_5-13b-instruct": _row("llava-hf/llava-1.5-13b-hf", "llava1_5", "llava"),
    "llava1_6-mistral-7b-instruct": _row("llava-hf/llava-v1.6-mistral-7b-hf", "llava-mistral-instruct"),
    "llava1_6-vicuna-7b-instruct": _row("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-vicuna"),
    "llava1_6-vicuna-13b-instruct": _row("llava-hf/llava-v1.6-vicuna-13b-hf", "llava-vicuna"),
    "llava1_6-yi-34b-instruct": _row("llava-hf/llava-v1.6-34b-hf", "llava-yi-instruct"),
    "llama3-llava-next-8b-hf": _row("llava-hf/llama3-llava-next-8b-hf", "llama-llava-next"),
    "llava-next-72b-hf": _row("llava-hf/llava-next-72b-hf", "llava-qwen-instruct"),
    "llava-next-110b-hf": _row("llava-hf/llava-next-110b-hf", "llava-qwen-instruct"),
    "llava-llama-3-8b-v1_1": _row("xtuner/llava-llama-3-8b-v1_1-transformers", "llava-llama-instruct", "llava"),
}
# ways in which the same types have been written
ALIASES = {
    "llava1d6-vicuna-7b-instruct": "llava1_6-vicuna-7b-instruct",
    "llava1d6-vicuna-13b-instruct": "llava1_6-vicuna-13b-instruct",
    "llava1d5-7b-instruct": "llava1_5-7b-instruct",
    "llava1d5-13b-instruct": "llava1_5-13b-instruct",
    "llava-1.5-7b-instruct": "llava1_5-7b-instruct",
    "llava-1.5-13b-instruct": "llava1_5-13b-instruct",
    "llama3-llava-next-8b-instruct": "llama3-llava-next-8b",
}


def find_model(name: str) -> ModelType:
    """The row of a model type or of another way to write it; ValueError names the nearest."""
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in MODELS:
        return MODELS[key]
    near = difflib.get_close_matches(key, [*MODELS, *ALIASES], n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(MODELS)}"
    raise ValueError(f"model_type: got {name!r}; {guess}, or give model_name_or_path instead")

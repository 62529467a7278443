"""Small random Hugging Face folders written by transformers, and ours opened from them; helpers of the tests.

Must not be imported by what runs on several ranks before transformers is needed: transformers is imported inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixtures import toys
from meta import positions_of
from torch import Tensor

from accessory.assemble import open_model
from accessory.dist import Ranks

VOCAB = 420
IDS = torch.randint(5, 390, (2, 40), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 8,
    "initializer_range": 0.2,
}


def model_of(kind: str, **sizes: Any) -> torch.nn.Module:
    """A random model of transformers: llama, mistral, qwen2, llava or llava_next (`sizes` are the language model's)."""
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    torch.manual_seed(3)
    if kind in names:
        config = getattr(transformers, f"{names[kind]}Config")(**{**TEXT, **sizes})
        model = getattr(transformers, f"{names[kind]}ForCausalLM")(config)
    else:
        name = {"llava": "Llava", "llava_next": "LlavaNext"}[kind]
        text = {"model_type": "llama", **{key: TEXT[key] for key in TEXT if key != "attn_implementation"}, **sizes}
        more = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if kind == "llava_next" else {}
        config = getattr(transformers, f"{name}Config")(
            vision_config=CLIP, text_config=text, image_token_index=VOCAB - 1, attn_implementation="eager", **more
        )
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms, biases and what transformers starts at zero
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.float().eval()


def write(folder: Path, model: torch.nn.Module, **options: Any) -> Path:
    """The folder that transformers writes, with a tokenizer."""
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.model").write_bytes(toys.sentencepiece_model())
    return folder


def theirs(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    """transformers' logits."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def ours(ranks: Ranks, paths: list[Path] | Path, ids: Tensor = IDS, **options: Any) -> Tensor:
    """The logits of the folder as we open it."""
    paths = paths if isinstance(paths, list) else [paths]
    bundle = open_model(paths, ranks=ranks, dtype=torch.float32, **options)
    with torch.no_grad():
        return bundle.model.output(bundle.model(ids, positions_of(ids)))


def close(one: Tensor, other: Tensor) -> None:
    """Assert that logits are equal within 1e-4, and tell something."""
    assert one.std() > 0.1, "logits that hardly differ would prove nothing"
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)

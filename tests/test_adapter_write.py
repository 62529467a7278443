"""Adapters that we write open in the peft library with the logits that we compute, and here again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import hf
import pytest
import torch
from engine_toys import ONE

from accessory.assemble import build, open_model, read_spec
from accessory.checkpoint import open_folders
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.huggingface.adapter_writer import AdapterForm, AdapterWriter
from accessory.checkpoint.merge import sample
from accessory.peft import lora_plan

CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "all linears": ("llama", {"lora_rank": 4, "lora_alpha": 8.0}, ()),
    "some linears, rank-stabilised": (
        "mistral",
        {"lora_rank": 4, "lora_alpha": 6.0, "lora_rslora": True, "lora_targets": ["q_proj", "wk"]},
        (),
    ),
    "one layer": ("llama", {"lora_rank": 2, "lora_targets": [r"layers\.1\.attention\.w[qv]"]}, ()),
    "norms and head": ("llama", {"lora_rank": 2, "lora_alpha": 4.0}, ("_norm.weight", "norm.weight", "output.weight")),
    "ranks of their own": (
        "qwen2",
        {"lora_modules": {"layers.0.attention.wq": [3, 0.7], "layers.1.feed_forward.w2": [2, 1.5]}},
        (),
    ),
    "all parts of llava": (
        "llava",
        {"lora_rank": 2, "lora_alpha": 4.0, "projector_lora_rank": 3, "vision_lora_rank": 2},
        (),
    ),
    "llava's decoder and whole projector": ("llava", {"lora_rank": 2, "lora_targets": ["v_proj"]}, ("vision.proj.",)),
}


def train(base: Path, folder: Path, config: dict[str, Any], whole: tuple[str, ...]) -> None:
    """Write a random adapter for a base: LoRA as a config says, and tensors that are stored whole."""
    checkpoint = open_folders(base)
    kind = {"llama": "llama_peft", "llava": "llava_peft"}[checkpoint.meta["llama_type"]]
    added = {**config, "bias_tuning": False, "norm_tuning": False}
    spec = read_spec({**checkpoint.config, **added}, llama_type=kind)
    model = build(spec)
    every = [name for name, _ in model.named_parameters()]
    names = [name for name in every if ".lora_" in name or (whole and (name.endswith(whole) or name.startswith(whole)))]
    torch.manual_seed(11)
    shapes = {name: model.get_parameter(name).shape for name in names}
    values = {n: torch.randn(shape) * 0.2 + (".lora_" not in n and len(shape) == 1) for n, shape in shapes.items()}
    form = AdapterForm(
        layout="llava" if kind == "llava_peft" else "plain",
        head_dim=spec.llama.head_dim,
        modules=lora_plan(model, spec.peft),
        keys=checkpoint.specs(),
        base=str(base),
        sample=sample(checkpoint),
        rslora=spec.peft.lora_rslora,
    )
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in values.items()}
    with AdapterWriter(folder, specs, form=form) as writer:
        for name, value in values.items():
            writer.put(name, value)
        writer.finish()


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_ours_opens_in_peft_with_our_logits(name: str, tmp_path: Path) -> None:
    kind, config, whole = CASES[name]
    model = hf.model_of(kind)
    base = hf.write(tmp_path / "base", model)
    train(base, tmp_path / "adapter", config, whole)
    mine = hf.ours(ONE, [base, tmp_path / "adapter"])
    assert (mine - hf.theirs(model)).abs().max() > 1e-2, "the adapter must matter"
    both = adapters.reopened(model, tmp_path / "adapter")
    hf.close(mine, hf.theirs(both))
    if kind == "llava":
        seen = open_model([base, tmp_path / "adapter"], ranks=ONE, dtype=torch.float32).model.vision
        with torch.no_grad():
            hf.close(seen(adapters.PIXELS), adapters.features(both))

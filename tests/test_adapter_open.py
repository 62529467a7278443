"""Adapters that the peft library wrote open here, on any form of base and any number of ranks, with its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import hf
import pytest
import torch
from engine_toys import ONE

from accessory.checkpoint import open_folders, write_folder
from accessory.dist import Ranks
from spawn import run_ranks

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("llama", {}),
    "rank-stabilised on an expression": (
        "llama",
        {"target_modules": r".*layers\.[01]\.(self_attn\.[qk]_proj|mlp\.\w+_proj)", "use_rslora": True},
    ),
    "all linears with patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "one layer": ("llama", {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]}),
    "norms and head whole": ("llama", {"modules_to_save": ["input_layernorm", "model.norm", "lm_head"]}),
    "head and embedding": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "biases of qwen2": ("qwen2", {"target_modules": ["q_proj", "k_proj", "down_proj"], "bias": "all"}),
    "heads of another width": ("llama", {"target_modules": "all-linear", "bias": "none"}),
}
SIZES = {"heads of another width": {"head_dim": 24}}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Path], torch.Tensor]]:
    """Every case's folders and peft's logits."""
    work, found = tmp_path_factory.mktemp("adapters"), {}
    for number, (name, (kind, config)) in enumerate(CASES.items()):
        model = hf.model_of(kind, **SIZES.get(name, {}))
        base = hf.write(work / f"base{number}", model)
        both = adapters.attach(model, work / f"adapter{number}", **config)
        found[name] = ([base, work / f"adapter{number}"], hf.theirs(both))
    return found


def all_logits(ranks: Ranks, folders: list[list[Path]]) -> list[torch.Tensor]:
    """Our logits of several models."""
    return [hf.ours(ranks, paths) for paths in folders]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_peft(name: str, written: dict[str, tuple[list[Path], torch.Tensor]]) -> None:
    paths, expected = written[name]
    hf.close(hf.ours(ONE, paths), expected)
    assert (hf.ours(ONE, paths[:1]) - expected).abs().max() > 1e-2, "the adapter must matter"


def test_two_ranks_read_their_slices_and_compute_the_same(written: dict[str, Any]) -> None:
    for logits in run_ranks(all_logits, 2, [paths for paths, _ in written.values()]):
        for mine, (_, expected) in zip(logits, written.values(), strict=True):
            hf.close(mine, expected)


def merged(paths: list[Path], target: Path, **options: Any) -> Path:
    """Folders with what LoRA adds summed into the weights, as an Accessory folder."""
    checkpoint = open_folders(paths, merge=True)
    tensors = checkpoint.tensors(checkpoint.cuts())
    meta = {"llama_type": checkpoint.meta.get("llama_type", "llama")}
    write_folder(target, dict(tensors), config=checkpoint.config, meta=meta, tokenizer=checkpoint.tokenizer, **options)
    return target


@pytest.mark.parametrize("name", CASES)
def test_merged_while_reading_it_computes_the_same(name: str, written: dict[str, Any], tmp_path: Path) -> None:
    paths, expected = written[name]
    folder = merged(paths, tmp_path / "merged")
    assert not any(".lora_" in key for key in open_folders(folder).specs())
    hf.close(hf.ours(ONE, folder), expected)

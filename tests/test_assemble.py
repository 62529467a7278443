"""Every composition opens from a folder, at any tensor-parallel size, strictly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, TOWER, VISION
from fixtures import toys
from meta import positions_of, whole_weights

from accessory.assemble import TYPES, build, open_model, read_configs, read_spec
from accessory.checkpoint import write_folder
from accessory.dist import Ranks
from spawn import run_ranks

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 64}
PEFT: dict[str, dict[str, Any]] = {
    "llama_peft": {"lora_rank": 4},
    "llama_qformerv2_peft": {"lora_rank": 4},
    "llama_adapter": {"prefix_layers": 1, "prefix_len": 3},
}
IDS = torch.randint(0, 100, (1, 6), generator=torch.Generator().manual_seed(0))


def write(folder: Path, kind: str, *, sees: bool = True, drop: tuple[str, ...] = ()) -> Path:
    """A folder of random weights of this composition."""
    (folder.parent / "spm.model").write_bytes(toys.sentencepiece_model())
    from accessory.data.tokenizer import open_tokenizer

    vision = TYPES[kind][0]
    rows = open_tokenizer(folder.parent / "spm.model").size
    config = {**SIZES, "vocab_size": rows, **PEFT.get(kind, {})}
    if sees:
        config["vision"] = {"kind": vision, "image_size": 16, "tower_args": TOWER, **VISION[vision]}
    weights = whole_weights(build(read_spec(config, llama_type=kind)), std=0.2)
    kept = {key: tensor for key, tensor in weights.items() if not key.endswith(drop)} if drop else weights
    meta = {"llama_type": kind}
    write_folder(folder, kept, config=config, meta=meta, tokenizer=folder.parent / "spm.model")
    return folder


def answer(ranks: Ranks, folder: Path, **options: Any) -> torch.Tensor:
    """Logits for a picture (where the model sees) and a few ids."""
    bundle = open_model([folder], ranks=ranks, dtype=torch.float32, **options)
    model, inputs = bundle.model, {}
    with torch.no_grad():
        if bundle.vision is not None:
            pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            features = model.vision(pixels)
            if bundle.vision.kind == "perceiver":
                inputs["visual"] = features
            else:
                slots = torch.full((1, 6), -1)
                slots[0, 1:4] = torch.arange(3)
                inputs |= {"features": features.flatten(0, -2), "slots": slots}
        return model.output(model(IDS, positions_of(IDS), **inputs))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_opens_from_its_folder_alone(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind)
    bundle = open_model([folder], ranks=ONE, dtype=torch.float32)
    assert bundle.llama_type == kind and bundle.vision.kind == TYPES[kind][0] and bundle.dtype == torch.float32
    assert answer(ONE, folder).std() > 0.1


@pytest.mark.parametrize("kind", ["llama_qformerv2_peft", "llama_adapter"])
def test_two_and_four_ranks_compute_what_one_does(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind)
    expected = answer(ONE, folder)
    for tp in (2, 4):
        for logits in run_ranks(answer, tp, folder):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_quantised_linears_answer_nearly_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama_qformerv2_peft")
    exact, rough = answer(ONE, folder), answer(ONE, folder, quant=True)
    assert 0 < (rough - exact).norm() / exact.norm() < 0.5


def test_a_text_model_has_no_vision(tmp_path: Path) -> None:
    bundle = open_model([write(tmp_path / "model", "llama", sees=False)], ranks=ONE)
    assert bundle.vision is None and not hasattr(bundle.model, "vision")


def test_a_folder_without_its_lora_weights_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama_peft", sees=False, drop=("lora_b.weight",))
    with pytest.raises(ValueError, match=r"14 missing in .*lora_b\.weight"):
        open_model([folder], ranks=ONE)


def test_a_base_and_its_peft_folder_open_as_one(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", "llama_peft", sees=False)
    bundle = open_model([whole], ranks=ONE, dtype=torch.float32)
    state = {k: v.clone() for k, v in whole_weights(bundle.model, std=0.2).items()}
    added = {k for k in state if ".lora_" in k or k.endswith("bias")}
    base, peft = tmp_path / "base", tmp_path / "peft"
    config = json.loads((whole / "config.json").read_text())
    plain = {k: v for k, v in config.items() if k != "lora_rank"}
    write_folder(base, {k: state[k] for k in state if k not in added}, config=plain, meta={"llama_type": "llama"})
    part = {k: state[k] for k in added}
    write_folder(peft, part, config=config, meta={"llama_type": "llama_peft"}, tokenizer=whole / "tokenizer.model")
    both = open_model([base, peft], ranks=ONE, dtype=torch.float32).model
    assert both.layers[0].attention.wq.lora_a.weight is not None
    assert torch.equal(
        both.state_dict()["layers.1.feed_forward.w2.lora_b.weight"], state["layers.1.feed_forward.w2.lora_b.weight"]
    )


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: got 300 tokens for a model of 32000"):
        read_spec({"dim": 8192, "vocab_size": 32000}, vocab_size=300)


@pytest.mark.parametrize(
    ("config", "kind", "word"),
    [
        ({"dimm": 4}, None, "dimm"),
        ({}, "llama_ens", "llama_type: got 'llama_ens'"),
        ({"vocab_size": -1}, None, "vocab_size"),
        ({"dim": "4096", "vocab_size": 100}, None, "dim '4096', expected int"),
        ({"n_layers": 2.5, "vocab_size": 100}, None, "n_layers 2.5"),
        ({"norm_eps": True, "vocab_size": 100}, None, "norm_eps True"),
        ({"lora_rank": "16", "vocab_size": 100}, "llama_peft", "lora_rank '16'"),
        ({"lora_rank": 16, "vocab_size": 100}, "llama", "llama_type: got llama with .*lora_rank"),
        ({"vision": "clip", "vocab_size": 100}, "llama", "vision: got kind 'clip'"),
        ({"vision": {"kind": "perceiver"}, "vocab_size": 100}, "llama_qformerv2", "expected 'qformer'"),
        ({"vision": {"kind": "perceiver"}, "vocab_size": 100}, "llama_adapter", "32 queries for prefix_len 10"),
    ],
)
def test_unknown_keys_and_types_are_refused(config: dict, kind: str | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        read_spec(config, llama_type=kind)


def test_a_missing_head_is_missing_and_no_sign_of_tied_embeddings(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama", sees=False, drop=("output.weight",))
    with pytest.raises(ValueError, match=r"1 missing in .*output\.weight"):
        open_model([folder], ranks=ONE)


def test_a_folder_that_does_not_say_its_sizes_is_not_guessed_in_silence(tmp_path: Path, caplog: Any) -> None:
    whole = write(tmp_path / "model", "llama", sees=False)
    weights = {"norm.weight": torch.ones(64)}
    write_folder(tmp_path / "legacy", weights, tokenizer=whole / "tokenizer.model")
    with pytest.raises(ValueError, match="misshaped"):
        open_model([tmp_path / "legacy"], ranks=ONE)
    assert "taking LLaMA 7B's; give --llama_config" in caplog.text


def test_config_files_are_a_union_in_which_later_ones_count(tmp_path: Path) -> None:
    for name, text in (("a.json", '{"dim": 64, "n_heads": 4}'), ("b.json", '{"n_heads": 2, "lora_rank": 4}')):
        (tmp_path / name).write_text(text)
    wanted = {"dim": 64, "n_heads": 2, "lora_rank": 4}
    assert read_configs([str(tmp_path / "a.json"), tmp_path / "b.json"]) == wanted
    with pytest.raises(ValueError, match=r"c\.json: cannot be read"):
        read_configs([str(tmp_path / "c.json")])


def test_a_longer_window_starts_dynamic_scaling_where_training_ended(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama", sees=False)
    (tmp_path / "more.json").write_text('{"rope_scaling": {"type": "dynamic", "factor": 2.0}}')
    opened = [
        open_model([folder], ranks=ONE, dtype=torch.float32, llama_config=[tmp_path / "more.json"], max_seq_len=length)
        for length in (None, 256)
    ]
    positions = torch.arange(100).unsqueeze(0)
    assert [bundle.config.max_seq_len for bundle in opened] == [64, 256]
    assert torch.equal(*(bundle.model.rope(positions) for bundle in opened))


def test_metas_llama_3_1_scaling_is_understood() -> None:
    spec = read_spec({"dim": 64, "n_heads": 4, "use_scaled_rope": True, "rope_theta": 5e5}, vocab_size=100)
    assert spec.llama.rope_scaling["rope_type"] == "llama3" and spec.llama.rope_scaling["factor"] == 8.0


def test_a_legacy_config_of_the_reference_is_understood() -> None:
    saved = {"dim": 64, "n_heads": 4, "n_kv_heads": None, "vocab_size": 100, "max_batch_size": 32, "max_seq_len": 512}
    spec = read_spec({**saved, "rope_scaling": None, "lora_rank": 16, "bias_tuning": True}, llama_type="llama_peft")
    assert spec.peft.lora_rank == 16 and spec.peft.norm_tuning and spec.llama.max_seq_len == 512


MEASURE = """
import gc, sys, torch
from accessory.assemble import Spec, build, load
from accessory.checkpoint import open_folders
from accessory.dist import Shard
from accessory.model import LlamaConfig

def anonymous():
    gc.collect()
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

checkpoint = open_folders(sys.argv[1])
model = build(Spec("llama", LlamaConfig(**checkpoint.config)), shard=Shard(1, 2))
before = anonymous()
load(model, checkpoint, device="cpu")
model.requires_grad_(False).fuse()
kept = sum(p.nbytes for p in model.parameters())
print((anonymous() - before) / kept)
"""


def test_a_rank_holds_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    config = {"dim": 512, "n_layers": 6, "n_heads": 8, "hidden_dim": 1536, "vocab_size": 2000, "max_seq_len": 64}
    model = build(read_spec(config))
    write_folder(tmp_path / "model", whole_weights(model), config=config, meta={"llama_type": "llama"})
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model")], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.3


def test_stray_vision_tensors_without_a_tower_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "model", "llama_peft", sees=False)
    more = {"vision.proj.0.bias": torch.ones(64), "vision.proj.1.weight": torch.ones(64)}
    write_folder(tmp_path / "trained", more, config={"dim": 64}, meta={"llama_type": "llama_peft"})
    bundle = open_model([folder, tmp_path / "trained"], ranks=ONE)
    assert bundle.vision is None and "2 tensors of a vision part without its tower are left out" in caplog.text

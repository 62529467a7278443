"""`accessory inspect`: what a folder holds, and what is wrong with it.

Must not load a model.
"""

import json

import folders
import pytest
import torch

from accessory.checkpoint import write_folder
from accessory.inspect import inspect, main


@pytest.fixture
def ours(tmp_path):
    spm = tmp_path / "tokenizer.model"
    spm.write_bytes(b"pieces")
    tensors = {**folders.state(dtype=torch.bfloat16), "vision.query_tokens": torch.ones(1, 4, 8)}
    tensors["layers.0.attention.wq.lora_a.weight"] = torch.ones(2, folders.DIM)
    meta = {"llama_type": "llama_qformerv2"}
    write_folder(tmp_path / "m", tensors, shards=2, config=folders.CONFIG, meta=meta, tokenizer=spm)
    return tmp_path / "m"


def test_a_report_counts_parameters_by_part_and_dtype(ours):
    report = inspect(ours)
    assert (report.form, len(report.shards), report.tensors) == ("accessory", 2, 23)
    assert report.parts == {
        "embedding": 33 * 16,
        "attention": 2 * (16 * 16 + 8 * 16 + 8 * 16 + 16 * 16),
        "feed-forward": 2 * 3 * 16 * 24,
        "norms": 5 * 16,
        "output": 33 * 16,
        "lora": 32,
        "qformer": 32,
    }
    assert report.parameters == sum(report.parts.values()) == sum(report.dtypes.values())
    assert report.dtypes["float32"] == 64 and report.llama_type == "llama_qformerv2"
    assert report.config["n_kv_heads"] == 2 and report.tokenizer.endswith("tokenizer.model")
    assert report.manifest == "5 files, sizes agree" and report.faults == []


def test_the_verb_prints_text_or_json_and_exits_with_zero(ours, capsys):
    assert main([str(ours)]) == 0
    text = capsys.readouterr().out
    for words in ("Accessory's", "attention", "bfloat16", "llama_qformerv2", "vocab_size 33", "sizes agree"):
        assert words in text
    assert main([str(ours), "--verify", "true", "--json", "true"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["manifest"] == "5 files, hashes agree"


def test_verify_names_a_file_with_one_flipped_bit(ours, capsys):
    file = ours / "consolidated.01-of-02.model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert main([str(ours)]) == 0
    assert main([str(ours), "--verify"]) == 1
    out = capsys.readouterr().out
    assert f"FAULT           {ours}: {file.name} has another SHA-256" in out and "hashes differ" in out


def test_verify_checks_the_sums_inside_pth_files_of_others(tmp_path, capsys):
    folder = folders.meta(tmp_path / "m", folders.state())
    assert main([str(folder), "--verify"]) == 0
    file = folder / "consolidated.00.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main([str(folder), "--verify"]) == 1
    assert "does not match its checksum" in capsys.readouterr().out


@pytest.mark.parametrize("ext", ["pth", "safetensors"])
def test_every_damaged_shard_is_named(tmp_path, ext, capsys):
    folder = folders.accessory(tmp_path / "m", folders.state(), shards=3, ext=ext)
    for shard in (0, 2):
        file = folder / f"consolidated.{shard:02d}-of-03.model.{ext}"
        file.write_bytes(file.read_bytes()[:-100])
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAULT") == 2 and out.count("truncated") == 2


def test_missing_files_and_unknown_folders_are_faults(ours, tmp_path, capsys):
    (ours / "meta.json").unlink()
    assert main([str(ours), str(tmp_path / "absent")]) == 1
    out = capsys.readouterr().out
    assert "meta.json is missing" in out and "no such folder" in out


def test_a_config_that_contradicts_the_tensors_is_a_fault(tmp_path):
    folder = folders.accessory(tmp_path / "m", folders.state())
    (folder / "config.json").write_text(json.dumps({**folders.CONFIG, "vocab_size": 32000, "n_layers": 3}))
    faults = inspect(folder).faults
    assert len(faults) == 2 and "vocab_size 32000, the tensors 33" in faults[0] and "n_layers 3" in faults[1]


def test_deltas_and_partial_folders_are_reported_alone_and_together(tmp_path, capsys):
    base = folders.meta(tmp_path / "base", folders.state(), shards=2)
    delta = folders.accessory(tmp_path / "delta", folders.state(1), kind="model-diff")
    peft = folders.accessory(tmp_path / "peft", {"norm.weight": torch.ones(folders.DIM)})
    assert inspect(delta).form == "delta" and inspect(peft).partial and inspect(base).discarded == 2
    assert main([str(base), str(delta), str(peft)]) == 0
    assert "loadable in this order" in capsys.readouterr().out
    assert main([str(delta), str(base)]) == 1
    assert "cannot be loaded in this order" in capsys.readouterr().out


def test_tensors_of_strange_shapes_are_counted_like_others(tmp_path):
    write_folder(tmp_path / "m", {"norm.weight": torch.tensor(1.0), "tok_embeddings.weight": torch.ones(4)})
    report = inspect(tmp_path / "m")
    assert report.parameters == 5 and not report.faults

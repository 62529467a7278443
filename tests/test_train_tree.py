"""What runs leave in the layout of ms-swift and of LLaMA-Factory: trees, logs, weights that peft and transformers open.

Must not reach into a run; its pieces are tested in test_train_tree_parts.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapters
import hf
import pytest
import torch
from engine_toys import ONE
from train_runs import drawings, environment, train

from accessory.checkpoint import manifest
from accessory.serve.infer_settings import InferSettings
from accessory.serve.noted import take_over
from accessory.train.main import main
from accessory.train.resume import checkpoints, flaws

ROWS = 24
QUICK: dict[str, Any] = {"max_steps": 2, "eval_steps": 1, "logging_steps": 2, "batch_size": 2, "dtype": "fp32"}
QUICK |= {"gradient_accumulation_steps": 1, "max_length": 256, "dataset_test_ratio": 0.1, "learning_rate": 1e-2}
QUICK |= {"dataloader_num_workers": 0}
STEP = {"loss", "acc", "grad_norm", "learning_rate", "memory(GiB)", "train_speed(iter/s)", "epoch", "global_step"}
JUDGED = {"eval_loss", "eval_acc", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def rows(folder: Path) -> Path:
    """Rows as ms-swift has them."""
    path = folder / "rows.jsonl"
    said = [{"query": f"Add {i} and 3.", "response": str(i + 3)} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return path


def words(folder: Path, base: Path, **more: Any) -> list[str]:
    """The command line of a short run in ms-swift's words."""
    given = {"model_id_or_path": base, "dataset": folder / "rows.jsonl", "output_dir": folder / "out", **QUICK}
    given |= {"device": "cpu", "preprocessing_num_workers": 1, "report_to": "none", **more}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def sft(folder: Path, base: Path, **more: Any) -> Path:
    """A short run in this process; the folder that it made."""
    if "dataset" not in more:
        rows(folder)
    assert main(words(folder, base, **more)) == 0
    return newest(folder / "out" / base.name)


def newest(folder: Path) -> Path:
    """The run with the highest number."""
    return max(folder.iterdir(), key=lambda path: int(path.name[1:].partition("-")[0]))


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def fresh(kind: str = "llama") -> torch.nn.Module:
    """A small model of transformers, with room for a row."""
    return hf.model_of(kind, max_position_embeddings=512)


def opened(kind: str, folder: Path) -> torch.nn.Module:
    """A folder as transformers opens it, with nothing missing or left over."""
    import transformers

    name = {"llama": "LlamaForCausalLM", "llava": "LlavaForConditionalGeneration"}[kind]
    model, told = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.float().eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA folder of transformers."""
    return hf.write(tmp_path_factory.mktemp("base") / "small", fresh())


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA folder of transformers."""
    return hf.write(tmp_path_factory.mktemp("base") / "seeing", fresh("llava"))


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run."""
    return sft(tmp_path_factory.mktemp("lora"), base)


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of full finetuning."""
    return sft(tmp_path_factory.mktemp("full"), base, sft_type="full", report_to="tensorboard")


# ---- ms-swift


def test_a_run_of_ms_swift_leaves_its_tree(full: Path) -> None:
    assert full.parent.name == "small" and full.name.startswith("v0-") and len(full.name) == len("v0-YYYYmmdd-HHMMSS")
    there = {path.name for path in full.iterdir()}
    assert {"sft_args.json", "training_args.json", "logging.jsonl", "runs", "images"} <= there
    assert {"checkpoint-1", "checkpoint-2", "train.yaml"} <= there
    assert not {"config.json", "model.safetensors", "training_loss.png"} & there
    pictures = {path.name for path in (full / "images").iterdir()}
    assert {"train_loss.png", "train_acc.png", "train_learning_rate.png", "eval_loss.png", "eval_acc.png"} <= pictures
    assert list((full / "runs").glob("events.*"))


def test_the_log_has_ms_swifts_keys_and_ends_with_what_the_run_says_of_itself(full: Path) -> None:
    *steps, last = lines(full / "logging.jsonl")
    assert [line["global_step"] for line in steps] == [1, 1, 2, 2], "the first step is always logged"
    assert all(set(line) == (STEP if "loss" in line else JUDGED | {"epoch", "global_step"}) for line in steps)
    assert last["log_history"] == steps and last["global_step"] == 2
    assert last["last_model_checkpoint"] == str(full / "checkpoint-2")
    best = min((line for line in steps if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert last["best_model_checkpoint"] == str(full / f"checkpoint-{best['global_step']}")
    assert last["best_metric"] == pytest.approx(best["eval_loss"], abs=1e-7)
    assert last["dataset_info"] == {"train_dataset": 22, "val_dataset": 2}
    assert last["train_time"]["n_train_samples"] == 4 and last["train_time"]["train_runtime"] > 0


def test_every_checkpoint_says_what_it_is_and_its_manifest_covers_all(lora: Path, full: Path) -> None:
    small = {"sft_args.json", "configuration.json", "generation_config.json", "trainer_state.json", "tokenizer.json"}
    own = {lora: {"adapter_config.json", "adapter_model.safetensors"}, full: {"config.json", "model.safetensors"}}
    for run, weights in own.items():
        for step, path in checkpoints(run):
            names = {entry.name for entry in path.iterdir()}
            assert small | weights | {"tokenizer_config.json", "chat_template.jinja", "facts.json"} <= names
            assert set(manifest.read(path) or {}) == names - {manifest.NAME} and not flaws(path, hashes=True)
            state = json.loads((path / "trainer_state.json").read_text())
            assert state["global_step"] == step and state["log_history"][-1]["global_step"] == step
    told = json.loads((lora / "checkpoint-2" / "configuration.json").read_text())
    assert told["adapter_cfg"]["sft_type"] == "lora" and told["framework"] == "pytorch"


def test_a_checkpoint_of_lora_opens_in_peft_with_our_logits(lora: Path, base: Path) -> None:
    mine = hf.ours(ONE, [base, lora / "checkpoint-2"])
    hf.close(mine, hf.theirs(adapters.reopened(fresh(), lora / "checkpoint-2")))
    assert (mine - hf.theirs(fresh())).abs().max() > 1e-3, "the run must have learned something"


def test_a_checkpoint_of_full_finetuning_opens_in_transformers_with_our_logits(full: Path) -> None:
    mine = hf.ours(ONE, full / "checkpoint-2")
    hf.close(mine, hf.theirs(opened("llama", full / "checkpoint-2")))
    assert (mine - hf.theirs(fresh())).abs().max() > 1e-3, "the run must have learned something"


def test_infer_finds_base_template_and_held_out_rows_by_a_checkpoint_alone(
    lora: Path, base: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (lora / "checkpoint-2").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    found = take_over(InferSettings(ckpt_dir=str(moved), load_dataset_config=True))
    assert found.model_name_or_path == [str(base)] and found.adapter_name_or_path == [str(moved)]
    assert found.template == "accessory/alpaca" and found.val_size == 0.1 and found.dataset_seed == 42
    assert found.dataset == [str(lora.parents[2] / "rows.jsonl")]


def test_runs_are_numbered_and_one_told_to_goes_on_in_the_newest(base: Path, tmp_path: Path) -> None:
    first = sft(tmp_path, base, max_steps=1)
    second = sft(tmp_path, base, max_steps=1)
    assert first.name.startswith("v0-") and second.name.startswith("v1-")
    assert sft(tmp_path, base, resume="auto") == second
    assert [step for step, _ in checkpoints(second)] == [1, 2] and [step for step, _ in checkpoints(first)] == [1]
    *steps, last = lines(second / "logging.jsonl")
    assert [line["global_step"] for line in steps if "loss" in line] == [1, 2]
    assert last["global_step"] == 2 and not any("log_history" in line for line in steps)
    assert sft(tmp_path, base, resume_from_checkpoint=first / "checkpoint-1", max_steps=2) == second
    assert [step for step, _ in checkpoints(first)] == [1, 2], "a checkpoint is gone on with in its own run"


KILL = """
import os, signal, sys
from accessory.checkpoint.stage import Stage
real = Stage.path
def path(self, name):
    if (self.target.name, name) == ("checkpoint-2", sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, name)
Stage.path = path
from accessory.train.main import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_run_killed_while_it_writes_weights_leaves_no_half_checkpoint_and_goes_on(base: Path, tmp_path: Path) -> None:
    rows(tmp_path)
    argv = words(tmp_path, base, sft_type="full", max_steps=3)
    done = subprocess.run(
        [sys.executable, "-c", KILL, "generation_config.json", *argv], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = newest(tmp_path / "out" / "small")
    assert [step for step, _ in checkpoints(run)] == [1] and list(run.glob(".checkpoint-2.*.tmp"))
    assert sft(tmp_path, base, sft_type="full", max_steps=3, resume="auto", dataset=tmp_path / "rows.jsonl") == run
    assert not list(run.glob(".checkpoint-*")) and not flaws(run / "checkpoint-3", hashes=True)
    assert [line["global_step"] for line in lines(run / "logging.jsonl") if "eval_loss" in line] == [1, 2, 3]
    hf.close(hf.ours(ONE, run / "checkpoint-3"), hf.theirs(opened("llama", run / "checkpoint-3")))


def test_a_save_that_fails_in_the_weights_leaves_the_checkpoint_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accessory.train.whole import Whole

    def full_disk(self: Whole, stage: Any, states: Any) -> None:
        real(self, stage, states)
        if stage.target.name == "checkpoint-2":
            raise OSError(28, "No space left on device")

    real = Whole.write
    monkeypatch.setattr(Whole, "write", full_disk)
    with pytest.raises(OSError, match=r"checkpoint-2: the disk is full"):
        sft(tmp_path, base, sft_type="full")
    run = newest(tmp_path / "out" / "small")
    assert [step for step, _ in checkpoints(run)] == [1]
    assert (run / "model.safetensors").is_file(), "the trained model is not lost with its checkpoint"
    hf.close(hf.ours(ONE, run), hf.theirs(opened("llama", run)))


# ---- LLaVA


def weights(folders: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of folders by canonical name."""
    from accessory.checkpoint import open_folders

    checkpoint = open_folders(folders)
    return dict(checkpoint.tensors(checkpoint.cuts(), dtype=torch.float32))


def changed(one: list[Path], other: list[Path]) -> set[str]:
    """The parts in which two models differ."""
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    return {".".join(key.split(".")[:2]) if key.startswith("vision.") else "llm" for key in moved}


def test_a_llava_trained_in_all_parts_opens_in_transformers_as_it_was_trained(llava: Path, tmp_path: Path) -> None:
    more = {"sft_type": "full", "freeze_vit": "false", "max_steps": 1, "dataset_test_ratio": 2, "weight_decay": 0.5}
    run = sft(tmp_path, llava, dataset=drawings(tmp_path), **more)
    place = run / "checkpoint-1"
    assert changed([llava], [place]) == {"llm", "vision.proj", "vision.tower"}
    theirs = opened("llava", place)
    hf.close(hf.ours(ONE, place), hf.theirs(theirs))
    assert (adapters.features(theirs) - adapters.features(fresh("llava"))).abs().max() > 1e-3
    assert {"preprocessor_config.json", "generation_config.json", "chat_template.jinja"} <= {*os.listdir(place)}
    assert all("acc" in line for line in lines(run / "logging.jsonl") if "loss" in line)
    assert any("eval_acc" in line for line in lines(run / "logging.jsonl"))


ALIGN: dict[str, Any] = {"finetuning_type": "frozen", "train_projector": "full", "max_steps": 1, "cutoff_len": 384}
ALIGN |= {"device": "cpu", "precision": "fp32", "dataloader_num_workers": 0, "preprocessing_num_workers": 1}
ALIGN |= {"report_to": "none", "plot_loss": "false", "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize("alone", [False, True])
def test_a_trained_projector_lies_in_a_whole_folder_or_behind_its_base(
    llava: Path, tmp_path: Path, alone: bool
) -> None:
    given = {**ALIGN, "model_name_or_path": llava, "dataset": drawings(tmp_path), "output_dir": tmp_path / "run"}
    given |= {"cache_dir": tmp_path / "cache", "only_save_trainable": alone, "save_steps": 0}
    assert main([f"{name}={value}" for name, value in given.items()]) == 0
    names = {*os.listdir(tmp_path / "run")}
    if alone:
        assert "consolidated.00-of-01.model.safetensors" in names and "model.safetensors" not in names
        assert changed([llava], [llava, tmp_path / "run"]) == {"vision.proj"}
        return
    assert changed([llava], [tmp_path / "run"]) == {"vision.proj"}
    told = adapters.features(opened("llava", tmp_path / "run"))
    assert (told - adapters.features(fresh("llava"))).abs().max() > 1e-3


# ---- LLaMA-Factory


def test_two_ranks_leave_llama_factorys_folder_and_whole_checkpoints(base: Path, tmp_path: Path) -> None:
    rows(tmp_path)
    told = {"query": "prompt", "response": "response"}
    info = {"sums": {"file_name": "rows.jsonl", "columns": {new: old for old, new in told.items()}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    more = {"stage": "sft", "do_train": "true", "finetuning_type": "full", "dataset_dir": tmp_path, "cutoff_len": 256}
    more |= {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "val_size": 4, "save_steps": 1}
    more |= {"logging_steps": 1, "precision": "fp32", "per_device_train_batch_size": 2, "compute_accuracy": "true"}
    more |= {"nproc_per_node": 2, "tensor_parallel_size": 2, "template": "default", "learning_rate": 1e-2}
    more |= {"overwrite_cache": "true", "dataloader_num_workers": 0}
    train(tmp_path, model_name_or_path=base, dataset="sums", output_dir=tmp_path / "run", **more)
    run = tmp_path / "run"
    for place in (run, run / "checkpoint-1", run / "checkpoint-2"):
        hf.close(hf.ours(ONE, place), hf.theirs(opened("llama", place)))
    assert torch.equal(hf.ours(ONE, run), hf.ours(ONE, run / "checkpoint-2"))
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert {"loss", "learning_rate", "epoch", "step", "acc", "grad_norm"} == set(state["log_history"][0])
    results = json.loads((run / "train_results.json").read_text())
    wanted = {"epoch", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert wanted <= set(results)
    everything = json.loads((run / "all_results.json").read_text())
    assert {*results, "eval_loss", "eval_accuracy", "eval_runtime"} <= set(everything)
    keys = {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time", "remaining_time"}
    logged = lines(run / "trainer_log.jsonl")
    assert keys <= set(logged[0]) and "eval_loss" in logged[1] and not (run / "logging.jsonl").exists()
    assert not (run / "training_eval_loss.png").exists(), "plot_loss is off unless it is wanted"


def test_llama_factorys_adapter_folder_and_curves(base: Path, tmp_path: Path) -> None:
    given = {"model_name_or_path": base, "dataset": rows(tmp_path), "output_dir": tmp_path / "run", "plot_loss": "true"}
    given |= {"do_train": "true", "val_size": 4, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    given |= {"max_steps": 2, "cutoff_len": 256, "save_steps": 2, "cache_dir": tmp_path / "hub", "report_to": "none"}
    given |= {"precision": "fp32", "device": "cpu", "dataloader_num_workers": 0, "preprocessing_num_workers": 1}
    assert main([f"{name}={value}" for name, value in given.items()]) == 0
    names = {*os.listdir(tmp_path / "run")}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
    assert {"training_loss.png", "training_eval_loss.png", "train_results.json", "eval_results.json"} <= names
    hf.close(hf.ours(ONE, [base, tmp_path / "run"]), hf.theirs(adapters.reopened(fresh(), tmp_path / "run")))

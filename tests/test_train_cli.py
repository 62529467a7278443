"""`accessory train` from outside: what a run leaves, how it ends, and what it says when something is wrong.

Must not reach into the program; what is exact inside is tested beside its parts.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from train_runs import ROOT, command, curve, defaults, drawings, environment, log_of, sums, train
from trainee_toys import TOWER


def last_line(text: str) -> str:
    """The last line of what was said."""
    return text.strip().splitlines()[-1]


def refused(folder: Path, **settings: object) -> str:
    """The sentence with which a run ends that cannot be."""
    done = train(folder, expect=1, **settings)
    assert "Traceback" not in done.stderr, done.stderr
    return last_line(done.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over sums, with validation, tp 2."""
    folder = tmp_path_factory.mktemp("trained")
    train(
        folder,
        dataset=sums(folder),
        output_dir=folder / "run",
        max_steps=8,
        save_steps=4,
        precision="fp32",
        learning_rate=1e-3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        cutoff_len=96,
        nproc_per_node=2,
        tensor_parallel_size=2,
        eval_steps=4,
        val_size=4,
        save_total_limit=3,
    )
    return folder


def test_a_run_learns(trained: Path) -> None:
    losses = [line["loss"] for line in log_of(trained / "run")]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]


def test_a_run_leaves_results_log_settings_and_checkpoints(trained: Path) -> None:
    names = {path.name for path in (trained / "run").iterdir()}
    wanted = {"checkpoint-4", "checkpoint-8", "train.yaml", "trainer_log.jsonl", "train_results.json", "manifest.json"}
    assert wanted <= names
    lines = [json.loads(line) for line in (trained / "run" / "trainer_log.jsonl").read_text().splitlines()]
    assert {line["current_steps"] for line in lines if "eval_loss" in line} == {4, 8}
    assert all("eval_exact_match" in line for line in lines if "eval_loss" in line)


@pytest.mark.parametrize("folders", [["run"], ["run/checkpoint-8"]])
def test_the_final_folder_and_a_checkpoint_behind_its_base_answer_in_the_demo(
    trained: Path, folders: list[str]
) -> None:
    base = [] if folders == ["run"] else [str(ROOT / "accessory" / "tiny")]
    paths = [*base, *(str(trained / name) for name in folders)]
    done = subprocess.run(
        [os.sys.executable, "demos/single_turn.py", "--pretrained_path", *paths, "--prompt", "Add 1 and 7."],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_a_run_at_tp_2_goes_on_at_dp_2_with_the_same_losses(trained: Path) -> None:
    run = trained / "other"
    shutil.copytree(trained / "run", run)
    shutil.rmtree(run / "checkpoint-8")
    done = train(
        trained,
        dataset=trained / "sums.json",
        output_dir=run,
        max_steps=8,
        save_steps=4,
        precision="fp32",
        learning_rate=1e-3,
        per_device_train_batch_size=1,
        cutoff_len=96,
        nproc_per_node=2,
        val_size=4,
        save_total_limit=3,
    )
    assert "going on from" in done.stderr
    before, after = curve(trained / "run"), curve(run)
    assert [line[0] for line in after] == list(range(1, 9)) and after[:4] == before[:4]
    assert [line[1] for line in after[4:]] == pytest.approx([line[1] for line in before[4:]], abs=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_larger_batch_takes_the_rows_that_are_left(tmp_path: Path) -> None:
    common = {"dataset": sums(tmp_path, 12), "output_dir": tmp_path / "run", "cutoff_len": 64, "packing": "false"}
    common |= {"save_steps": 4, "finetuning_type": "norm_bias"}
    train(tmp_path, num_train_epochs=2, per_device_train_batch_size=2, **common)
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    train(tmp_path, num_train_epochs=2, per_device_train_batch_size=4, **common)
    lines = log_of(tmp_path / "run")
    assert [line["epoch"] for line in lines[7:]] == pytest.approx([8 / 6, 10 / 6, 2.0], abs=1e-5)
    said = refused(tmp_path, max_steps=3, **common)
    assert "max_steps: got a run of 3 steps, beyond which the checkpoint of step 10 is" in said


def test_a_signal_ends_the_run_with_a_checkpoint_and_the_code_that_says_resumable(tmp_path: Path) -> None:
    settings = {
        "dataset": sums(tmp_path),
        "output_dir": tmp_path / "run",
        "max_steps": 100000,
        "cutoff_len": 64,
        "save_steps": 0,
        "finetuning_type": "norm_bias",
    }
    process = subprocess.Popen(
        command(**defaults(tmp_path), **settings), env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    steps = len(log_of(tmp_path / "run"))
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir()


def test_one_row_trains_on_two_ranks(tmp_path: Path) -> None:
    settings = {"dataset": sums(tmp_path, 1), "output_dir": tmp_path / "run", "max_steps": 2, "nproc_per_node": 2}
    train(tmp_path, save_steps=0, cutoff_len=64, **settings)
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.slow
def test_rows_with_and_without_pictures_mix_on_two_ranks(tmp_path: Path, zero: int) -> None:
    train(
        tmp_path,
        dataset=[drawings(tmp_path, 3), sums(tmp_path, 9)],
        output_dir=tmp_path / "run",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        packing="false",
        nproc_per_node=2,
        zero=zero,
        save_steps=0,
        train_vision="lora",
        cutoff_len=64,
    )
    assert len(log_of(tmp_path / "run")) == 6


def test_a_loss_that_is_no_number_stops_all_ranks_and_names_rows(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        dataset=sums(tmp_path),
        output_dir=tmp_path / "run",
        max_steps=8,
        learning_rate=1e30,
        max_grad_norm=0,
        optim="sgd",
        precision="fp32",
        nproc_per_node=2,
        save_steps=0,
        cutoff_len=64,
    )
    assert "sums.json:" in said and "nothing was updated" in said


@pytest.mark.slow
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    path = sums(tmp_path, 6)
    rows = json.loads(path.read_text())
    rows[3]["output"] = " "
    path.write_text(json.dumps(rows))
    common = {"dataset": path, "output_dir": tmp_path / "run", "max_steps": 1, "save_steps": 0, "cutoff_len": 64}
    assert "sums.json:4: output: got an empty answer" in refused(tmp_path, **common)
    assert "1 bad" in train(tmp_path, on_bad_row="skip", **common).stderr


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = drawings(tmp_path, 2)
    rows = json.loads(path.read_text())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows[1]["image"] = "broken.png"
    path.write_text(json.dumps(rows))
    said = refused(tmp_path, dataset=path, output_dir=tmp_path / "run", max_steps=1, save_steps=0, cutoff_len=96)
    assert "drawings.json:2" in said and "broken.png" in said


@pytest.mark.slow
def test_pictures_and_rows_that_were_passed_over_are_counted_over_all_ranks_and_restarts(tmp_path: Path) -> None:
    path = drawings(tmp_path, 4)
    rows = json.loads(path.read_text())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows[1]["image"] = rows[3]["image"] = "broken.png"
    path.write_text(json.dumps(rows))
    settings = {"dataset": path, "output_dir": tmp_path / "run", "on_bad_row": "skip", "packing": "false"}
    settings |= {"nproc_per_node": 2, "per_device_train_batch_size": 1, "cutoff_len": 96, "save_steps": 2}
    train(tmp_path, max_steps=2, **settings)
    said = train(tmp_path, max_steps=4, **settings).stderr
    assert "4 times a row was not learned since its picture cannot be read" in said
    facts = json.loads((tmp_path / "run" / "checkpoint-4" / "facts.json").read_text())
    assert facts["watch"]["total_pictures"] == 8


def test_a_data_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    said = refused(tmp_path, dataset=tmp_path / "nowhere.json", output_dir=tmp_path / "run", cutoff_len=64)
    assert "nowhere.json" in said and "no such file" in said


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    settings = {"dataset": sums(tmp_path), "output_dir": tmp_path / "run", "max_steps": 100000, "cutoff_len": 64}
    first = subprocess.Popen(
        command(**defaults(tmp_path), **settings), env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert first.stderr is not None
        next(line for line in first.stderr if line.startswith("step 1/"))
        assert "another run is writing" in refused(tmp_path, **settings)
    finally:
        first.kill()
        first.communicate()


def test_final_weights_are_written_where_the_last_checkpoint_finds_no_room(tmp_path: Path) -> None:
    settings = {"dataset": sums(tmp_path), "output_dir": tmp_path / "run", "max_steps": 1, "cutoff_len": 64}
    done = subprocess.run(
        command(**defaults(tmp_path), **settings),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000)),
    )
    assert done.returncode == 1 and "checkpoint-1" in last_line(done.stderr), done.stderr
    assert (tmp_path / "run" / "manifest.json").exists() and not (tmp_path / "run" / "checkpoint-1").exists()


def test_the_log_has_the_learning_rates_of_the_parts_that_train(tmp_path: Path) -> None:
    rates = {"finetuning_type": "frozen", "train_projector": "full", "projector_lr": 3e-3, "vision_lr": 1e-4}
    common = {"dataset": drawings(tmp_path, 4), "max_steps": 1, "save_steps": 0, "cutoff_len": 64}
    train(tmp_path, output_dir=tmp_path / "run", train_vision="full", **rates, **common)
    (line,) = log_of(tmp_path / "run")
    assert (line["lr"], line["lr_vision"]) == (3e-3, 1e-4)


@pytest.mark.slow
def test_a_tower_that_is_in_no_folder_and_not_trained_is_refused(tmp_path: Path) -> None:
    weights = {"output_dir": tmp_path / "text", "train_from_scratch": "true", "save_steps": 0, "max_steps": 1}
    tokenizer = ROOT / "accessory" / "tiny" / "tokenizer.model"
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 256}
    eyes = {"kind": "qformer", "image_size": 16, "tower_args": TOWER, "queries": 2, "hidden": 32, "layers": 1}
    (tmp_path / "llm.json").write_text(json.dumps(sizes))
    (tmp_path / "eyes.json").write_text(json.dumps({"vision": {**eyes, "heads": 2, "intermediate": 64}}))
    train(tmp_path, llama_config=tmp_path / "llm.json", dataset=sums(tmp_path), tokenizer_path=tokenizer, **weights)
    sees = {"model_name_or_path": tmp_path / "text", "llama_type": "llama_qformerv2"}
    sees |= {"llama_config": tmp_path / "eyes.json", "dataset": drawings(tmp_path, 2)}
    said = refused(tmp_path, output_dir=tmp_path / "run", finetuning_type="frozen", train_projector="full", **sees)
    assert "tensors of the vision part that are not trained either (vision.tower." in said


def test_a_dry_run_prints_parts_memory_and_steps_and_leaves_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, dataset=sums(tmp_path), output_dir=tmp_path / "run", dry_run="true", cutoff_len=64)
    assert "frozen" in done.stdout and "memory" in done.stdout and "steps" in done.stdout
    assert not (tmp_path / "run").exists()

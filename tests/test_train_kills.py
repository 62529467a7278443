"""Runs that are killed again and again end as if nobody had touched them, bit by bit.

Must not reach into the program: only the command line and the files it leaves.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from train_runs import command, curve, defaults, environment, sums, train

pytestmark = pytest.mark.slow


def settings(folder: Path, name: str, *, ranks: int) -> dict[str, object]:
    """LoRA with dropout, accumulation, several epochs, a checkpoint after every step."""
    return {
        "dataset": folder / "sums.json",
        "output_dir": folder / name,
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // ranks,
        "cutoff_len": 64,
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "save_steps": 1,
        "save_total_limit": 3,
        "nproc_per_node": ranks,
        "dataloader_num_workers": 1,
        "warmup_steps": 3,
    }


def kill_while_training(folder: Path, argv: list[str], rng: random.Random) -> str:
    """Start, let it come a random way, and kill it with all its processes; what it said."""
    process = subprocess.Popen(
        argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log, lines = folder / "killed" / "trainer_log.jsonl", []
    before = log.read_text().count("\n") if log.exists() else 0
    wanted, deadline = before + rng.randint(1, 3), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= wanted:
            break
        time.sleep(0.005)
    time.sleep(rng.random() * 0.15)  # anywhere in a step or a save
    finished = process.poll() is not None
    if not finished:
        os.killpg(process.pid, signal.SIGKILL)
    lines.append(process.communicate()[1])
    return "" if finished else "".join(lines)


@pytest.mark.parametrize(("ranks", "kills"), [(1, 8), (2, 4)])
def test_a_run_that_is_killed_again_and_again_writes_the_same_log_as_an_unbroken_one(
    tmp_path: Path, ranks: int, kills: int
) -> None:
    sums(tmp_path, 60)
    whole = settings(tmp_path, "whole", ranks=ranks)
    train(tmp_path, **whole, timeout=240)
    argv = command(**defaults(tmp_path), **settings(tmp_path, "killed", ranks=ranks))
    rng, said = random.Random(7), []
    while len(said) < kills:
        output = kill_while_training(tmp_path, argv, rng)
        assert output, f"the run ended after {len(said)} kills: give it more steps"
        said.append(output)
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")

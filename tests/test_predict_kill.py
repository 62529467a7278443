"""A prediction that is killed again and again, and gone on with, equals an unbroken one, line for line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from engine_toys import write_model

pytestmark = pytest.mark.slow

ROWS, KILLS = 200, 5
DEADLINE = 120.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model", "llama", sees=False)
    rows = [{"instruction": f"the fox {n} " * (1 + n % 7), "output": f"dog {n}"} for n in range(ROWS)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def command(out: str, *more: str) -> list[str]:
    words = "--model_name_or_path model --precision fp32 --template llama2 --eval_dataset rows.jsonl --temperature 1"
    words += f" --max_new_tokens 24 --cutoff_len 96 --per_device_eval_batch_size 4 --output_dir {out}"
    return [sys.executable, "-m", "accessory", "predict", *words.split(), *more]


def answered(out: Path) -> int:
    """Whole lines in all files of answers."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("generated_predictions*.jsonl"))


def kill_at(home: Path, out: str, count: int, *more: str) -> int:
    """Start the run, kill all its processes once so many rows are answered; how many were."""
    job = subprocess.Popen(command(out, *more), cwd=home, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + DEADLINE
    try:
        while answered(home / out) < count:
            assert job.poll() is None and time.monotonic() < end, job.communicate()[1]
            threading.Event().wait(0.002)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    return answered(home / out)


def whole(home: Path, out: str, *more: str) -> None:
    done = subprocess.run(command(out, *more), cwd=home, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_a_run_killed_five_times_equals_an_unbroken_one_line_for_line(home):
    whole(home, "whole")
    counts = [kill_at(home, "broken", 1 + number * ROWS // (KILLS + 1)) for number in range(KILLS)]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] < ROWS
    whole(home, "broken")
    names = ("generated_predictions.jsonl", "predict_results.json")
    first, second = ((home / out / names[0]).read_bytes() for out in ("whole", "broken"))
    assert first == second and first.count(b"\n") == ROWS and len(set(first.splitlines())) == ROWS
    results = [json.loads((home / out / names[1]).read_text()) for out in ("whole", "broken")]
    scores = [
        {name: value for name, value in one.items() if "second" not in name and "time" not in name} for one in results
    ]
    assert scores[0] == scores[1] and scores[0]["predict_samples"] == ROWS


def test_two_killed_ranks_are_gone_on_with_by_one_and_by_two(home):
    two = ("--nproc_per_node", "2", "--tensor_parallel_size", "1")
    kill_at(home, "ranks", 30, *two)
    kill_at(home, "ranks", 90)
    kill_at(home, "ranks", 140, *two)
    whole(home, "ranks", *two)
    if not (home / "whole").exists():
        whole(home, "whole")
    first, second = ((home / out / "generated_predictions.jsonl").read_bytes() for out in ("whole", "ranks"))
    assert first == second

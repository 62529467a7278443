"""Small runs of `accessory train` as subprocesses, and what they left; helper of the command line's tests.

Must not know what a test looks for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "accessory" / "tiny" / "example.png"


def command(**settings: Any) -> list[str]:
    """`accessory train` with settings on the tiny model."""
    flags: list[str] = []
    for key, value in settings.items():
        flags += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [sys.executable, "-m", "accessory", "train", *flags]


def train(folder: Path, *, expect: int = 0, timeout: float = 120, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end in `folder`/run, with a cache of its own, and check the exit code."""
    done = subprocess.run(
        command(**defaults(folder), **settings), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def defaults(folder: Path) -> dict[str, Any]:
    """Settings that every run here has."""
    return {"cache_dir": folder / "cache", "report_to": "none", "plot_loss": "false", "device": "cpu"}


def environment(**more: str) -> dict[str, str]:
    """One thread per process, this checkout, nothing of a job around the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The training lines of trainer_log.jsonl."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def curve(folder: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, gradient norm, learning rate), as they were written."""
    return [(line["current_steps"], line["loss"], line["grad_norm"], line["lr"]) for line in log_of(folder)]


def sums(folder: Path, count: int = 40) -> Path:
    """An alpaca file of small sums, of different lengths."""
    rows = [
        {"instruction": f"Add {i} and {i * 7 % 13}." + " Please." * (i % 5), "input": "", "output": str(i + i * 7 % 13)}
        for i in range(count)
    ]
    path = folder / "sums.json"
    path.write_text(json.dumps(rows))
    return path


def drawings(folder: Path, count: int = 12) -> Path:
    """A LLaVA file about the picture that ships."""
    said = [
        [{"from": "human", "value": f"<image>\nWhat is this, number {i}?"}, {"from": "gpt", "value": f"Drawing {i}."}]
        for i in range(count)
    ]
    path = folder / "drawings.json"
    path.write_text(json.dumps([{"image": str(PICTURE), "conversations": turns} for turns in said]))
    return path

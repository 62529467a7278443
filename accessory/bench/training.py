"""Training measured: every side in a process of its own, in turn, the same data from the same weights.

Must not build a model itself; `trainer` does, where its memory can be told from the others'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from accessory.bench.line import Line, median_ratio
from accessory.bench.trainer import Task

WARM_UP = 2  # steps that count for losses only


@dataclass
class Course:
    """What one side did: tokens per second of each round, losses of all steps, peak bytes."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0


def race(sides: Mapping[str, tuple[str, Task]], *, rounds: int, steps: int) -> dict[str, Course]:
    """name -> (side, task) to name -> course; in a round each runs `steps` steps while the others wait.

    Raises RuntimeError when a side's process ends early.
    """
    courses = {name: Course() for name in sides}
    with ExitStack() as stack:
        running = {name: stack.enter_context(_start(side, task)) for name, (side, task) in sides.items()}
        for turn in range(rounds + 1):
            for name, process in running.items():
                record = _ask(process, steps if turn else WARM_UP)
                courses[name].losses += record["losses"]
                courses[name].peak = record["peak"]
                if turn:
                    courses[name].rates.append(record["tokens"] / record["seconds"])
    return courses


def _start(side: str, task: Task) -> subprocess.Popen[str]:
    """The program of a side, which ends when its stdin does."""
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    program = "import sys; from accessory.bench.trainer import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, side, json.dumps(asdict(task))]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen[str], steps: int) -> dict:
    """Let a side run; its record."""
    assert process.stdin is not None and process.stdout is not None, "both were asked for as pipes"
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"bench train: {' '.join(process.args[-2:])} ended with {process.wait()}")
    return json.loads(line)


def measure_training(settings: Any, device: torch.device, about: dict) -> list[Line]:
    """Full finetuning, LoRA, and what packing brings, as lines of the table; `about` gains the distance of the losses.

    The rows of a line are tokens per second that are learned or conditioned on; padding counts for nothing.
    """
    peers = [] if settings.peer == "none" else [settings.peer]
    task = Task(
        shape=settings.shape, batch=settings.batch, length=settings.length, dtype=settings.dtype, device=str(device)
    )
    lines: list[Line] = []
    for method in ("full", "lora"):
        sides = {side: (side, replace(task, method=method)) for side in ("ours", *peers)}
        courses = race(sides, rounds=settings.rounds, steps=settings.steps)
        for side, course in courses.items():
            lines.append(Line(method, side, "tokens/s", course.rates))
            lines.append(Line(f"{method} peak", side, "GB", [course.peak / 1e9]))
        for peer in peers:
            pairs = zip(courses["ours"].losses, courses[peer].losses, strict=True)
            about[f"{method}_loss_distance"] = max(abs(a - b) / b for a, b in pairs)
            about[f"{method}_losses"] = [courses[side].losses for side in ("ours", peer)]
    kinds = {rows: ("ours", replace(task, rows=rows)) for rows in ("full", "packed", "padded")}
    courses = race(kinds, rounds=settings.rounds, steps=settings.steps)
    base = courses["padded"].rates
    for rows, course in courses.items():
        what = {"full": "full rows", "packed": "packed", "padded": "padded"}[rows]
        lines.append(Line(what, "ours", "tokens/s", course.rates, ratio=median_ratio(course.rates, base)))
    about["packed_of_full_rows"] = median_ratio(courses["packed"].rates, courses["full"].rates)
    return lines

"""The training bench: both sides do the same work from the same weights, and what is packed is what is counted.

Must not time anything.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from accessory.bench import shapes
from accessory.bench.trainer import IGNORED, SIDES, Task, fill_rows, pack, to_batch
from accessory.bench.training import race
from accessory.model import LlamaConfig

SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=1000)
TASK = Task(batch=2, length=48, dtype="fp32")


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("rows", ["full", "padded"])
def test_both_sides_have_the_same_losses_in_fp32(monkeypatch: pytest.MonkeyPatch, method: str, rows: str) -> None:
    monkeypatch.setitem(shapes.SHAPES, "110m", SMALL)
    task = replace(TASK, method=method, rows=rows)
    losses = {}
    for side, make in SIDES.items():
        torch.manual_seed(0)
        trainer, steps = make(task), task.steps()
        losses[side] = [float(trainer.step(next(steps))) for _ in range(3)]
    spread = 1e-4 if method == "full" else 2e-3  # the sides draw LoRA's first factor differently
    assert losses["ours"] == pytest.approx(losses["transformers"], rel=spread)


def test_packed_rows_hold_all_documents_and_no_target_across_two() -> None:
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    rows = pack(documents, 6)
    assert [document for row in rows for document in row] == documents
    batch = to_batch(rows)
    assert batch["labels"].tolist() == [[2, 3, IGNORED, 5, IGNORED], [7, 8, 9, IGNORED, IGNORED]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, -1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]


def test_packed_rows_are_about_full() -> None:
    lengths = fill_rows(8, 512, torch.Generator().manual_seed(0))
    assert 8 * 512 - 8 * 16 <= sum(lengths) <= 8 * 512


def test_a_side_runs_as_a_program_and_reports_tokens_losses_and_memory() -> None:
    course = race({"ours": ("ours", Task(batch=1, length=16, dtype="fp32"))}, rounds=1, steps=1)["ours"]
    assert len(course.losses) == 3 and len(course.rates) == 1 and course.peak > 1 << 20
    assert json.dumps(course.losses)

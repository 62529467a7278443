"""Training on CUDA against training on the CPU; what needs a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from trainee_toys import ONE, SEES, Case, batches, toy, train

from accessory.train.optim import make_optimizer
from accessory.train.trainee import Trainee

pytestmark = pytest.mark.gpu

CASES = {
    "full": Case(),
    "packed lora": Case(settings={"finetuning_type": "lora"}, packed=True),
    "adapter": Case(settings={"finetuning_type": "adapter"}),
    "lora on nf4": Case(settings={"finetuning_type": "lora"}, quant=True),
    "pictures": Case(config=SEES, settings={"train_vision": "full"}, pictures=True),
}


def on_cuda(case: Case, steps: int = 10) -> tuple[list[float], list[float]]:
    """Losses and norms of single micro-batches on the device."""
    ranks = replace(ONE, device=torch.device("cuda", 0))
    model, parts = toy(case, ranks.shard)
    trainee = Trainee(model, parts, ranks, dtype=case.dtype, **case.trainee)
    optimizer = make_optimizer(trainee, case.as_settings())
    losses, norms = [], []
    for step in range(steps):
        batch = {name: None if t is None else t.cuda() for name, t in batches(case, step, 0).items()}
        targets = int((batch["labels"] != -100).sum())
        losses.append(float(trainee.forward_backward(batch, scale=1 / targets, last=True)) / targets)
        norms.append(float(trainee.clip(0.0 if step == 0 else 1.0)))
        optimizer.step()
        trainee.updated()
    return losses, norms


@pytest.mark.parametrize("saved", [{}, {"offload": True}, {"checkpointing": "full"}, {"checkpointing": "selective"}])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_learns_as_the_cpu_does(name: str, saved: dict[str, Any]) -> None:
    expected = train(ONE, CASES[name].but(steps=10))
    losses, norms = on_cuda(CASES[name].but(trainee=saved))
    tolerance = 1e-2 if CASES[name].quant else 1e-4
    assert losses == pytest.approx(expected.losses, abs=tolerance)
    assert norms == pytest.approx(expected.norms, rel=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "muon"])
def test_sixteen_bits_learn_on_a_gpu(dtype: torch.dtype, optim: str) -> None:
    case = Case(settings={"optim": optim}, dtype=dtype, lr=1e-3)
    losses, norms = on_cuda(case)
    assert losses == pytest.approx(train(ONE, case.but(steps=10, dtype=torch.float32)).losses, abs=0.1)
    assert all(norm > 0 for norm in norms)


@pytest.mark.slow
def test_compiled_blocks_on_a_gpu_compute_the_same() -> None:
    expected = on_cuda(Case(packed=True))[0]
    assert on_cuda(Case(packed=True, trainee={"compile": True}))[0] == pytest.approx(expected, abs=1e-4)


def test_a_step_waits_for_no_result() -> None:
    case = Case(dtype=torch.bfloat16)
    ranks = replace(ONE, device=torch.device("cuda", 0))
    model, parts = toy(case, ranks.shard)
    trainee = Trainee(model, parts, ranks, dtype=case.dtype)
    optimizer = make_optimizer(trainee, case.as_settings())
    batch = {name: None if t is None else t.cuda() for name, t in batches(case, 0, 0).items()}
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            trainee.forward_backward(batch, scale=0.1, last=True)
            trainee.clip(1.0)
            optimizer.step()
            trainee.updated()
        finally:
            torch.cuda.set_sync_debug_mode("default")

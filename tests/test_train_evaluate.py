"""Validation while training: the same numbers on any ranks, and a training that does not notice."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, opened, picture, write_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from train_toys import train_on

from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request
from accessory.model import Llama
from accessory.train.evaluate import Best, Question, Validation
from accessory.train.settings import Settings
from accessory.train.trainee import seed_step
from spawn import run_ranks

SAID = ["a fox", "what is it?", "the quick brown fox jumps", "1 2 3", "x"]


@dataclass
class Micro:
    """A micro-batch as the feed gives them."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor | None = None

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        out = {"ids": self.ids, "positions": torch.arange(self.ids.shape[1]).expand_as(self.ids), "labels": self.labels}
        return {key: tensor.to(device) for key, tensor in out.items()}


def micro(seed: int, length: int) -> Micro:
    """Two rows, of which some positions are targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (2, length), generator=generator)
    labels = torch.randint(3, 60, (2, length), generator=generator)
    return Micro(ids, labels.masked_fill(torch.rand(2, length, generator=generator) < 0.4, -100))


MICROS = [micro(0, 7), micro(1, 19), micro(2, 3)]


def questions(pictured: bool = False) -> list[Question]:
    """Five questions, whose expected answers are those of `answers`, except that of the second."""
    pictures = [(picture(number),) if pictured and number % 2 else () for number in range(5)]
    return [
        Question((Turn("user", text, pictures=len(own)),), "?", own, where=f"rows.json:{number}")
        for number, (text, own) in enumerate(zip(SAID, pictures, strict=True))
    ]


def answers(folder: Path, asked: list[Question]) -> list[Question]:
    """The same with what a plain engine answers, except for the second."""
    requests = [Request(question.turns, question.pictures, max_gen_len=6) for question in asked]
    results = Engine(opened(folder), ONE, window=200).generate(requests)
    return [
        replace(question, answer=f" {result.text}\n" if number != 1 else "never")
        for number, (question, result) in enumerate(zip(asked, results, strict=True))
    ]


def judge(ranks: Ranks, folder: Path, asked: list[Question], options: dict[str, Any]) -> Any:
    """One validation, that a second one agrees with; dp rank 1 has one micro-batch fewer."""
    trainee, bundle = train_on(folder, ranks, Settings(**options), pictures="train_projector" in options)
    mine = MICROS[ranks.dp_rank :: ranks.dp_size]
    validation = Validation(
        trainee, bundle, ranks, batches=mine, questions=asked, zero=options.get("zero", 2), max_new_tokens=6
    )
    outcome = validation(10)
    assert validation(20) == outcome
    assert all(module.training for module in trainee.module.modules())
    return outcome


def plain_loss(folder: Path) -> float:
    """The loss per target by the formula, on one plain model."""
    model, total, count = opened(folder).model, 0.0, 0
    for batch in MICROS:
        inputs = batch.tensors(torch.device("cpu"))
        logits = model.output(model(inputs["ids"], inputs["positions"])).flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum"))
        count += int((batch.labels >= 0).sum())
    return total / count


LAYOUTS = {
    "one": (1, 1, 2),
    "dp2-zero2": (2, 1, 2),
    "dp2-zero3": (2, 1, 3),
    "tp2": (2, 2, 2),
    "dp2-tp2-zero3": (4, 2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama_qformerv2", "llama_adapter"])
def test_loss_and_answers_are_those_of_a_plain_model_on_any_ranks(kind: str, layout: str, tmp_path: Path) -> None:
    world, tp, zero = LAYOUTS[layout]
    folder = write_model(tmp_path / "model", kind)
    asked = answers(folder, questions(pictured=True))
    options = {"zero": zero, "finetuning_type": "adapter" if kind == "llama_adapter" else "full", "prefix_len": 3}
    if kind == "llama_qformerv2":
        options |= {"train_projector": "full", "train_vision": "full"}
    outcomes = (
        [judge(ONE, folder, asked, options)] if world == 1 else run_ranks(judge, world, folder, asked, options, tp=tp)
    )
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0].loss == pytest.approx(plain_loss(folder), abs=2e-6)
    assert outcomes[0].targets == sum(int((batch.labels >= 0).sum()) for batch in MICROS)
    assert (outcomes[0].exact_match, outcomes[0].asked, outcomes[0].failed) == (0.8, 5, 0)


def steps(ranks: Ranks, folder: Path, validate: bool, kind: str, zero: int, old: bool) -> list[float]:
    """Losses and gradient norms of four steps with dropout, validated before each or not."""
    if old:
        del FSDPModule.reset_iter_state
    trainee, bundle = train_on(folder, ranks, Settings(finetuning_type=kind, lora_dropout=0.3, zero=zero))
    asked = questions()[:1]  # at zero 2 one rank answers and the other does not
    validation = Validation(trainee, bundle, ranks, batches=MICROS[:1], questions=asked, zero=zero)
    optimizer = torch.optim.SGD([leaf for leaf in trainee.masters.values() if leaf.numel()], lr=0.1)
    out = []
    for step in range(4):
        if validate:
            validation(step)
        seed_step(0, step, 0, ranks.dp_rank)
        out.append(float(trainee.forward_backward(MICROS[1].tensors(ranks.device), scale=0.01, last=True)))
        out.append(float(trainee.clip(1.0)))
        optimizer.step()
        trainee.updated()
    return out


@pytest.mark.parametrize(
    ("layout", "kind", "old"),
    [
        ("one", "lora", False),
        ("dp2-zero2", "full", False),
        ("dp2-zero2", "full", True),
        ("dp2-zero3", "lora", False),
    ],
)
def test_a_training_that_is_validated_is_bitwise_the_one_that_is_not(
    layout: str, kind: str, old: bool, tmp_path: Path
) -> None:
    world, tp, zero = LAYOUTS[layout]
    folder = write_model(tmp_path / "model", "llama", sees=False)
    if world == 1:
        assert steps(ONE, folder, True, kind, zero, old) == steps(ONE, folder, False, kind, zero, old)
        return
    with_it, without = (run_ranks(steps, world, folder, yes, kind, zero, old, tp=tp) for yes in (True, False))
    assert with_it == without


def test_a_training_of_all_weights_in_bf16_is_validated_in_bf16(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    trainee, bundle = train_on(folder, ONE, Settings(), dtype=torch.bfloat16)
    outcome = Validation(trainee, bundle, ONE, batches=MICROS, questions=answers(folder, questions(True)))(1)
    assert outcome.loss == pytest.approx(plain_loss(folder), rel=0.02) and outcome.failed == 0
    assert not any(parameter.is_inference() for parameter in trainee.module.parameters())


def test_dropout_is_off_while_validating_and_on_afterwards(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", sees=False)
    trainee, bundle = train_on(folder, ONE, Settings(finetuning_type="lora", lora_dropout=0.5))
    with torch.no_grad():
        for name, leaf in trainee.masters.items():
            leaf.fill_(0.1) if "lora_b" in name else None
    validation = Validation(trainee, bundle, ONE, batches=MICROS)
    assert validation(1).loss == validation(2).loss
    assert all(module.training for module in trainee.module.modules())
    noisy = {float(trainee.forward_backward(MICROS[0].tensors(ONE.device), scale=1.0, last=True)) for _ in range(3)}
    assert len(noisy) == 3


# ---- what goes wrong


def test_a_question_that_cannot_be_asked_is_counted_and_the_others_are_answered(tmp_path: Path, caplog) -> None:
    folder = write_model(tmp_path / "model")
    asked = answers(folder, questions(pictured=True))
    asked[3] = replace(asked[3], pictures=(tmp_path / "gone.png",))
    asked[4] = replace(asked[4], turns=(Turn("user", "1" * 400),))
    trainee, bundle = train_on(folder, ONE, Settings())
    outcome = Validation(trainee, bundle, ONE, questions=asked, max_new_tokens=6)(1)
    assert (outcome.exact_match, outcome.asked, outcome.failed, outcome.loss) == (0.4, 5, 2, None)
    assert "rows.json:3" in caplog.text and "gone.png" in caplog.text and "rows.json:4" in caplog.text
    assert outcome.values() == {"eval_exact_match": 0.4}


def test_a_model_whose_logits_are_no_numbers_fails_its_questions_and_not_the_run(tmp_path: Path, caplog) -> None:
    trainee, bundle = train_on(write_model(tmp_path / "model", "llama", sees=False), ONE, Settings())
    with torch.no_grad():
        trainee.masters["norm.weight"].fill_(math.nan)
    outcome = Validation(trainee, bundle, ONE, batches=MICROS, questions=questions())(1)
    assert math.isnan(outcome.loss) and (outcome.exact_match, outcome.failed) == (0.0, 5)
    assert "got NaN" in caplog.text and not Best().update(1, outcome.loss)


class Scarce:
    """Calls a forward until memory runs out at the given calls."""

    def __init__(self, forward: Any, *calls: int) -> None:
        self.forward, self.calls, self.count = forward, calls, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.forward(*args, **kwargs)


def scarce(ranks: Ranks, folder: Path, options: dict[str, Any]) -> tuple[Any, Any, list[float]]:
    """Two validations, the first of which lacks memory on dp rank 0, then a step of training."""
    trainee, bundle = train_on(folder, ranks, Settings(**options))
    batches = MICROS[:2]
    validation = Validation(
        trainee, bundle, ranks, batches=batches, questions=questions()[:3], zero=options.get("zero", 2)
    )
    layer = trainee.module.llama.layers[1]
    plain, first = layer.forward, 2 if ranks.dp_size == 1 else 3
    if ranks.dp_rank == 0:
        layer.forward = Scarce(plain, first, first + 3)  # in a batch, and in the first answer
    outcome = validation(1)
    layer.forward = plain
    again = validation(2)
    losses = [float(trainee.forward_backward(MICROS[0].tensors(ranks.device), scale=1.0 / ranks.dp_size, last=True))]
    return outcome, again, [*losses, float(trainee.clip(1.0))]


@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_runs_out_in_validation_leaves_the_training_as_it_was(world: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", sees=False)
    found = [scarce(ONE, folder, {})] if world == 1 else run_ranks(scarce, 2, folder, {}, tp=1)
    fresh, _ = train_on(folder, ONE, Settings())
    loss = fresh.forward_backward(MICROS[0].tensors(ONE.device), scale=1.0, last=True)
    expected = [float(loss), float(fresh.clip(1.0))]
    for outcome, again, numbers in found:
        assert outcome.loss is None and outcome.failed == (3 if world == 1 else 2)
        assert again.loss is not None and again.failed == 0
        assert numbers == pytest.approx(expected, rel=1e-5)


def starve(ranks: Ranks, folder: Path) -> str:
    """What is said where memory runs out on a rank that others wait for."""
    trainee, bundle = train_on(folder, ranks, Settings(zero=3))
    validation = Validation(trainee, bundle, ranks, batches=MICROS, zero=3)
    layer = trainee.module.llama.layers[1]
    layer.forward = Scarce(layer.forward, 1)
    with pytest.raises(ValueError) as error:
        validation(1)
    return str(error.value)


def test_memory_that_runs_out_where_others_wait_ends_the_job_with_advice(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", sees=False)
    for rank, text in enumerate(run_ranks(starve, 2, folder, tp=2)):
        assert f"rank {rank} ran out of memory in batch 1 of 3" in text and "lower per_device_eval_batch_size" in text


def test_an_error_that_is_not_about_memory_is_not_swallowed(tmp_path: Path, monkeypatch) -> None:
    trainee, bundle = train_on(write_model(tmp_path / "model", "llama", sees=False), ONE, Settings())
    monkeypatch.setattr(Llama, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        Validation(trainee, bundle, ONE, batches=MICROS)(1)
    assert all(module.training for module in trainee.module.modules())


# ---- the best


def test_the_best_step_is_the_one_with_the_lowest_loss() -> None:
    best = Best()
    taken = [best.update(step, loss) for step, loss in ((10, 2.0), (20, None), (30, 1.5), (40, math.nan), (50, 1.5))]
    assert taken == [True, False, True, False, False] and (best.step, best.loss) == (30, 1.5)


def test_one_answer_is_shown_to_whoever_reads_the_log(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    folder = write_model(tmp_path / "model", "llama", sees=False)
    trainee, bundle = train_on(folder, ONE, Settings())
    Validation(trainee, bundle, ONE, questions=answers(folder, questions()), max_new_tokens=6)(7)
    assert "step 7: 'a fox' is answered" in caplog.text

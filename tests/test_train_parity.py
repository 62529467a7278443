"""Every layout of ranks and every way to save memory trains the same numbers, in fp32 on gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainee_toys import ONE, PERCEIVES, SEES, SIZES, Case, train, whole

from accessory.dist import Ranks
from spawn import run_ranks

FULL = Case()
SGD = Case(settings={"optim": "sgd"}, lr=0.1)
METHODS = {
    "full, packed": Case(packed=True),
    "full, tied": Case(config={"tied": True, "qkv_bias": True}),
    "lora": Case(settings={"finetuning_type": "lora", "lora_alpha": 8.0}, packed=True),
    "norm and bias": Case(settings={"finetuning_type": "norm_bias"}),
    "norm, bias and lora": Case(settings={"finetuning_type": "norm_bias_lora"}),
    "adapter": Case(settings={"finetuning_type": "adapter", "use_prefix_new_gate": True}),
    "freeze": Case(settings={"finetuning_type": "freeze", "freeze_trainable_layers": 1}),
    "lora on nf4": Case(settings={"finetuning_type": "lora", "quantization_bit": 4}, quant=True),
    "pictures": Case(config=SEES, settings={"train_vision": "full"}, pictures=True),
    "pictures, lora everywhere": Case(
        config=SEES,
        settings={"finetuning_type": "lora", "train_projector": "lora", "train_vision": "lora"},
        pictures=True,
    ),
    "pictures in the prompt": Case(
        config=PERCEIVES, settings={"finetuning_type": "adapter", "train_vision": "full"}, pictures=True
    ),
}


def on_rank(ranks: Ranks, case: Case) -> Any:
    """What one rank computes."""
    return train(ranks, case)


def check(case: Case, ranks: int, *, tp: int = 1, **changes: Any) -> None:
    """The case on several ranks against one rank with accumulation: losses, gradients, weights.

    NF4 rounds slices, not whole weights: there the reference has the same tensor-parallel size.
    """
    alone = case.but(accumulation=ranks // tp)
    references = run_ranks(on_rank, tp, alone, tp=tp) if case.quant and tp > 1 else [train(ONE, alone)]
    found = run_ranks(on_rank, ranks, case.but(**changes), tp=tp)
    compare(found, references, weights=case.settings.get("optim") == "sgd")


def compare(found: list[Any], references: list[Any], *, weights: bool = False) -> None:
    """Losses, gradients of the first step, weights within 1e-5; norms to 1e-4 of themselves, and equal on all ranks."""
    for one in found:
        assert one.losses == pytest.approx(references[0].losses, abs=1e-5)
        assert one.norms == found[0].norms, "every rank must know the same norm"
        assert one.norms == pytest.approx(references[0].norms, rel=1e-4, abs=1e-5)
    grads, expected = whole([one.grads for one in found]), whole([one.grads for one in references])
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert expected[name].any(), f"{name} has no gradient: it proves nothing"
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    last, wanted = (whole([one.weights for one in side]) if weights else {} for side in (found, references))
    for name, weight in last.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_two_data_parallel_ranks_equal_one_that_accumulates(method: str) -> None:
    check(METHODS[method], 2, trainee={"zero": 2})


@pytest.mark.parametrize("method", METHODS)
def test_data_and_tensor_parallel_together_equal_one_rank(method: str) -> None:
    check(METHODS[method], 4, tp=2, trainee={"zero": 3})


@pytest.mark.parametrize("method", ["full, packed", "full, tied", "norm, bias and lora", "adapter"])
def test_weights_gathered_layer_by_layer_or_once_a_step_give_the_same_bits(method: str) -> None:
    case = METHODS[method].but(accumulation=2)
    once, layers = (run_ranks(on_rank, 2, case.but(trainee={"zero": zero}), tp=1) for zero in (2, 3))
    for one, other in zip(once, layers, strict=True):
        assert one.losses == other.losses and one.norms == other.norms
    grads, expected = (whole([one.grads for one in found]) for found in (once, layers))
    assert grads.keys() == expected.keys() and all(torch.equal(grad, expected[name]) for name, grad in grads.items())


@pytest.mark.parametrize("method", ["full, packed", "norm, bias and lora", "pictures"])
def test_two_tensor_parallel_ranks_equal_one(method: str) -> None:
    check(METHODS[method], 2, tp=2)


@pytest.mark.parametrize("method", ["full, packed", "norm, bias and lora", "adapter"])
def test_ranks_that_hold_the_same_keys_and_values_equal_one_rank(method: str) -> None:
    check(METHODS[method], 4, tp=4)


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_with_plain_descent_the_weights_agree_too(method: str, ranks: int, tp: int) -> None:
    check(Case(settings={"optim": "sgd", "finetuning_type": method}, lr=0.1, packed=True), ranks, tp=tp)


@pytest.mark.parametrize("saved", [{"checkpointing": "full"}, {"checkpointing": "selective"}, {"offload": True}])
@pytest.mark.parametrize("method", ["full, packed", "lora", "adapter", "pictures"])
def test_saving_memory_changes_nothing(method: str, saved: dict[str, Any]) -> None:
    case = METHODS[method]
    compare([train(ONE, case.but(trainee=saved))], [train(ONE, case)])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_with_plain_descent_saving_memory_leaves_the_same_weights(method: str) -> None:
    case = Case(settings={"optim": "sgd", "finetuning_type": method}, lr=0.1, packed=True)
    compare([train(ONE, case.but(trainee={"checkpointing": "full"}))], [train(ONE, case)], weights=True)


@pytest.mark.parametrize("saved", [{"checkpointing": "full"}, {"checkpointing": "selective"}, {"offload": True}])
@pytest.mark.parametrize("method", ["full, packed", "norm, bias and lora"])
def test_saving_memory_on_four_ranks_changes_nothing(method: str, saved: dict[str, Any]) -> None:
    check(METHODS[method].but(steps=5), 4, tp=2, trainee={**saved, "zero": 3})


def test_dropout_is_the_same_when_it_is_computed_again() -> None:
    case = Case(settings={"finetuning_type": "lora", "lora_dropout": 0.3}, steps=5)
    dropped = train(ONE, case)
    compare([train(ONE, case.but(trainee={"checkpointing": "full"}))], [dropped])
    assert dropped.losses[1] != pytest.approx(train(ONE, case.but(settings={"finetuning_type": "lora"})).losses[1])


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_dropout_in_the_tower_is_the_same_when_it_is_computed_again(checkpointing: str) -> None:
    settings = {"finetuning_type": "lora", "train_vision": "lora", "lora_dropout": 0.3}
    case = Case(config=SEES, settings=settings, pictures=True, steps=3)
    compare([train(ONE, case.but(trainee={"checkpointing": checkpointing}))], [train(ONE, case)])


def test_dropout_before_cut_outputs_is_the_same_on_tensor_parallel_ranks() -> None:
    settings = {"finetuning_type": "lora", "lora_dropout": 0.3, "lora_target": ["wq", "wv", "w1", "w3"]}
    check(Case(settings=settings, steps=5), 2, tp=2)


def test_a_loss_in_chunks_is_the_plain_one(monkeypatch) -> None:
    from accessory.model import head

    expected = train(ONE, FULL)
    monkeypatch.setattr(head, "CHUNK", 5 * SIZES["vocab_size"])
    compare([train(ONE, FULL)], [expected])

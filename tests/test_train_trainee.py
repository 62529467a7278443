"""Masters and 16-bit copies, loss scaling, pieces that join to whole tensors, packed rows, validation in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainee_toys import LENGTH, ONE, PERCEIVES, SEES, Case, Trained, batches, one_step, toy, train, whole

from accessory.dist import Ranks
from accessory.train.optim import load_optimizer, make_optimizer, optimizer_pieces
from accessory.train.trainee import Trainee, seed_step
from spawn import run_ranks

BF16 = Case(dtype=torch.bfloat16)


def trainee_of(case: Case, ranks: Ranks = ONE) -> Trainee:
    model, parts = toy(case, ranks.shard)
    return Trainee(model, parts, ranks, dtype=case.dtype, **case.trainee)


# ---- 16 bits


def test_updates_too_small_for_bf16_are_not_lost() -> None:
    trainee = trainee_of(BF16)
    leaf = trainee.masters["layers.0.attention.wq.weight"]
    copy = trainee.module.llama.layers[0].attention.wq.weight
    before, seen = leaf.detach().clone(), copy.detach().clone()
    for _ in range(100):
        with torch.no_grad():
            leaf.add_(1e-5)
        trainee.updated()
    assert copy.dtype == torch.bfloat16 and leaf.dtype == torch.float32
    torch.testing.assert_close(leaf.detach(), before + 1e-3, atol=5e-6, rtol=0)
    assert (copy != seen).any(), "a hundred of them move a 16-bit weight"
    assert torch.equal(copy, leaf.to(torch.bfloat16))


def test_gradients_of_micro_batches_are_added_in_fp32() -> None:
    trainee = trainee_of(BF16)
    grads = []
    for micro in (0, 1, 2):
        trainee.forward_backward(batches(BF16, 0, micro), scale=0.1, last=True)
        trainee.clip(0)
        grads.append({name: leaf.grad.clone() for name, leaf in trainee.masters.items()})
        trainee.updated()
    for micro in (0, 1, 2):
        trainee.forward_backward(batches(BF16, 0, micro), scale=0.1, last=micro == 2)
    trainee.clip(0)
    for name, leaf in trainee.masters.items():
        assert torch.equal(leaf.grad, grads[0][name] + grads[1][name] + grads[2][name]), name
        assert trainee.module.llama.get_parameter(name).grad is None, "16-bit gradients are freed at once"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_learn_nearly_as_fp32_does(dtype: torch.dtype) -> None:
    exact, found = train(ONE, Case()), train(ONE, Case(dtype=dtype))
    assert found.losses == pytest.approx(exact.losses, abs=0.05) and found.losses != exact.losses


def test_frozen_weights_stay_in_the_dtype_of_computation_and_lora_is_mastered_in_fp32() -> None:
    case = BF16.but(settings={"finetuning_type": "lora"})
    trainee = trainee_of(case)
    optimizer = make_optimizer(trainee, case.as_settings())
    losses = [one_step(trainee, optimizer, case, step) for step in range(3)]
    assert losses == pytest.approx(train(ONE, case.but(dtype=torch.float32, steps=3)).losses, abs=0.05)
    assert {p.dtype for p in trainee.module.parameters()} == {torch.bfloat16}
    assert {leaf.dtype for leaf in trainee.masters.values()} == {torch.float32}


def mixed_on_rank(ranks: Ranks, case: Case) -> Any:
    """Losses, the dtype of computation inside a block, and those of masters."""
    trainee = trainee_of(case, ranks)
    seen = set()
    attention = trainee.module.llama.layers[0].attention
    attention.register_forward_hook(lambda module, given, out: seen.add((module.wq.weight.dtype, out.dtype)))
    optimizer = make_optimizer(trainee, case.as_settings())
    losses = [one_step(trainee, optimizer, case, step) for step in range(5)]
    return losses, seen, {leaf.dtype for leaf in trainee.masters.values()}


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_in_bf16_learn_nearly_as_one(kind: str, zero: int) -> None:
    case = BF16.but(settings={"finetuning_type": kind}, trainee={"zero": zero})
    expected = train(ONE, case.but(accumulation=2, steps=5, trainee={})).losses
    for losses, seen, masters in run_ranks(mixed_on_rank, 2, case, tp=1):
        assert losses == pytest.approx(expected, abs=0.02)
        assert seen == {(torch.bfloat16, torch.bfloat16)} and masters == {torch.float32}


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale() -> None:
    case = Case(dtype=torch.float16)
    trainee = trainee_of(case)
    trainee.restore({"scale": 2.0**40, "good": 7, "skipped": 0})
    optimizer = make_optimizer(trainee, case.as_settings())
    before = {name: leaf.detach().clone() for name, leaf in trainee.masters.items()}
    result = Trained([], [], {}, {})
    one_step(trainee, optimizer, case, 1, result)
    assert result.norms == [0.0] and trainee.skipped == 1 and trainee.state()["scale"] == 2.0**39
    assert all(torch.equal(leaf, before[name]) for name, leaf in trainee.masters.items())
    for _ in range(40):
        one_step(trainee, optimizer, case, 1, result)
    assert 0 < result.norms[-1] < 100 and any((leaf != before[n]).any() for n, leaf in trainee.masters.items())


def test_at_the_lowest_scale_what_is_no_number_is_told() -> None:
    trainee = trainee_of(Case(dtype=torch.float16))
    trainee.restore({"scale": 1.0, "good": 0, "skipped": 0})
    with torch.no_grad():
        trainee.masters["norm.weight"][0] = float("nan")
    trainee.updated()
    trainee.forward_backward(batches(Case(), 0, 0), scale=1.0, last=True)
    assert torch.isnan(trainee.clip(1.0))


# ---- gradients


def test_clipping_leaves_the_wanted_norm_and_tells_the_one_before() -> None:
    trainee = trainee_of(Case())
    trainee.forward_backward(batches(Case(), 0, 0), scale=1.0, last=True)
    norm = trainee.clip(0.5)
    left = torch.stack([leaf.grad.norm() for leaf in trainee.masters.values()]).norm()
    assert norm > 1 and left.item() == pytest.approx(0.5, rel=1e-4)


def test_a_step_without_targets_is_safe() -> None:
    trainee = trainee_of(Case(config=SEES, pictures=True, settings={"train_vision": "full"}))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    total = trainee.forward_backward({"ids": ids, "positions": ids, "labels": ids - 100}, scale=1.0, last=True)
    assert total == 0 and trainee.clip(1.0) == 0
    assert all((leaf.grad == 0).all() for leaf in trainee.masters.values())


def test_text_alone_teaches_a_projector_nothing() -> None:
    settings = {"finetuning_type": "frozen", "train_projector": "full"}
    trainee = trainee_of(Case(config=SEES, pictures=True, settings=settings))
    total = trainee.forward_backward(batches(Case(), 0, 0), scale=1.0, last=True)
    assert total > 0 and trainee.clip(1.0) == 0


def nothing_on_rank(ranks: Ranks, case: Case) -> list[float]:
    """Steps in which the second rank has no row, and one in which nobody has a target."""
    trainee = trainee_of(case, ranks)
    empty = torch.zeros(1, 1, dtype=torch.int64)
    nothing = {"ids": empty, "positions": empty, "labels": empty - 100}
    norms = []
    for mine in (ranks.dp_rank == 0, False):
        batch = batches(case, 0, 0) if mine else nothing
        trainee.forward_backward(batch, scale=1.0, last=True)
        norms.append(float(trainee.clip(0)))
        trainee.updated()
    return norms


def test_a_rank_without_rows_keeps_in_step() -> None:
    case = Case(config=SEES, pictures=True, settings={"train_vision": "full"})
    alone = trainee_of(case)
    alone.forward_backward(batches(case, 0, 0), scale=1.0, last=True)
    for norms in run_ranks(nothing_on_rank, 2, case, tp=1):
        assert norms == pytest.approx([float(alone.clip(0)), 0.0], rel=1e-5)


def test_random_numbers_follow_from_seed_step_micro_batch_and_rank() -> None:
    def drawn(*numbers: int) -> float:
        seed_step(*numbers)
        return torch.rand(()).item()

    first = drawn(1, 2, 3, 4)
    assert first == drawn(1, 2, 3, 4)
    assert len({first, drawn(0, 2, 3, 4), drawn(1, 0, 3, 4), drawn(1, 2, 0, 4), drawn(1, 2, 3, 0)}) == 5


# ---- packing


def test_a_packed_loss_is_the_token_weighted_mean_of_the_unpacked_ones() -> None:
    case = Case(packed=True)
    batch = batches(case, 0, 0)
    packed, count = trainee_of(case).module(**batch)
    total, targets = 0.0, 0
    module = trainee_of(case).module
    for row, segments in enumerate(batch["segments"]):
        for segment in segments[segments > 0].unique():
            own = (segments == segment).nonzero()[:, 0]
            one = {name: batch[name][row : row + 1, own] for name in ("ids", "positions", "labels")}
            loss, n = module(**one)
            total, targets = total + loss.item(), targets + int(n)
    assert targets == int(count) and packed.item() / count.item() == pytest.approx(total / targets, abs=1e-6)


def test_changing_one_packed_document_changes_no_bit_of_its_neighbour() -> None:
    batch = batches(Case(packed=True), 0, 0)
    llama = trainee_of(Case()).module.llama

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = llama(ids, batch["positions"], segments=batch["segments"])
        return llama.output(hidden)[0]

    changed = batch["ids"].clone()
    changed[0, :5] = (changed[0, :5] + 11) % 60
    first, second = logits(batch["ids"]), logits(changed)
    assert torch.equal(first[5:], second[5:]) and not torch.equal(first[:5], second[:5])


# ---- pieces


def state_on_rank(ranks: Ranks, case: Case) -> Any:
    """Two steps, then every piece of this rank: masters, frozen tensors and the optimiser's."""
    trainee, optimizer = train(ranks, case, keep=True).trainee
    sets = {"model": trainee.pieces(), "frozen": trainee.frozen_pieces(), "optim": optimizer_pieces(optimizer, trainee)}
    return {
        kind: {name: (piece.box, piece.tensor.clone(), piece.mine) for name, piece in pieces.items()}
        for kind, pieces in sets.items()
    }


def resumed_on_rank(ranks: Ranks, case: Case, saved: dict[str, Any], steps: int) -> list[float]:
    """A fresh trainee takes up whole tensors and goes on."""
    trainee = trainee_of(case, ranks)
    optimizer = make_optimizer(trainee, case.as_settings())

    def cut(pieces: dict[str, Any], kind: str) -> list[tuple[str, torch.Tensor]]:
        return [
            (name, saved[kind][name][tuple(slice(a, b) for a, b in zip(p.box.start, p.box.stop, strict=True))])
            for name, p in pieces.items()
        ]

    trainee.load(cut(trainee.pieces(), "model"))
    load_optimizer(optimizer, trainee, cut(optimizer_pieces(optimizer, trainee), "optim"))
    return [one_step(trainee, optimizer, case, case.steps + step) for step in range(steps)]


@pytest.mark.parametrize(("ranks", "tp", "zero"), [(2, 2, 2), (2, 1, 3), (4, 2, 2), (4, 4, 2)])
def test_pieces_join_to_the_tensors_of_one_rank(ranks: int, tp: int, zero: int) -> None:
    case = Case(settings={"finetuning_type": "norm_bias_lora"}, steps=2)
    expected = state_on_rank(ONE, case.but(accumulation=ranks // tp))
    found = run_ranks(state_on_rank, ranks, case.but(trainee={"zero": zero}), tp=tp)
    for kind, pieces in expected.items():
        joined, same = whole([one[kind] for one in found]), whole([pieces])
        assert joined.keys() == same.keys()
        for name, tensor in joined.items():
            atol = 0 if kind == "frozen" else 1e-3 if kind == "optim" else 1e-4
            torch.testing.assert_close(tensor, same[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "sgd"])
@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 1)), ((2, 1), (2, 2)), ((1, 1), (2, 1))])
def test_a_run_goes_on_in_another_layout(kind: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    case = Case(settings={"optim": kind}, steps=3, lr=1e-2)
    micros = 2  # of a global step, however many ranks share them

    def at(place: tuple[int, int]) -> Case:
        return case.but(accumulation=micros * place[1] // place[0])

    unbroken = train(ONE, case.but(steps=6, accumulation=micros)).losses
    states = run_ranks(state_on_rank, before[0], at(before), tp=before[1])
    saved = {name: whole([one[name] for one in states]) for name in ("model", "optim")}
    tolerance = 1e-2 if kind == "adamw_8bit" else 1e-5
    for losses in run_ranks(resumed_on_rank, after[0], at(after), saved, 3, tp=after[1]):
        assert losses == pytest.approx(unbroken[3:], abs=tolerance)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "sgd", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_goes_on_in_the_same_layout_has_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    sizes = {"dim": 64, "hidden_dim": 160}  # large enough for 8-bit state
    case = Case(config=sizes, settings={"optim": kind, "weight_decay": 0.1}, steps=3, dtype=dtype, lr=1e-2)
    unbroken = train(ONE, case.but(steps=6)).losses
    state = state_on_rank(ONE, case)
    saved = {name: whole([state[name]]) for name in ("model", "optim")}
    assert resumed_on_rank(ONE, case, saved, 3) == unbroken[3:]


def test_quantised_storage_is_in_no_piece() -> None:
    trainee = trainee_of(Case(settings={"finetuning_type": "lora"}, quant=True))
    assert set(trainee.frozen_pieces()) == {
        "tok_embeddings.weight",
        "norm.weight",
        "output.weight",
        *(f"layers.{layer}.{norm}.weight" for layer in (0, 1) for norm in ("attention_norm", "ffn_norm")),
    }


# ---- validation in between


def judged_on_rank(ranks: Ranks, case: Case) -> Any:
    """Validation loss and generated ids before, between and after steps, and the losses of those."""
    from accessory.model import Sampling, sample

    trainee = trainee_of(case, ranks)
    optimizer = make_optimizer(trainee, case.as_settings())
    out = []
    for step in range(3):
        with trainee.judging() as llama:
            losses = [float(trainee.loss(batches(case, 99, micro))[0]) for micro in (0, 1)]
            with torch.inference_mode():
                cache = llama.new_cache(rows=1, size=LENGTH)
                ids, chosen = torch.tensor([[1, 2, 3]]), []
                if llama.prompt is not None:
                    llama.prompt.store(llama, cache, torch.tensor([0]))
                for at in range(4):
                    positions = torch.arange(at and at + 2, at + 3)[None]
                    logits = llama.output(llama(ids, positions, cache=cache)[:, -1])
                    ids = sample(logits, [Sampling()], [at + 3])[None]
                    chosen.append((int(ids), round(logits.max().item(), 3)))
        out += [losses, chosen, one_step(trainee, optimizer, case, step)]
    return out


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("case", [Case(lr=1e-2), Case(settings={"finetuning_type": "adapter"}, lr=1e-2)])
def test_validation_between_steps_sees_the_new_weights_and_disturbs_nothing(case: Case, zero: int) -> None:
    expected = judged_on_rank(ONE, case.but(accumulation=2))
    plain = train(ONE, case.but(accumulation=2, steps=3)).losses
    assert expected[2::3] == pytest.approx(plain, abs=1e-6)
    assert expected[0] != expected[3] != expected[6]
    for found in run_ranks(judged_on_rank, 2, case.but(trainee={"zero": zero}), tp=1):
        for one, other in zip(found, expected, strict=True):
            assert torch.tensor(one).flatten().tolist() == pytest.approx(
                torch.tensor(other).flatten().tolist(), abs=2e-3
            )


def test_pictures_for_a_prompt_must_be_one_per_row() -> None:
    case = Case(config=PERCEIVES, settings={"finetuning_type": "adapter"}, pictures=True)
    batch = {**batches(case, 0, 0), "slots": None}
    with pytest.raises(ValueError, match="1 pictures for 2 rows"):
        trainee_of(case).module(**batch)

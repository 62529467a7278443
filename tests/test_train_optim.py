"""Optimisers over parts, their groups, the schedule, what blocks keep and compile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trainee_toys import ONE, SEES, Case, batches, one_step, toy, train

from accessory.dist import Ranks
from accessory.train.muon import Muon
from accessory.train.optim import make_optimizer
from accessory.train.schedule import lr_factor, warmup_steps
from accessory.train.settings import Settings
from accessory.train.trainee import Trainee
from spawn import run_ranks


def prepared(case: Case, ranks: Ranks = ONE) -> tuple[Trainee, Any]:
    model, parts = toy(case, ranks.shard)
    trainee = Trainee(model, parts, ranks, dtype=case.dtype, **case.trainee)
    return trainee, make_optimizer(trainee, case.as_settings())


# ---- optimisers


def test_norms_biases_and_rows_of_numbers_have_no_decay_and_parts_have_their_own_rates() -> None:
    settings = {"weight_decay": 0.1, "projector_lr": 5e-3, "train_vision": "full", "vision_lr": 7e-4}
    trainee, optimizer = prepared(Case(config={**SEES, "qkv_bias": True}, settings=settings, pictures=True))
    names = {leaf: name for name, leaf in trainee.masters.items()}
    seen = {}
    for group in optimizer.param_groups:
        for leaf in group["params"]:
            seen[names[leaf]] = (group["lr"], group["weight_decay"])
    assert seen.keys() == trainee.masters.keys()
    assert seen["layers.0.attention.wq.weight"] == (3e-4, 0.1) and seen["tok_embeddings.weight"] == (3e-4, 0.1)
    for name in ("norm.weight", "layers.1.ffn_norm.weight", "layers.0.attention.wq.bias"):
        assert seen[name] == (3e-4, 0.0)
    assert seen["vision.proj.0.weight"] == (5e-3, 0.1) and seen["vision.proj.1.weight"] == (5e-3, 0.0)
    assert seen["vision.start"] == (5e-3, 0.0)
    assert seen["vision.tower.blocks.0.mlp.fc1.weight"] == (7e-4, 0.1)
    assert seen["vision.tower.blocks.0.norm1.weight"] == (7e-4, 0.0)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "sgd", "muon"])
def test_every_optimiser_learns_one_batch_by_heart(optim: str) -> None:
    lr = 0.5 if optim == "sgd" else 1e-2
    trainee, optimizer = prepared(Case(settings={"optim": optim, "finetuning_type": "norm_bias_lora"}, lr=lr))
    losses = []
    for _ in range(15):
        batch = batches(Case(), 0, 0)
        losses.append(float(trainee.forward_backward(batch, scale=1 / 17, last=True)) / 17)
        trainee.clip(1.0)
        optimizer.step()
        trainee.updated()
    assert losses[-1] < losses[0] - 0.5


def test_adamw_follows_the_formula() -> None:
    case = Case(settings={"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9}, lr=1e-2)
    trainee, optimizer = prepared(case)
    leaf = trainee.masters["layers.0.attention.wq.weight"]
    weight, m, v = leaf.detach().double(), 0.0, 0.0
    for step in range(1, 4):
        trainee.forward_backward(batches(case, step, 0), scale=1 / 17, last=True)
        trainee.clip(0)
        g = leaf.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        weight = weight * (1 - 1e-3) - 1e-2 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        optimizer.step()
        trainee.updated()
    torch.testing.assert_close(leaf.detach().double(), weight, atol=1e-6, rtol=0)


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    trainee, optimizer = prepared(Case(settings={"optim": "muon"}))
    muon, adamw = optimizer.both
    names = {leaf: name for name, leaf in trainee.masters.items()}
    hidden = {names[leaf] for group in muon.param_groups for leaf in group["params"]}
    assert hidden == {f"layers.{i}.{n}.weight" for i in (0, 1) for n in LINEARS}
    rest = {names[leaf] for group in adamw.param_groups for leaf in group["params"]}
    assert rest == trainee.masters.keys() - hidden


LINEARS = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")] + [f"feed_forward.w{i}" for i in (1, 2, 3)]


def muon_on_rank(ranks: Ranks) -> str:
    with pytest.raises(ValueError) as error:
        prepared(Case(settings={"optim": "muon"}), ranks)
    return str(error.value)


@pytest.mark.parametrize("tp", [1, 2])
def test_muon_on_several_ranks_is_refused(tp: int) -> None:
    for text in run_ranks(muon_on_rank, 2, tp=tp):
        assert text.startswith("optim: got muon with") and text.endswith("take adamw")


# ---- schedule


def factors(total: int, **settings: Any) -> list[float]:
    return [lr_factor(step, total, Settings(**settings)) for step in range(total)]


def test_the_rate_rises_in_equal_parts_from_above_zero() -> None:
    rising = factors(20, warmup_steps=4, lr_scheduler_type="constant")
    assert rising[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(rising[4:]) == {1.0}
    assert warmup_steps(30, Settings(warmup_ratio=0.1)) == 3 and warmup_steps(31, Settings(warmup_ratio=0.1)) == 4


def test_a_cosine_falls_to_its_floor() -> None:
    falling = factors(100, warmup_steps=10, min_lr_ratio=0.1)
    assert falling[10] == 1.0 and falling[55] == pytest.approx(0.55) and 0.1 < falling[99] < 0.101
    assert lr_factor(100, 100, Settings(min_lr_ratio=0.1)) == pytest.approx(0.1)
    assert falling[10:] == sorted(falling[10:], reverse=True)


def test_a_line_falls_evenly() -> None:
    assert factors(4, lr_scheduler_type="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_wsd_stays_at_the_peak_until_the_last_share() -> None:
    shape = factors(100, lr_scheduler_type="wsd", decay_ratio=0.2, warmup_steps=5)
    assert set(shape[5:81]) == {1.0} and shape[90] == pytest.approx(0.5) and shape[99] == pytest.approx(0.05)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_short_runs_have_sane_rates(kind: str, total: int) -> None:
    for warmup in (0, 1, total, 2 * total):
        found = factors(total, lr_scheduler_type=kind, warmup_steps=warmup)
        assert all(0 < factor <= 1 and math.isfinite(factor) for factor in found)


# ---- what blocks keep


def kept(checkpointing: str) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and how often wq's block was run until its end."""
    trainee, _ = prepared(Case(trainee={"checkpointing": checkpointing}, config={"n_layers": 4}))
    parameters = {p.data_ptr() for p in trainee.module.parameters()}
    runs, kept = [], {}
    trainee.module.llama.layers[0].attention.register_forward_hook(lambda *_: runs.append(1))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total, _ = trainee.module(**batches(Case(), 0, 0))
    total.backward()
    return sum(kept.values()), len(runs)


def test_checkpointing_keeps_less_and_computes_again() -> None:
    (everything, once), (_, twice), (inputs, again) = kept("none"), kept("selective"), kept("full")
    assert once == 1 and twice == again == 2
    assert inputs < 0.4 * everything


def test_selective_checkpointing_multiplies_once() -> None:
    def products(checkpointing: str) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        trainee, _ = prepared(Case(trainee={"checkpointing": checkpointing}))
        with FlopCounterMode(display=False) as counter:
            trainee.forward_backward(batches(Case(), 0, 0), scale=1.0, last=True)
        counts = counter.get_flop_counts()["Global"]
        return sum(flops for op, flops in counts.items() if "bmm" not in str(op))

    assert products("none") == products("selective") < 0.9 * products("full")


def test_names_stay_as_they_were() -> None:
    plain, _ = prepared(Case())
    for checkpointing in ("selective", "full"):
        trainee, _ = prepared(Case(trainee={"checkpointing": checkpointing, "compile": True}))
        assert list(trainee.masters) == list(plain.masters)
        assert list(trainee.module.state_dict()) == list(plain.module.state_dict())


def compiled_on_rank(ranks: Ranks, case: Case) -> Any:
    return train(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize(
    "case", [Case(packed=True, steps=3), Case(settings={"finetuning_type": "norm_bias_lora"}, steps=3)]
)
def test_compiled_blocks_compute_the_same(case: Case, checkpointing: str) -> None:
    expected = train(ONE, case)
    found = train(ONE, case.but(trainee={"compile": True, "checkpointing": checkpointing}))
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (2, 2)])
def test_compiled_blocks_compute_the_same_on_two_ranks(ranks: int, tp: int) -> None:
    case = Case(steps=3)
    expected = train(ONE, case.but(accumulation=ranks // tp)).losses
    for one in run_ranks(compiled_on_rank, ranks, case.but(trainee={"compile": True}), tp=tp, timeout=240):
        assert one.losses == pytest.approx(expected, abs=1e-5)


def test_an_adapter_is_not_compiled_and_says_so(caplog) -> None:
    case = Case(settings={"finetuning_type": "adapter"}, trainee={"compile": True})
    trainee, optimizer = prepared(case)
    assert "torch_compile: not with an adapter" in caplog.text
    one_step(trainee, optimizer, case, 0)


def test_muon_in_batches_updates_as_torchs_does() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (16, 48), (48, 16), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(leaf.detach().clone()) for leaf in ours]
    both = [
        Muon([{"params": ours, "lr": 1e-2, "weight_decay": 0.1}]),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in both:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=0)  # one bf16 step of an update of 1e-2

"""Weights reordered for a CPU's bf16 products: the same answers, from any kind of model, and what cannot be is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_toys import ONE, picture, write_model

from accessory import native
from accessory.assemble import Bundle, open_model
from accessory.dist import Ranks
from accessory.engine import Engine, Request, Result
from accessory.quant import repack, settle
from spawn import run_ranks

KINDS = {
    "llava": {},
    "llama_qformerv2": {"qkv_bias": True},
    "llama_adapter": {"tied": True},
    "llama_qformerv2_peft": {},
}


@pytest.fixture(params=["ours", "oneDNN"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose order the weights are brought into."""
    if request.param == "ours" and not native.available():
        pytest.skip("no kernels of our own here")
    if request.param == "oneDNN":
        monkeypatch.setattr("accessory.quant.repacked.available", lambda: False)
    return request.param


def opened(folder: Path, ranks: Ranks = ONE, **options) -> Bundle:
    return open_model([folder], ranks=ranks, dtype=torch.bfloat16, **options)


def answers(bundle: Bundle, ranks: Ranks = ONE, **options) -> list[Result] | None:
    """Ragged, with and without a picture, more than there are rows."""
    with Engine(bundle, ranks, rows=3, window=160, **options) as engine:
        if not ranks.leader:
            return engine.follow()
        texts = ["a", "what is it? the lazy dog", "hello world " * 4, "the fox"]
        asked = [Request(text, template="none", max_gen_len=10) for text in texts]
        return engine.generate([*asked, Request("what?", pictures=[picture(1)], template="none", max_gen_len=10)])


def logits(bundle: Bundle, rows: int) -> torch.Tensor:
    ids = torch.arange(rows * 5).view(rows, 5) % 50 + 3
    with torch.inference_mode():
        return bundle.model.output(bundle.model(ids, torch.arange(5).expand(rows, 5)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_within_what_bf16_tells_apart(kind: str, order: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", kind, **KINDS[kind])
    plain, exact = opened(folder), open_model([folder], ranks=ONE, dtype=torch.float32)
    for rows in (1, 2, 16, 40):
        expected, own = logits(plain, rows), logits(exact, rows)
        bundle = opened(folder)
        assert repack(bundle.model, rows=3)
        assert (logits(bundle, rows) - expected).abs().max() <= 2 * (expected - own).abs().max()
    assert not any(name.endswith(("wq.weight", "w2.weight")) for name in bundle.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "llama_adapter"])
def test_an_engine_answers_with_them(kind: str, order: str, tmp_path: Path) -> None:
    bundle = opened(write_model(tmp_path / "model", kind))
    before = answers(bundle)
    repack(bundle.model, rows=3)
    after = answers(bundle)
    assert [result.finish for result in after] == [result.finish for result in before]
    same = sum(one.ids == other.ids for one, other in zip(before, after, strict=True))
    assert same >= 4, "of five answers one may have met a tie in bf16"


@pytest.mark.slow
def test_two_ranks_answer_with_them(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    results = run_ranks(_job, 2, folder)[0]
    assert all(len(result.ids) == 10 or result.finish == "stop" for result in results)
    assert results == run_ranks(_job, 2, folder)[0]


def _job(ranks: Ranks, folder: Path) -> list[Result] | None:
    bundle = opened(folder, ranks)
    assert repack(bundle.model, rows=3)
    return answers(bundle, ranks, deterministic=True)


@pytest.mark.skipif(not native.available(), reason="no kernels of our own here")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_as_they_arrive_weights_are_those_that_are_packed_afterwards(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", kind, **KINDS[kind])
    after, arriving = opened(folder), opened(folder, answers=True)
    assert all(linear.weight is None for linear in arriving.model.linears().values())
    for bundle in (after, arriving):
        settle(bundle.model, rows=1)
    assert torch.equal(logits(after, 3), logits(arriving, 3))


def test_one_row_keeps_a_plain_weight_where_only_onednn_is_there(tmp_path: Path, monkeypatch) -> None:
    model = opened(write_model(tmp_path / "model", sees=False, kind="llama")).model
    monkeypatch.setattr("accessory.quant.repacked.available", lambda: False)
    assert not repack(model, rows=1) and model.layers[0].attention.wq.weight is not None
    assert repack(model, rows=2) and model.layers[0].attention.wq.weight is None


def test_other_dtypes_and_quantised_layers_stay_as_they_are(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", sees=False, kind="llama")
    assert not repack(open_model([folder], ranks=ONE, dtype=torch.float32).model, rows=3)
    quantised = opened(folder, quant=True)
    storage = quantised.model.layers[0].attention.wq.storage
    assert repack(quantised.model, rows=3) and quantised.model.layers[0].attention.wq.storage is storage


@pytest.mark.slow
def test_the_compiled_step_multiplies_with_them(order: str, tmp_path: Path) -> None:
    bundle = opened(write_model(tmp_path / "model", endless=True))
    repack(bundle.model, rows=3)
    plain, compiled = answers(bundle), answers(bundle, compiled=True)
    assert sum(one.ids == other.ids for one, other in zip(plain, compiled, strict=True)) >= 4

"""Deterministic mode: a result depends on its request alone, bit by bit, whoever shares the batch or came before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_toys import ONE, picture, write_model
from torch import Tensor

from accessory.assemble import Bundle, open_model
from accessory.dist import Ranks
from accessory.engine import Engine, Request, Result
from accessory.model import Sampling
from spawn import run_ranks

ASKED = "what is it? the lazy dog and then some human said hello to the quick brown fox " * 2
OTHERS = ["a", "hello world " * 9, "the fox", ASKED + "hello", ASKED[:90] + "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"dim": 160, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 416}
    return write_model(tmp_path_factory.mktemp("wide") / "model", endless=True, **sizes)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def bundle(request: pytest.FixtureRequest, folder: Path) -> Bundle:
    return open_model([folder], ranks=ONE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[request.param])


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 24, **options})


def engine_of(bundle: Bundle, **options) -> Engine:
    return Engine(bundle, ONE, rows=5, window=250, prefill_chunk=32, deterministic=True, **options)


def spied(engine: Engine, request: Request, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, Tensor]:
    """A request's result and the logits of each of its choices."""
    kept, accept = [], engine._accept

    def keep(ready: list, logits: Tensor) -> list:
        kept.extend(row for running, row in zip(ready, logits, strict=True) if running.answer.request is request)
        return accept(ready, logits)

    monkeypatch.setattr(engine, "_accept", keep)
    return engine.generate([request])[0], torch.stack(kept)


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_logits_are_the_same_bits_in_any_company(bundle, monkeypatch, place):
    request = raw(ASKED, pictures=[picture(1)], sampling=Sampling(temperature=1.5, seed=3))
    alone, expected = spied(engine_of(bundle), request, monkeypatch)
    engine = engine_of(bundle)
    for number, text in enumerate(OTHERS[:place]):
        engine.submit(raw(text, max_gen_len=30 + 7 * number, pictures=[picture(number)] if number == 1 else []))
        for _ in range(3 * number):
            engine.step()
    result, logits = spied(engine, request, monkeypatch)
    assert torch.equal(logits, expected) and result == alone


def test_logits_are_the_same_bits_after_a_shared_beginning(bundle, monkeypatch):
    request = raw(ASKED)
    expected = spied(engine_of(bundle, reuse=False), request, monkeypatch)[1]
    engine = engine_of(bundle)
    engine.generate([raw(text) for text in OTHERS])
    result, logits = spied(engine, request, monkeypatch)
    assert torch.equal(logits, expected)
    assert result.cached and result.cached % 32 == 0


def test_all_at_once_and_one_by_one_are_equal(bundle):
    requests = [raw(text, sampling=Sampling(temperature=1.0, top_p=0.9, seed=n)) for n, text in enumerate(OTHERS)]
    together = engine_of(bundle).generate(requests)
    assert together == [engine_of(bundle).generate([request])[0] for request in requests]


def test_two_ranks_are_deterministic_too(folder: Path) -> None:
    alone, among = run_ranks(_job, 2, folder)[0]
    assert alone == among


def _job(ranks: Ranks, folder: Path) -> tuple[Result, Result] | None:
    bundle = open_model([folder], ranks=ranks, dtype=torch.float32)
    with Engine(bundle, ranks, rows=3, window=250, prefill_chunk=32, deterministic=True) as engine:
        if not ranks.leader:
            return engine.follow()
        request = raw(ASKED, sampling=Sampling(temperature=1.0, seed=1))
        alone = engine.generate([request])[0]
        for text in OTHERS[:2]:
            engine.submit(raw(text, max_gen_len=60))
        engine.step()
        return alone, engine.generate([request])[0]

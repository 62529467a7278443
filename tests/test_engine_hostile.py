"""What would break an engine: poisoned requests, cancelled ones, pictures that look alike, rows that are not alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_toys import ONE, opened, picture, write_model
from llava_toys import NEXT
from llava_toys import write_model as write_llava
from PIL import Image
from torch import Tensor

from accessory.assemble import Bundle, open_model
from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request, Result
from accessory.engine.choose import Choice
from accessory.engine.text import AnswerText
from accessory.engine.worker import Worker
from accessory.model import Llama, Sampling
from accessory.quant import repack
from spawn import run_ranks

LONG = "what is it? the lazy dog and then some human said hello to the fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sees") / "model", endless=True)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return opened(folder)


@pytest.fixture
def two_threads() -> Iterator[None]:
    known = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(known)


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 8, **options})


def ended(engine: Engine, *requests: Request) -> list[Result]:
    """The results, be they errors."""
    answers = [engine.submit(request) for request in requests]
    while not engine.idle:
        engine.step()
    return [answer.result for answer in answers if answer.result is not None]


@pytest.mark.parametrize("pictures", [[], [picture(1)]])
def test_what_a_cancelled_prompt_left_is_right_or_not_taken(bundle, pictures):
    engine = Engine(bundle, ONE, rows=1, prefill_chunk=24)
    request = raw(LONG, pictures=pictures)
    expected = Engine(bundle, ONE, reuse=False).generate([request])
    answer = engine.submit(request)
    engine.step()
    engine.cancel(answer)
    assert not engine._worker._features
    assert engine.generate([request]) == expected


def test_features_of_pictures_go_when_their_prompt_ends_long_behind_them(bundle):
    engine = Engine(bundle, ONE, rows=2, prefill_chunk=8)
    engine.generate([raw(LONG, pictures=[picture(1)])])
    assert not engine._worker._features


def test_blank_pictures_of_two_sizes_do_not_share_what_their_margins_make_of_them(tmp_path):
    bundle = opened(write_llava(tmp_path / "next", NEXT))
    blank = [Image.new("RGB", size) for size in ((190, 110), (190, 120))]
    engine = Engine(bundle, ONE, rows=1)
    prompts = [engine.prepare(raw("a", pictures=[image])) for image in blank]
    assert torch.equal(*(prompt.pixels for prompt in prompts)) and not torch.equal(
        *(prompt.order for prompt in prompts)
    )
    assert not set(prompts[0].keys[prompts[0].keys < 0]) & set(prompts[1].keys[prompts[1].keys < 0])


def test_logits_that_are_no_numbers_end_their_own_answer_alone(bundle, monkeypatch):
    engine = Engine(bundle, ONE, rows=3)
    requests = [raw(text, max_gen_len=6) for text in ("the fox", "a dog", "hello")]
    expected = Engine(bundle, ONE, rows=3).generate(requests)
    forward = Worker._forward

    def poisoned(self: Worker, op: object) -> Tensor | None:
        logits = forward(self, op)
        if logits is not None and len(logits) == 3 and op.ids.shape[1] == 1:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(Worker, "_forward", poisoned)
    results = ended(engine, *requests)
    assert [results[0], results[2]] == [expected[0], expected[2]]
    assert results[1].finish == "error" and "choose bf16 or fp32" in results[1].error
    monkeypatch.undo()
    assert engine.generate(requests) == expected and len(engine._rows.free) == 3


@pytest.mark.parametrize("place", ["push", "finish"])
def test_text_that_fails_ends_its_own_answer_alone(bundle, monkeypatch, place):
    engine = Engine(bundle, ONE, rows=2)
    requests = [raw("the fox"), raw("a dog")]
    expected = engine.generate(requests)[1]
    answers = [engine.submit(request) for request in requests]
    engine.step()
    bad = next(running.prompt.text for running in engine._running.values() if running.answer is answers[0])
    method = getattr(AnswerText, place)

    def failing(self: AnswerText, *given: object, **more: object) -> str:
        if self is bad:
            raise RuntimeError("no such piece")
        return method(self, *given, **more)

    monkeypatch.setattr(AnswerText, place, failing)
    while not engine.idle:
        engine.step()
    assert answers[0].result.finish == "error" and "no such piece" in answers[0].result.error
    assert answers[1].result == expected and len(engine._rows.free) == 2


def test_a_request_that_cannot_begin_ends_alone(bundle, monkeypatch):
    engine = Engine(bundle, ONE, rows=1)
    make = Choice.__init__

    def failing(self: Choice, request: Request, *given: object, **more: object) -> None:
        if request.client == "bad":
            raise TypeError("no number")
        make(self, request, *given, **more)

    monkeypatch.setattr(Choice, "__init__", failing)
    bad, fine = ended(engine, raw("a", client="bad"), raw("a"))
    assert (bad.finish, bad.error, fine.finish) == ("error", "TypeError: no number", "length")


def test_an_answer_that_could_not_go_on_is_an_error_to_who_waits_for_its_text(bundle, monkeypatch):
    monkeypatch.setattr(Choice, "push", lambda *_: (_ for _ in ()).throw(ValueError("it broke")))
    with pytest.raises(ValueError, match="it broke"):
        Engine(bundle, ONE).generate([raw("a")])
    with pytest.raises(ValueError, match="it broke"):
        list(Engine(bundle, ONE).stream(raw("a")))


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(bundle):
    engine = Engine(bundle, ONE, rows=2, prefill_chunk=8)
    long = engine.submit(raw("hello " * 30, max_gen_len=1))
    engine.step()
    short = engine.submit(raw("a", max_gen_len=1))
    for _ in range(3):
        engine.step()
    assert short.result is not None and long.result is None


def test_after_a_failure_inside_a_score_the_leader_speaks_no_more(bundle, monkeypatch):
    engine, sent = Engine(bundle, ONE, rows=1), []

    class Line:
        send = staticmethod(sent.append)

    engine._wire = Line()
    with pytest.raises(RuntimeError, match="lost"), monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("lost")))
        engine.logits([1, 2, 3])
    assert len(sent) == 1


# ---- the compiled step


def job(ranks: Ranks, folder: Path) -> str:
    with pytest.raises(ValueError, match="compiled: got true on 2 ranks") as caught:
        Engine(opened(folder, ranks), ranks, rows=2, compiled=True)
    return str(caught.value)


def test_what_cannot_be_compiled_is_refused_at_the_start_in_one_sentence(folder):
    first, second = run_ranks(job, 2, folder)
    assert first == second and "\n" not in first
    with pytest.raises(ValueError, match="compiled: got true for NF4 weights"):
        Engine(open_model([folder], ranks=ONE, dtype=torch.float32, quant=True), ONE, rows=2, compiled=True)


def test_a_machine_that_cannot_compile_is_told_so_in_one_sentence(bundle, monkeypatch):
    def compile_(run: object, **_: object) -> object:
        def step(*_: object) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nfor C++")

        return step

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(ValueError, match=r"where torch cannot compile \(no compiler\), expected"):
        Engine(bundle, ONE, rows=2, compiled=True)


# ---- deterministic mode


def steady(bundle: Bundle, *, rows: int = 5, **options) -> Engine:
    return Engine(bundle, ONE, window=200, rows=rows, prefill_chunk=32, deterministic=True, **options)


@pytest.fixture(scope="module", params=["fp32", "bf16", "reordered"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    sizes = {"dim": 160, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 416}
    folder = write_model(tmp_path_factory.mktemp("wide") / "model", endless=True, **sizes)
    bundle = open_model([folder], ranks=ONE, dtype=torch.float32 if request.param == "fp32" else torch.bfloat16)
    if request.param == "reordered":
        repack(bundle.model, rows=2)
    return bundle


def bits(engine: Engine, request: Request, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The logits of each choice of a request."""
    kept, accept = [], engine._accept

    def keep(ready: list, logits: Tensor) -> list:
        kept.extend(row for running, row in zip(ready, logits, strict=True) if running.answer.request is request)
        return accept(ready, logits)

    monkeypatch.setattr(engine, "_accept", keep)
    engine.generate([request])
    return torch.stack(kept)


def test_every_row_gives_the_same_bits_on_two_threads(wide, monkeypatch, two_threads):
    engine, request = steady(wide, reuse=False), raw(LONG, max_gen_len=3)
    expected, others = bits(engine, request, monkeypatch), []
    while len(engine._rows.free) > 1:
        others.append(engine.submit(raw(f"hello {len(others)}", max_gen_len=150)))
        engine.step()
        assert torch.equal(bits(engine, request, monkeypatch), expected), len(others)


def test_a_picture_before_another_is_the_same_bits_whoever_showed_it_first(wide, monkeypatch):
    first = Turn("user", LONG, pictures=1)
    turns = [first, Turn("assistant", "a fox"), Turn("user", "now?", pictures=1)]
    two = Request(turns, pictures=[picture(1), picture(2)], max_gen_len=4)
    expected = bits(steady(wide), two, monkeypatch)
    engine = steady(wide)
    engine.generate([Request([first], pictures=[picture(1)], max_gen_len=4)])
    assert torch.equal(bits(engine, two, monkeypatch), expected)
    again = replace(two)
    assert torch.equal(bits(engine, again, monkeypatch), expected)
    assert engine.stats.cached_tokens >= 32


@pytest.mark.slow
def test_four_ranks_are_deterministic_in_any_row(tmp_path: Path) -> None:
    sizes = {"dim": 160, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 416}
    alone, among = run_ranks(_among, 4, write_model(tmp_path / "model", "llama", sees=False, endless=True, **sizes))[0]
    assert alone == among


def _among(ranks: Ranks, folder: Path) -> tuple | None:
    bundle = open_model([folder], ranks=ranks, dtype=torch.float32)
    with Engine(bundle, ranks, rows=6, window=200, prefill_chunk=32, deterministic=True) as engine:
        if not ranks.leader:
            return engine.follow()
        request = raw(LONG, max_gen_len=20, logprobs=2, sampling=Sampling(temperature=1.0, seed=1))
        alone = engine.generate([request])[0].odds
        for number in range(engine.rows - 1):
            engine.submit(raw(f"hello {number}", max_gen_len=150))
            engine.step()
        return alone, engine.generate([request])[0].odds

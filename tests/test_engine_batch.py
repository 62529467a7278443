"""One engine, many requests: nobody's answer depends on who shares the batch, on chunks or on when it joined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_toys import ONE, opened, picture, write_model
from torch import Tensor

from accessory.assemble import Bundle
from accessory.data.template import Turn
from accessory.engine import Engine, Request, Result
from accessory.engine.worker import Forward, Worker
from accessory.model import Sampling

PROMPTS = ["the fox", "a", "what is it? the lazy dog and then some human", "hello world " * 6, ""]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("sees") / "model"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("adapter") / "model", "llama_adapter"))


class Recorder:
    """Keeps the logits of every choice, by answer."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, list[Tensor]] = {}
        accept = engine._accept

        def kept(ready: list, logits: Tensor) -> list:
            for running, row in zip(ready, logits, strict=True):
                self.logits.setdefault(running.answer.id, []).append(row)
            return accept(ready, logits)

        monkeypatch.setattr(engine, "_accept", kept)

    def of(self, number: int) -> Tensor:
        return torch.stack(self.logits[number])


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 8, **options})


def mixed() -> list[Request]:
    """Ragged requests with no, one and two pictures."""
    plain = [raw(text) for text in PROMPTS]
    turns = [Turn("user", "what", pictures=1), Turn("assistant", "a fox"), Turn("user", "and then", pictures=1)]
    two = Request(turns, pictures=[picture(2), picture(3)], max_gen_len=6)
    return [*plain, raw("what is it?", pictures=[picture(1)]), two]


def alone(bundle: Bundle, request: Request, **options) -> Result:
    return Engine(bundle, ONE, rows=1, **options).generate([request])[0]


def test_a_ragged_batch_gives_the_ids_and_logits_of_the_prompts_alone(bundle, monkeypatch):
    engine = Engine(bundle, ONE)
    together = Recorder(engine, monkeypatch)
    results = engine.generate(mixed())
    for number, (request, result) in enumerate(zip(mixed(), results, strict=True)):
        single = Engine(bundle, ONE, rows=1)
        recorder = Recorder(single, monkeypatch)
        assert single.generate([request]) == [result]
        torch.testing.assert_close(together.of(number), recorder.of(0), atol=1e-5, rtol=0)
    assert len({tuple(result.ids) for result in results}) == len(results)


def test_prefill_and_decode_equal_one_forward(bundle, monkeypatch):
    engine = Engine(bundle, ONE)
    recorder = Recorder(engine, monkeypatch)
    request = raw("the quick brown", max_gen_len=12)
    result = engine.generate([request])[0]
    ids = torch.tensor([[*engine._prompter(request).ids, *result.ids]])
    with torch.inference_mode():
        hidden = bundle.model(ids, torch.arange(ids.shape[1])[None])
        whole = bundle.model.output(hidden)[0, result.prompt_tokens - 1 : -1]
    torch.testing.assert_close(recorder.of(0), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_chunked_prefill_equals_a_whole_one_also_inside_a_picture(bundle, monkeypatch, chunk):
    whole, pieces = Engine(bundle, ONE), Engine(bundle, ONE, prefill_chunk=chunk)
    expected, got = Recorder(whole, monkeypatch), Recorder(pieces, monkeypatch)
    assert whole.generate(mixed()) == pieces.generate(mixed())
    for number in range(len(mixed())):
        torch.testing.assert_close(got.of(number), expected.of(number), atol=1e-5, rtol=0)


def test_requests_join_and_leave_at_any_step(bundle):
    engine = Engine(bundle, ONE, rows=3, prefill_chunk=4)
    lengths = [9, 2, 5, 7, 1, 4, 3]
    requests = [replace(request, max_gen_len=n) for request, n in zip(mixed(), lengths, strict=True)]
    answers = []
    for request in requests:
        answers.append(engine.submit(request))
        engine.step()
        engine.step()
    while not engine.idle:
        engine.step()
    for request, answer in zip(requests, answers, strict=True):
        assert answer.result == alone(bundle, request) and answer.result.finish == "length"


def test_rows_with_holes_are_padded_or_picked_and_give_the_same(bundle, monkeypatch):
    forms = set()
    run = Worker.run

    def watched(self: Worker, op: object) -> Tensor | None:
        if isinstance(op, Forward) and op.ids.shape[1] == 1:
            forms.add((op.rows is None, bool((op.positions < 0).any())))
        return run(self, op)

    monkeypatch.setattr(Worker, "run", watched)
    lengths = [2, 3, 4, 5, 20, 20]
    requests = [raw(f"hello {n} {i}", max_gen_len=n) for i, n in enumerate(lengths)]
    results = Engine(bundle, ONE, rows=6).generate(requests)
    assert {(True, False), (True, True), (False, False)} <= forms
    for request, result in zip(requests, results, strict=True):
        assert result == alone(bundle, request)


def test_a_long_prompt_does_not_stop_those_who_speak(bundle):
    engine = Engine(bundle, ONE, prefill_chunk=2)
    talker = engine.submit(raw("a", max_gen_len=30))
    while not talker.ids:
        engine.step()
    newcomer = engine.submit(raw("the quick brown fox jumps over the lazy dog " * 3))
    before = len(talker.ids)
    while not newcomer.ids:
        engine.step()
    assert len(talker.ids) - before > 10


def test_a_seed_decides_a_sampled_answer_whoever_shares_the_batch(bundle):
    hot = [raw("the", sampling=Sampling(temperature=1.5, seed=seed)) for seed in (1, 2)]
    both = Engine(bundle, ONE).generate([*hot, raw("a fox")])[:2]
    assert both == [alone(bundle, request) for request in hot] and both[0].ids != both[1].ids


def test_a_repetition_penalty_pushes_away_ids_of_prompt_and_answer(bundle):
    plain = raw("the lazy dog", max_gen_len=40)
    strong = replace(plain, sampling=Sampling(repetition_penalty=100.0))
    batch = Engine(bundle, ONE).generate([plain, strong])
    ids = batch[1].ids
    assert len(set(ids)) == len(ids) > len(set(batch[0].ids))
    assert not set(ids) & set(bundle.tokenizer.encode("the lazy dog"))
    assert batch == [alone(bundle, plain), alone(bundle, strong)]


def test_every_row_of_an_adapter_has_the_prompt_of_its_own_picture(adapter, monkeypatch):
    requests = [raw("what", pictures=[picture(5)]), raw("what"), raw("what", pictures=[picture(6)])]
    engine = Engine(adapter, ONE, rows=2)
    recorder = Recorder(engine, monkeypatch)
    results = engine.generate(requests)
    assert [alone(adapter, request) for request in requests] == results
    assert len({result.prompt_tokens for result in results}) == 1
    first = torch.stack([recorder.of(number)[0] for number in range(3)])
    assert torch.pdist(first).min() > 1e-3, "each has its own prompt"


def test_a_picture_matters_and_takes_its_slots(bundle):
    blind, one, other = Engine(bundle, ONE).generate(
        [raw("what is it?"), *(raw("what is it?", pictures=[picture(seed)]) for seed in (1, 2))]
    )
    assert one.ids != other.ids and one.ids != blind.ids
    assert one.prompt_tokens == blind.prompt_tokens + bundle.model.vision.slots


def test_pictures_come_from_paths_bytes_and_images_alike(bundle, tmp_path: Path):
    path = tmp_path / "noise.png"
    picture(4).save(path)
    results = Engine(bundle, ONE).generate(
        [raw("what", pictures=[source]) for source in (path, str(path), path.read_bytes(), picture(4))]
    )
    assert all(result == results[0] for result in results)


def test_an_empty_batch_has_no_results(bundle):
    assert Engine(bundle, ONE).generate([]) == []


def test_requests_of_different_templates_share_a_batch(bundle):
    requests = [Request("hello", template=name, max_gen_len=5) for name in ("alpaca", "dialog", "llama2", "none")]
    results = Engine(bundle, ONE).generate(requests)
    assert results == [alone(bundle, request) for request in requests]
    assert len({result.prompt_tokens for result in results}) == 4

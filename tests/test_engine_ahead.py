"""Lookup decoding: the answers are those of the plain steps, token by token, and a text that repeats takes fewer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from api_server import inside
from engine_toys import ONE, opened, picture, write_model
from torch import Tensor

from accessory import native
from accessory.assemble import Bundle, open_model
from accessory.dialect.words import ModelWords, ServingWords
from accessory.dist import Ranks
from accessory.engine import Engine, Event, Grammar, Request, Result, ahead
from accessory.engine.ahead import FEW, look_up
from accessory.engine.worker import Forget, Forward, Worker
from accessory.model import Sampling
from accessory.quant import settle
from accessory.serve.budget import open_serving
from accessory.serve.chat import main as chat
from accessory.serve.opening import open_engine
from spawn import run_ranks

LONG = "hello world the fox hello world the fox hello world the"
FEW_WORDS = dict.fromkeys((100, 110, 120, 130), 30.0)
"""A bias towards four tokens, so that what is drawn often repeats, and often not."""
LIST = '{"type": "array", "items": {"enum": ["fox", "the"]}, "minItems": 9, "maxItems": 12}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sees") / "model", endless=True)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return opened(folder)


def raw(text: str = LONG, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 60, **options})


ASKED = {
    "greedy": raw(),
    "drawn": raw(sampling=Sampling(temperature=0.9, seed=3), logit_bias=FEW_WORDS, logprobs=1),
    "filtered": raw(sampling=Sampling(1.5, top_p=0.9, top_k=3, min_p=0.05, seed=4), logit_bias=FEW_WORDS),
    "penalties": raw(sampling=Sampling(0.5, frequency_penalty=0.02, presence_penalty=0.1), logit_bias=FEW_WORDS),
    "repetition": raw(sampling=Sampling(repetition_penalty=1.02), logit_bias=FEW_WORDS, max_gen_len=90),
    "json": raw(grammar=Grammar("json_schema", LIST), max_gen_len=120),
    "odds": raw("the", logprobs=3),
    "picture": raw("what is it? what is it?", pictures=[picture(1)]),
    "short": raw("a", max_gen_len=1),
    "two": raw("a fox", max_gen_len=2),
}


def ended(engine: Engine, requests: list[Request]) -> tuple[list[Result], list[Event]]:
    """Results, and all events in their order."""
    answers, events = [engine.submit(request) for request in requests], list[Event]()
    while not engine.idle:
        events += engine.step()
    results = [answer.result for answer in answers]
    assert all(result is not None and result.finish != "error" for result in results)
    return results, events


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> dict[str, Result]:
    """The answers to ASKED without proposals."""
    return dict(zip(ASKED, ended(Engine(bundle, ONE, rows=3), list(ASKED.values()))[0], strict=True))


def alike(one: Result, two: Result) -> bool:
    """Whether all is the same, odds but for the rounding of other shapes."""
    for left, right in zip(one.odds, two.odds, strict=True):
        assert left.token == right.token and left.logprob == pytest.approx(right.logprob, abs=1e-4)
        assert [token for token, _ in left.top] == [token for token, _ in right.top]
    return replace(one, odds=[]) == replace(two, odds=[])


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_alone_is_the_one_without_proposals(bundle, plain, name):
    engine = Engine(bundle, ONE, rows=1, speculate=6)
    assert alike(ended(engine, [ASKED[name]])[0][0], plain[name])
    assert (engine.stats.accepted_tokens > 0) == (name not in ("short", "two"))


@pytest.mark.parametrize("rows", [3, 8])
def test_ragged_answers_together_are_those_without_proposals_and_every_token_is_an_event(bundle, plain, rows):
    engine = Engine(bundle, ONE, rows=rows, prefill_chunk=16, speculate=4)
    results, events = ended(engine, list(ASKED.values()))
    assert all(alike(one, two) for one, two in zip(results, plain.values(), strict=True))
    for result in results:
        mine = [event for event in events if event.answer.ids is result.ids]
        assert [event.token for event in mine] == result.ids and "".join(event.text for event in mine) == result.text
        assert [event.result is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    stats = engine.stats
    assert 0 < stats.accepted_tokens < stats.proposed_tokens, "some proposals are wrong"
    assert stats.generated_tokens == sum(len(result.ids) for result in results)


def test_a_text_that_repeats_takes_fewer_steps(bundle):
    slow, fast = Engine(bundle, ONE, rows=1), Engine(bundle, ONE, rows=1, speculate=8)
    assert slow.generate([ASKED["greedy"]]) == fast.generate([ASKED["greedy"]])
    assert slow.stats.answer_steps == 59 and slow.stats.proposed_tokens == 0
    assert fast.stats.answer_steps == 59 - fast.stats.accepted_tokens < 30


@pytest.mark.parametrize("length", [1, 4])
def test_a_stop_string_across_tokens_ends_the_answer_where_it_does_without_proposals(bundle, plain, length):
    text = plain["greedy"].text
    for start in range(len(text) // 2, len(text) // 2 + 6):
        asked = raw(stops=[text[start : start + length]])
        assert Engine(bundle, ONE, speculate=8).generate([asked]) == Engine(bundle, ONE).generate([asked])


def test_a_stop_id_among_the_proposals_ends_the_answer(bundle, plain):
    ids = plain["greedy"].ids
    for token in dict.fromkeys(ids[8:]):
        asked = raw(stop_ids=[token])
        result = Engine(bundle, ONE, speculate=8).generate([asked])[0]
        assert result.ids == ids[: ids.index(token)] and result.finish == "stop"


@pytest.mark.parametrize(
    ("kind", "sees", "more"), [("llama_adapter", True, {}), ("llama", False, {"sliding_window": 9})]
)
def test_an_adapter_and_a_sliding_window_answer_as_without_proposals(tmp_path, kind, sees, more):
    other = opened(write_model(tmp_path / "model", kind, sees=sees, endless=True, **more))
    asked = [raw(), raw("the fox the fox", pictures=[picture(2)] if sees else []), raw("a")]
    engine = Engine(other, ONE, rows=3, speculate=5)
    assert engine.generate(asked) == Engine(other, ONE, rows=3).generate(asked) and engine.stats.accepted_tokens > 9


def on_rank(ranks: Ranks, folder: Path, speculate: int) -> tuple[list[Result], int] | None:
    with Engine(opened(folder, ranks), ranks, rows=2, speculate=speculate) as engine:
        if not ranks.leader:
            return engine.follow()
        return engine.generate([ASKED[name] for name in ("greedy", "drawn", "picture")]), engine.stats.accepted_tokens


def test_two_ranks_answer_as_without_proposals(folder):
    (results, accepted), other = run_ranks(on_rank, 2, folder, 6)
    assert all(alike(*pair) for pair in zip(results, on_rank(ONE, folder, 0)[0], strict=True))
    assert accepted > 20 and other is None


def test_nothing_is_proposed_beyond_an_answers_limit_nor_fed_beyond_few_tokens(bundle, monkeypatch):
    fed: list[Forward] = []
    monkeypatch.setattr(Worker, "run", lambda self, op, run=Worker.run: fed.append(op) or run(self, op))
    for limit in (1, 2, 3, 9, 500):
        fed.clear()
        engine = Engine(bundle, ONE, rows=1, window=80, speculate=50)
        result = engine.generate([raw(max_gen_len=limit)])[0]
        assert len(result.ids) == min(limit, 80 - result.prompt_tokens) and result.finish == "length"
        tried = [op for op in fed if isinstance(op, Forward) and op.whole]
        assert max((op.extent for op in tried), default=0) < result.prompt_tokens + len(result.ids)
        assert all(1 < op.ids.numel() <= FEW for op in tried) and bool(tried) == (limit > 3)
    many = Engine(bundle, ONE, rows=FEW // 2 + 1, speculate=4)
    many.generate([raw()] * (FEW // 2 + 1))
    assert many.stats.proposed_tokens == 0


def test_an_answer_that_is_cancelled_leaves_a_row_like_any_other(bundle, plain):
    engine = Engine(bundle, ONE, rows=1, speculate=6)
    answer = engine.submit(ASKED["greedy"])
    while len(answer.ids) < 20:
        engine.step()
    result = engine.cancel(answer)
    assert result.ids == plain["greedy"].ids[: len(result.ids)] and engine.idle and engine.stats.accepted_tokens
    assert engine.generate([ASKED["picture"]])[0] == plain["picture"]


def test_what_is_held_of_a_speculated_answer_is_shared_as_that_of_any_other(bundle):
    said = []
    for most in (0, 6):
        engine = Engine(bundle, ONE, rows=2, speculate=most)
        first = engine.generate([ASKED["repetition"]])[0]
        again = raw("", ids=[*engine.prepare(ASKED["repetition"]).ids, *first.ids, 7, 8, 9])
        said.append(engine.generate([again])[0])
        assert said[-1].cached == first.prompt_tokens + len(first.ids) - 1, "all but the last token was fed"
    assert said[0] == said[1] == Engine(bundle, ONE, reuse=False).generate([again])[0]
    assert engine.stats.accepted_tokens > 20


# ---- what are no numbers


@pytest.fixture
def poison(tmp_path: Path) -> tuple[Bundle, int]:
    """A model that knows a token, one that it does not say, by no numbers."""
    bundle = opened(write_model(tmp_path / "model", "llama", sees=False, endless=True))
    said = {*FEW_WORDS, *Engine(bundle, ONE).generate([raw()])[0].ids}
    token = next(token for token in range(30, 200) if token not in said)
    return bundle, token


def test_a_proposal_that_is_no_number_fails_nobody_and_leaves_nothing_behind(poison, monkeypatch):
    bundle, token = poison
    asked = [raw(), raw("a", sampling=Sampling(temperature=1.0, seed=1), logit_bias=FEW_WORDS)]
    expected = Engine(bundle, ONE, rows=2).generate(asked)
    bundle.model.tok_embeddings.weight.data[token] = torch.nan
    ops: list[Forget] = []
    monkeypatch.setattr(Worker, "run", lambda self, op, run=Worker.run: ops.append(op) or run(self, op))
    find = ahead.look_up
    monkeypatch.setattr(
        ahead, "look_up", lambda said, most: find(said, most) if len(said) % 5 else [*find(said, most), token][-most:]
    )
    engine = Engine(bundle, ONE, rows=2, speculate=4)
    assert engine.generate(asked) == expected and engine.generate(asked) == expected
    assert sum(isinstance(op, Forget) for op in ops) > 4 and engine.stats.accepted_tokens > 9
    cache = engine._worker.cache
    assert all(tensor[:, :, : cache.size].isfinite().all() for tensor in (*cache.keys, *cache.values))


def test_an_answer_whose_own_logits_are_no_numbers_ends_alone_as_without_proposals(bundle, plain, monkeypatch):
    engine = Engine(bundle, ONE, rows=2, speculate=4)
    answers = [engine.submit(ASKED["greedy"]), engine.submit(ASKED["drawn"])]
    while min(len(answer.ids) for answer in answers) < 20:
        engine.step()
    forward = Worker._forward

    def poisoned(self: Worker, op: Forward) -> Tensor | None:
        logits = forward(self, op)
        logits[: len(logits) // 2] = torch.nan
        return logits

    monkeypatch.setattr(Worker, "_forward", poisoned)
    engine.step()
    monkeypatch.undo()
    while not engine.idle:
        engine.step()
    assert answers[0].result.finish == "error" and "got NaN" in answers[0].result.error
    assert alike(answers[1].result, plain["drawn"]) and engine.generate([ASKED["greedy"]])[0] == plain["greedy"]


# ---- the lookup


@pytest.mark.parametrize(
    ("said", "most", "found"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], 1, [9]),  # three tokens before two
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, [5]),  # the newest of equals
        ([7, 2, 3, 8, 6, 2, 3], 3, [8, 6, 2]),
        ([1, 2, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # in a circle
        ([5, 5, 5], 3, [5, 5, 5]),
        ([1, 2, 3, 4, 5], 4, []),
        ([3, 1, 2, 3], 4, []),  # one token is too few
        ([1, 2], 4, []),
        ([1], 4, []),
        ([-1, -1, -1, 4, -1, -1], 4, []),  # pictures are alike to nothing
        ([1, 2, -1, -1, 5, 1, 2], 4, []),
        ([1, 2, 3, -1, 5, 1, 2], 4, [3]),
    ],
)
def test_what_followed_the_newest_tokens_before_is_found(said, most, found):
    assert look_up(np.array(said), most) == found


# ---- the words


def test_what_excludes_proposals_is_said_in_one_sentence(bundle, tmp_path, capsys):
    with pytest.raises(ValueError, match="speculate: got -1, expected 0"):
        Engine(bundle, ONE, speculate=-1)
    with pytest.raises(ValueError, match="speculate: got 4 with deterministic"):
        Engine(bundle, ONE, speculate=4, deterministic=True)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    grown = opened(write_model(tmp_path / "model", "llama", sees=False, rope_scaling=scaling))
    with pytest.raises(ValueError, match="speculate: got 4 for a model of dynamic rope_scaling"):
        Engine(grown, ONE, speculate=4)
    with pytest.raises(ValueError, match="speculate: got 4 with infer_backend vllm"):
        open_engine(ModelWords(infer_backend="vllm"), bundle, ONE, rows=1, orientation="keep", speculate=4)
    with pytest.raises(ValueError, match="speculate: got -2"):
        chat(["--speculate", "-2"])
    with pytest.raises(ValueError, match="speculate: got -2"):
        ServingWords(speculate=-2).check_serving()


def test_the_word_reaches_the_servers_engine_and_metrics_count(bundle):
    engine = open_serving(ModelWords(), ServingWords(speculate=5, max_concurrent=2), bundle, ONE)
    engine.generate([raw()])
    assert engine.stats.accepted_tokens > 9
    with inside(bundle) as server:
        text = server.get("/metrics").text
    assert "accessory_engine_proposed_tokens_total 0.0" in text and "engine_accepted_tokens_total" in text


@pytest.mark.slow
def test_a_compiled_engine_speculates_too(bundle, plain):
    engine = Engine(bundle, ONE, rows=3, compiled=True, speculate=4)
    results = ended(engine, list(ASKED.values()))[0]
    assert all(alike(one, two) for one, two in zip(results, plain.values(), strict=True))
    assert engine.stats.accepted_tokens > 20


@pytest.mark.skipif(not native.available(), reason="no kernels of our own here, whose rows do not depend on each other")
def test_with_kernels_of_our_own_bf16_answers_with_up_to_seven_proposals_are_the_same_to_the_last_bit(tmp_path):
    sizes = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 192, "endless": True}
    folder = write_model(tmp_path / "model", "llama", sees=False, **sizes)
    bundle = open_model([folder], ranks=ONE, dtype=torch.bfloat16, answers=True)
    settle(bundle.model, rows=3)
    asked = [raw(logprobs=3), raw("a fox " * 9, logprobs=3), ASKED["drawn"], ASKED["json"]]
    engine = Engine(bundle, ONE, rows=3, speculate=7)
    assert engine.generate(asked) == Engine(bundle, ONE, rows=3).generate(asked)
    assert engine.stats.accepted_tokens > 50

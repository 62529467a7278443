"""vLLM behind the verbs: the same ids as our engine's, its parameters, its outputs as our results.

A stand-in with vLLM's interface computes the answers, by our own model: what comes back must be what our engine says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_toys import ONE, opened, picture, write_model
from test_llava_folder import write as write_llava
from vllm_toys import LLMEngine, Logprob, install

from accessory.data.template import Turn
from accessory.dialect.words import ModelWords
from accessory.engine import Engine, Grammar, QueueFull, Request, WindowError
from accessory.model import Sampling
from accessory.serve.opening import open_bundle, open_engine, start_ranks
from accessory.serve.service import Service
from accessory.serve.vllm import VllmEngine, collapse, odds_of, parameters, structured

TALK = [Turn("system", "be brief"), Turn("user", "hello"), Turn("assistant", "ho"), Turn("user", "and then")]
ASKED = [
    Request("hello world", template="llama2", max_gen_len=9),
    Request(TALK, template="llama2", max_gen_len=14),
    Request("the quick brown", template="none", max_gen_len=5, logprobs=3),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    return write_model(home / "model", "llama", sees=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[LLMEngine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    return install(monkeypatch)


@pytest.fixture
def words(folder: Path) -> ModelWords:
    return ModelWords(model_name_or_path=[str(folder)], infer_backend="vllm", precision="fp32", device="cpu")


@pytest.fixture
def engine(started: list[LLMEngine], words: ModelWords) -> Iterator[VllmEngine]:
    with opened_by(words) as made:
        yield made


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[Engine]:
    with Engine(opened(folder), ONE, rows=4) as made:
        yield made


def opened_by(words: ModelWords, **more: object) -> VllmEngine:
    """The engine as every verb opens it."""
    ranks = start_ranks(words)
    made = open_engine(words, open_bundle(words, ranks), ranks, rows=4, orientation="keep", **more)
    assert isinstance(made, VllmEngine)
    return made


def finished(engine: VllmEngine | Engine, requests: list[Request]) -> list[object]:
    answers = [engine.submit(request) for request in requests]
    while not engine.idle:
        engine.step()
    return [answer.result for answer in answers]


def test_answers_are_those_of_our_engine_from_the_same_ids(engine: VllmEngine, own: Engine, started) -> None:
    found, wanted = finished(engine, ASKED), finished(own, ASKED)
    for one, two in zip(found, wanted, strict=True):
        assert (one.text, one.ids, one.finish, one.prompt_tokens) == (two.text, two.ids, two.finish, two.prompt_tokens)
    assert [p["prompt_token_ids"] for p in started[0].prompts] == [own.prepare(request).ids for request in ASKED]
    assert engine.length(ASKED[1]) == own.length(ASKED[1]) and engine.describe(ASKED[1]) == own.describe(ASKED[1])
    assert engine.idle and sum(engine.stats.finished.values()) == 3


def test_logprobs_are_the_models_own(engine: VllmEngine, own: Engine) -> None:
    (one,), (two,) = finished(engine, ASKED[2:]), finished(own, ASKED[2:])
    assert [odds.token for odds in one.odds] == one.ids and len(one.odds) == 5
    for left, right in zip(one.odds, two.odds, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
        assert [token for token, _ in left.top] == [token for token, _ in right.top] and len(left.top) == 3


def test_no_table_is_no_odds_and_a_token_beyond_the_likeliest_keeps_its_own() -> None:
    assert odds_of(3, None, 2) is None and odds_of(3, {3: Logprob(-1.0, 1)}, None) is None
    told = odds_of(9, {9: Logprob(-7.0, 40), 4: Logprob(-0.1, 1), 5: Logprob(-2.0, 2)}, 2)
    assert told is not None and (told.logprob, told.top) == (-7.0, ((4, -0.1), (5, -2.0)))


def test_a_stop_string_ends_the_answer_before_it_and_the_request_at_vllm(engine, own, started) -> None:
    plain = finished(own, [replace(ASKED[0], max_gen_len=12)])[0].text
    stop = plain[len(plain) // 2 :][:2]
    asked = replace(ASKED[0], max_gen_len=12, stops=[stop])
    (one,), (two,) = finished(engine, [asked]), finished(own, [asked])
    assert (one.text, one.ids, one.finish) == (two.text, two.ids, "stop") and stop not in one.text
    assert started[0].aborted == ["0"] and not started[0].has_unfinished_requests()


def test_a_stop_id_is_no_part_of_the_answer(engine: VllmEngine, own: Engine) -> None:
    third = finished(own, [ASKED[0]])[0].ids[2]
    asked = replace(ASKED[0], stop_ids=[third])
    (one,), (two,) = finished(engine, [asked]), finished(own, [asked])
    assert (one.ids, one.text, one.finish) == (two.ids, two.text, "stop") and third not in one.ids


def test_cancelling_frees_the_request_at_once(engine: VllmEngine, started) -> None:
    answer = engine.submit(ASKED[0])
    engine.step()
    result = engine.cancel(answer)
    assert result.finish == "cancelled" and len(result.ids) == 1 and engine.idle
    assert started[0].aborted == ["0"] and engine.cancel(answer) is result


def test_a_full_queue_refuses(started, words: ModelWords) -> None:
    with opened_by(words, queue=1) as engine:
        for _ in range(5):
            engine.submit(ASKED[0])
        with pytest.raises(QueueFull, match="1 wait"):
            engine.submit(ASKED[0])
        assert (engine.running, engine.waiting) == (4, 1)


def test_what_cannot_be_asked_is_said_before_vllm_hears_of_it(engine: VllmEngine, started) -> None:
    with pytest.raises(WindowError, match="in a window of 256"):
        engine.submit(Request("the quick brown fox " * 200, template="none"))
    with pytest.raises(ValueError, match="has no vision; ask without"):
        engine.submit(Request("hello", pictures=[picture(0)]))
    assert not started[0].prompts and engine.idle


def test_parameters_say_what_the_request_says(engine: VllmEngine) -> None:
    how = Sampling(0.7, 0.9, 20, 0.05, 1.1, frequency_penalty=0.5, presence_penalty=-0.5, seed=4)
    asked = Request("hello", template="llama2", sampling=how, max_gen_len=33, logit_bias={5: -100.0}, logprobs=2)
    prompt = engine.prepare(asked)
    told = parameters(asked, prompt)
    assert (told.temperature, told.top_p, told.top_k, told.min_p, told.repetition_penalty) == (0.7, 0.9, 20, 0.05, 1.1)
    assert (told.frequency_penalty, told.presence_penalty, told.seed, told.max_tokens) == (0.5, -0.5, 4, 33)
    assert (told.logit_bias, told.logprobs, told.stop_token_ids) == ({5: -100.0}, 2, sorted(prompt.stop_ids))
    assert told.ignore_eos and not told.detokenize and told.stop is None and told.output_kind.name == "DELTA"
    ends = engine.prepare(replace(asked, ignore_stops=True)).stop_ids
    assert prompt.stop_ids and not ends


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("json_object", "", {"json_object": True}),
        ("json_schema", '{"type": "object"}', {"json": '{"type": "object"}'}),
        ("regex", "a+", {"regex": "a+"}),
        ("choice", '["a", "b"]', {"choice": ["a", "b"]}),
        ("lark", 'start: "a"', {"grammar": 'start: "a"'}),
    ],
)
def test_a_grammar_is_told_in_vllms_words(started, kind, text, told) -> None:
    assert {name: value for name, value in vars(structured(Grammar(kind, text))).items() if value is not None} == told


def test_scores_are_those_of_our_engine_and_others_lose_nothing(engine: VllmEngine, own: Engine) -> None:
    asked, texts = Request("hello world", template="none"), [" the quick", " fox"]
    answer = engine.submit(ASKED[0])
    found, wanted = engine.score(asked, texts), own.score(asked, texts)
    for one, two in zip(found, wanted, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
        assert (one.tokens, one.greedy) == (two.tokens, two.greedy)
    while not engine.idle:
        engine.step()
    assert answer.result.ids == finished(own, ASKED[:1])[0].ids


def test_logits_are_refused_in_one_sentence(engine: VllmEngine) -> None:
    with pytest.raises(ValueError, match="logits: got infer_backend vllm, which gives none"):
        engine.logits([1, 2])


def test_a_service_asks_it_as_it_asks_our_engine(engine: VllmEngine, own: Engine) -> None:
    with Service(engine) as service:
        texts = ["".join(event.text for event in service.iterate(request)) for request in ASKED[:2]]
    assert texts == [result.text for result in finished(own, ASKED[:2])]


def test_an_answer_that_vllm_gives_up_says_so(engine: VllmEngine, started, monkeypatch) -> None:
    answer = engine.submit(ASKED[0])
    plain = started[0].step

    def gone() -> list:
        (output,) = plain()
        output.finished, output.outputs[0].finish_reason = True, "abort"
        return [output]

    monkeypatch.setattr(started[0], "step", gone)
    engine.step()
    assert answer.result.finish == "error" and "vLLM ended the answer (abort)" in answer.result.error and engine.idle


def test_words_of_vllm_reach_its_engine(started, words: ModelWords) -> None:
    more = {"max_num_batched_tokens": 99, "max_model_len": 200}
    with opened_by(replace(words, vllm_gpu_util=0.5, vllm_enforce_eager=True, vllm_config=more)) as engine:
        told = started[0].args
        assert (told.gpu_memory_utilization, told.enforce_eager, told.max_num_batched_tokens) == (0.5, True, 99)
        assert (told.dtype, told.max_num_seqs, told.tensor_parallel_size) == ("float32", 4, 1)
        assert told.max_model_len == engine.window == 200
    with pytest.raises(ValueError, match="vllm_config: got .'nonsense': 1., expected arguments of vLLM's engine"):
        opened_by(replace(words, vllm_config={"nonsense": 1}))


def test_pictures_go_as_they_are_with_one_id_in_their_place(started, tmp_path: Path) -> None:
    pair = write_llava(tmp_path / "llava", "llava")
    words = ModelWords(model_name_or_path=[str(pair.folder)], infer_backend="vllm", device="cpu")
    seen = [picture(1), picture(2)]
    asked = Request([Turn("user", "what is it?", pictures=2)], pictures=seen, max_gen_len=1)
    with opened_by(words) as engine:
        prompt = engine.prepare(asked)
        asked_by = engine._asked(asked, prompt)
    image = pair.model.config.image_token_index
    ids = asked_by["prompt_token_ids"]
    assert ids.count(image) == 2 and len(ids) == len(prompt.ids) - sum(slot >= 0 for slot in prompt.slots) + 2
    assert asked_by["multi_modal_data"] == {"image": seen}
    assert started[0].args.model == str(pair.folder)  # which needs no export


def test_adjacent_pictures_keep_a_place_each() -> None:
    assert collapse([1, 0, 0, 0, 0, 0, 2], [-1, 0, 1, 2, 3, 4, -1], [2, 3], token=9) == [1, 9, 9, 2]

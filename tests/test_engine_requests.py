"""What a request may say, how it ends, and what is refused before anything runs."""

from __future__ import annotations

import itertools
import signal
from dataclasses import replace

import pytest
from engine_toys import ONE, opened, picture, write_model
from PIL import Image

from accessory.assemble import Bundle
from accessory.data.template import Turn
from accessory.engine import Conversation, Engine, Request, WindowError
from accessory.engine.worker import Forget, Worker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("sees") / "model"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("blind") / "model", "llama", sees=False))


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 8, **options})


def text_of(count: int) -> str:
    """A text that is `count` tokens with BOS."""
    return "1" * (count - 2)  # the tokenizer splits digits, and puts a blank before the first


def test_an_empty_prompt_continues_from_bos(bundle):
    result = Engine(bundle, ONE).generate([raw("")])[0]
    assert result.prompt_tokens == 1 and len(result.ids) == 8


def test_the_last_token_that_fits_the_window_is_generated(bundle):
    engine = Engine(bundle, ONE, window=20)
    for length, said in ((19, 1), (18, 2), (10, 8)):
        result = engine.generate([raw(text_of(length))])[0]
        assert (result.prompt_tokens, len(result.ids), result.finish) == (length, said, "length")


@pytest.mark.parametrize("length", [20, 21, 400])
def test_a_prompt_longer_than_the_window_is_refused_with_numbers(bundle, length):
    with pytest.raises(WindowError, match=rf"got {length} tokens, expected at most 19 in a window of 20"):
        Engine(bundle, ONE, window=20).submit(raw(text_of(length)))


def test_truncation_keeps_bos_pictures_and_the_newest_text(bundle, caplog):
    engine = Engine(bundle, ONE, window=40)
    request = raw("a fox " * 30 + "the lazy dog", pictures=[picture(1)], overlong="truncate")
    prompt = engine._prompter(request)
    assert len(prompt.ids) == 32 and prompt.ids[0] == bundle.tokenizer.bos_id and "lost its oldest" in caplog.text
    assert [slot for slot in prompt.slots if slot >= 0] == list(range(bundle.model.vision.slots))
    assert bundle.tokenizer.decode(prompt.ids).endswith("the lazy dog")
    result = engine.generate([request])[0]
    assert result.dropped == prompt.dropped > 0 and len(result.ids) == 8


def test_pictures_stand_before_bos_where_the_model_was_trained_so(bundle):
    engine = Engine(replace(bundle, vision=replace(bundle.vision, before_bos=True)), ONE)
    request, count = raw("a fox", pictures=[picture(1)]), bundle.model.vision.slots
    prompt = engine._prompter(request)
    assert prompt.slots[: count + 1] == [*range(count), -1] and prompt.ids[count] == bundle.tokenizer.bos_id
    assert engine.generate([request])[0].prompt_tokens == len(prompt.ids)


def test_truncation_that_cannot_help_says_so(bundle):
    engine = Engine(bundle, ONE, window=20)
    with pytest.raises(WindowError, match="max_gen_len: got 20"):
        engine.submit(raw("a", max_gen_len=20, overlong="truncate"))
    with pytest.raises(WindowError, match="fewer pictures"):
        engine.submit(raw("a", pictures=[picture(1)] * 3, overlong="truncate"))


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(bundle):
    whole = Engine(bundle, ONE).generate([raw("the", max_gen_len=30)])[0]
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 4]
    result = Engine(bundle, ONE).generate([raw("the", max_gen_len=30, stops=[stop])])[0]
    assert result.text == whole.text[: whole.text.index(stop)] and result.finish == "stop"


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(bundle):
    whole = Engine(bundle, ONE).generate([raw("the")])[0]
    result = Engine(bundle, ONE).generate([raw("the", stop_ids=[whole.ids[5], 7])])[0]
    end = whole.ids.index(whole.ids[5])
    assert (result.ids, result.finish) == (whole.ids[:end], "stop")


def test_eos_ends_an_answer(bundle, monkeypatch):
    engine = Engine(bundle, ONE)
    monkeypatch.setattr(engine, "_chooser", lambda logits, *_: [(2, None)] * len(logits))
    result = engine.generate([raw("the")])[0]
    assert (bundle.tokenizer.eos_id, result.ids, result.text, result.finish) == (2, [], "", "stop")


def test_weights_beyond_the_tokenizer_are_never_chosen(tmp_path):
    bundle = opened(write_model(tmp_path / "model", "llama", sees=False, vocab_size=600))
    head = bundle.model.output.weight
    head[bundle.tokenizer.size :] = head[: 600 - bundle.tokenizer.size] * 100
    ids = Engine(bundle, ONE).generate([raw("the")])[0].ids
    assert max(ids) < bundle.tokenizer.size


def test_padding_and_places_of_pictures_are_never_chosen(tmp_path):
    bundle = opened(write_model(tmp_path / "model", "llama", sees=False))
    first = Engine(bundle, ONE).generate([raw("the")])[0].ids
    bundle.tokenizer.unsaid = frozenset(first)
    assert first and not set(first) & set(Engine(bundle, ONE).generate([raw("the")])[0].ids)


def test_a_marker_that_is_text_to_the_tokenizer_runs_into_the_answer(bundle):
    engine = Engine(bundle, ONE)
    plain = [engine._prompter(Request("hi", template=name)).ids for name in ("llama2", "none")]
    spelled = engine._prompter(Request("[INST] hi [/INST]", template="none")).ids
    assert plain[0] == spelled != plain[1]


def test_streaming_gives_the_whole_text_in_pieces(bundle):
    request = raw("hello", max_gen_len=20)
    pieces = list(Engine(bundle, ONE).stream(request))
    assert "".join(pieces) == Engine(bundle, ONE).generate([request])[0].text and len(pieces) > 5


def test_two_streams_may_be_read_in_turns(bundle):
    engine = Engine(bundle, ONE)
    requests = [raw("hello", max_gen_len=20), raw("a fox", max_gen_len=12)]
    pairs = itertools.zip_longest(*(engine.stream(request) for request in requests), fillvalue="")
    texts = ["".join(pieces) for pieces in zip(*pairs, strict=True)]
    assert texts == [result.text for result in Engine(bundle, ONE).generate(requests)]


def test_leaving_a_stream_frees_its_row_at_once(bundle):
    engine = Engine(bundle, ONE, rows=1)
    stream = engine.stream(raw("hello", max_gen_len=200))
    next(stream)
    stream.close()
    assert engine.idle and engine.generate([raw("a")]) == Engine(bundle, ONE).generate([raw("a")])


def test_cancel_works_in_the_queue_in_the_prompt_and_in_the_answer(bundle, monkeypatch):
    engine = Engine(bundle, ONE, rows=2, prefill_chunk=4)
    talker, reader, waiter = (
        engine.submit(request)
        for request in (raw("a"), raw("what is it", pictures=[picture(1)]), raw("never mind", max_gen_len=3))
    )
    engine.step()
    kept = []
    monkeypatch.setattr(Worker, "run", lambda self, op, run=Worker.run: kept.append(op) or run(self, op))
    assert engine.cancel(waiter).text == "" and engine.cancel(reader).finish == "cancelled"
    assert isinstance(kept[0], Forget) and not engine._worker._features
    said = engine.cancel(talker)
    assert said.ids == talker.ids and len(said.ids) == 1 and engine.idle
    assert engine.cancel(talker) is said, "a finished answer stays as it is"


def test_an_event_comes_for_every_token_and_the_last_has_the_result(bundle):
    engine = Engine(bundle, ONE)
    answer = engine.submit(raw("hello"))
    events = []
    while not engine.idle:
        events += engine.step()
    assert [event.token for event in events] == answer.ids
    assert "".join(event.text for event in events) == answer.result.text
    assert [event.result is not None for event in events] == [False] * 7 + [True]


def test_ctrl_c_takes_effect_between_steps_and_cancels(bundle, monkeypatch):
    engine = Engine(bundle, ONE)
    run, steps = Worker.run, []

    def interrupted(self: Worker, op: object) -> object:
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        steps.append(op)
        return run(self, op)

    monkeypatch.setattr(Worker, "run", interrupted)
    stream = engine.stream(raw("hello", max_gen_len=100))
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    assert len(steps) == 4, "the step was finished"
    assert engine.idle and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (raw("a", pictures=[picture(1)], max_gen_len=0), "max_gen_len: got 0"),
        (raw("a", stops=["x", ""]), "stops: got an empty string"),
        (raw("a", overlong="cut"), "overlong: got 'cut'"),
        (Request("a", template="nome"), "did you mean 'none'"),
        (Request([Turn("user", "a", pictures=1)]), "got 0, but the turns speak of 1"),
        (Request([Turn("user", "a")], pictures=[picture(1)]), "got 1, but the turns speak of 0"),
        (Request([Turn("assistant", "a")]), "expected 'user'"),
        (raw("a", pictures=[b"no picture"]), "picture from memory"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(bundle, monkeypatch, request_, words):
    engine = Engine(bundle, ONE)
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("a refused request ran"))
    with pytest.raises(ValueError, match=words):
        engine.generate([raw("a"), request_])
    assert engine.idle


def test_a_missing_picture_is_named(bundle):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        Engine(bundle, ONE).submit(raw("a", pictures=["nothing.png"]))


def test_a_picture_for_a_model_without_vision_is_refused(blind):
    with pytest.raises(ValueError, match="has no vision; ask without pictures"):
        Engine(blind, ONE).submit(raw("a", pictures=[picture(1)]))


def test_an_adapter_reads_one_picture_only(tmp_path):
    engine = Engine(opened(write_model(tmp_path / "model", "llama_adapter")), ONE)
    with pytest.raises(ValueError, match="reads one picture per conversation"):
        engine.submit(raw("a", pictures=[picture(1), picture(2)]))


@pytest.mark.parametrize("option", [{"rows": 0}, {"window": 0}, {"prefill_chunk": -1}, {"image_transform": "crop"}])
def test_impossible_engines_are_refused(bundle, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Engine(bundle, ONE, **option)


def test_a_closed_engine_says_so(bundle):
    with Engine(bundle, ONE) as engine:
        engine.generate([raw("a", max_gen_len=1)])
    engine.submit(raw("a"))
    with pytest.raises(RuntimeError, match="after its end"):
        engine.step()


def test_a_conversation_remembers_and_forgets_whole_exchanges():
    talk = Conversation(system="be brief")
    talk.add("what is it?", "a fox", ["fox.png"])
    talk.add("and now?", "a dog", ["dog.png"])
    turns, pictures = talk.asked("which is red?", ["red.png"])
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert pictures == ["fox.png", "dog.png", "red.png"] and [turn.pictures for turn in turns] == [0, 1, 0, 1, 0, 1]
    assert talk.forget_oldest() and talk.pictures == ["dog.png"]
    talk.clear()
    assert not talk.forget_oldest() and [turn.text for turn in talk.asked("hi")[0]] == ["be brief", "hi"]


def test_logits_that_are_no_numbers_are_an_error_and_poison_no_later_request(bundle):
    engine = Engine(bundle, ONE, rows=1)
    expected = engine.generate([raw("hello there")])[0].ids
    norm = bundle.model.layers[0].attention_norm.weight
    kept = norm.detach().clone()
    norm.data.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match=r"logits: got NaN.*choose bf16 or fp32"):
            engine.generate([raw("hello there, all of you")])
    finally:
        norm.data.copy_(kept)
    assert engine.generate([raw("hello there")])[0].ids == expected


def test_a_photograph_is_turned_as_its_exif_says_where_asked(bundle, tmp_path):
    upright, exif = picture(3).resize((16, 16)), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")

    def answer(name: str, orientation: str) -> list[int]:
        request = Request([Turn("user", "what", pictures=1)], pictures=[tmp_path / name], max_gen_len=8)
        return Engine(bundle, ONE, orientation=orientation).generate([request])[0].ids

    assert answer("turned.png", "apply") == answer("upright.png", "keep") != answer("turned.png", "keep")


def test_a_prompt_of_ids_is_taken_as_it_is_and_goes_on_where_it_ends(bundle):
    engine = Engine(bundle, ONE)
    spoken = raw("the quick brown fox")
    ids = engine.prepare(spoken).ids
    assert engine.prepare(Request("", ids=ids)).ids == ids
    assert engine.generate([Request("", ids=ids, max_gen_len=8)]) == engine.generate([spoken])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ids": []}, "ids: got none"),
        ({"ids": [5, 10**6]}, "ids: got 1000000, expected one or more token ids from 0 to"),
        ({"ids": [5], "turns": "hello"}, "ids: got them with turns"),
        ({"ids": [5] * 300}, "prompt: got 300 tokens"),
    ],
)
def test_ids_that_cannot_be_a_prompt_are_refused(bundle, wrong, words):
    with pytest.raises(ValueError, match=words):
        Engine(bundle, ONE, window=200).submit(Request(**{"turns": "", **wrong}))

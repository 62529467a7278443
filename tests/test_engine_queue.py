"""Who is answered when: clients in turn, a bounded queue, prompts in pieces between the steps of answers."""

from __future__ import annotations

import pytest
from engine_toys import ONE, opened, write_model

from accessory.assemble import Bundle
from accessory.engine import Engine, QueueFull, Request
from accessory.engine.steps import Turns


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("blind") / "model", "llama", sees=False, endless=True))


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 4, **options})


def order(engine: Engine) -> list[str]:
    """The requests' texts in the order in which they end."""
    ended = []
    while not engine.idle:
        ended += [str(event.answer.request.turns) for event in engine.step() if event.result is not None]
    return ended


def test_clients_take_turns_however_much_one_of_them_asks(bundle):
    engine = Engine(bundle, ONE, rows=1)
    for text in "abc":
        engine.submit(raw(text, client="greedy"))
    engine.submit(raw("x", client="other"))
    engine.submit(raw("y", client="third"))
    assert order(engine) == ["a", "x", "y", "b", "c"]


def test_of_one_client_who_came_first_is_first(bundle):
    engine = Engine(bundle, ONE, rows=1)
    for text in "abcd":
        engine.submit(raw(text))
    assert order(engine) == list("abcd")


def test_a_full_queue_takes_nobody_until_there_is_room(bundle):
    engine = Engine(bundle, ONE, rows=1, queue=2)
    answers = [engine.submit(raw(text)) for text in "ab"]
    with pytest.raises(QueueFull, match="while 2 wait"):
        engine.submit(raw("c"))
    engine.cancel(answers[0])
    engine.submit(raw("c"))
    assert order(engine) == ["b", "c"]


def test_generate_asks_more_than_the_queue_holds(bundle):
    texts = [str(number) for number in range(7)]
    bounded = Engine(bundle, ONE, rows=1, queue=2).generate([raw(text) for text in texts])
    assert bounded == Engine(bundle, ONE).generate([raw(text) for text in texts])


def test_a_long_prompt_holds_answers_up_for_one_piece_at_a_time(bundle):
    engine = Engine(bundle, ONE, rows=3, prefill_chunk=8)
    talkers = [engine.submit(raw(text, max_gen_len=60)) for text in "ab"]
    while min(len(answer.ids) for answer in talkers) < 2:
        engine.step()
    reader = engine.submit(raw("hello " * 20))
    before = talkers[0].ids[:]
    while not reader.ids:
        engine.step()
    pieces = -(-len(engine.prepare(raw("hello " * 20)).ids) // 8)
    assert len(talkers[0].ids) - len(before) >= pieces - 1


def test_many_prompts_go_first_where_few_answers_wait():
    turns = Turns()
    assert [turns.feed(8, 2) for _ in range(6)] == [True, True, True, True, False, True]


def test_one_prompt_and_many_answers_alternate():
    turns = Turns()
    assert [turns.feed(1, 5) for _ in range(4)] == [True, False, True, False]


def test_steps_and_tokens_are_counted(bundle):
    engine = Engine(bundle, ONE, rows=2)
    results = engine.generate([raw("a"), raw("b", max_gen_len=2)])
    stats = engine.stats
    assert stats.generated_tokens == 6 and stats.prompt_tokens == sum(result.prompt_tokens for result in results)
    assert (stats.prompt_steps, stats.answer_steps, dict(stats.finished)) == (1, 3, {"length": 2})

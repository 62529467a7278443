"""Conversations of the web page without a page: what is asked, what comes, what is kept, and what ends an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_toys import ONE, opened, picture, write_model

from accessory.data.template import Turn
from accessory.engine import Conversation, Engine, Request
from accessory.serve.service import Service
from accessory.serve.web.talk import UNSAID, Exchange, Model, Talk, Talks, Wishes

PATIENCE = 60.0
SHORT = Wishes(max_new_tokens=6)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("seeing") / "model")
    for number, name in enumerate(("noise", "other"), start=1):
        picture(number).save(folder.parent / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def service(seeing: Path) -> Iterator[Service]:
    with Engine(opened(seeing), ONE, rows=3) as engine, Service(engine) as service:
        yield service


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A model whose answers end when somebody ends them."""
    folder = write_model(tmp_path_factory.mktemp("endless") / "model", "llama", sees=False, endless=True)
    with Engine(opened(folder), ONE, rows=1, window=30_000) as engine, Service(engine) as service:
        yield service


@pytest.fixture
def asked(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that the engine gets."""
    seen, prepare = list[Request](), Engine.prepare

    def watched(self: Engine, request: Request) -> Any:
        seen.append(request)
        return prepare(self, request)

    monkeypatch.setattr(Engine, "prepare", watched)
    return seen


def model_of(service: Service, **how: Any) -> Model:
    return Model(service, "alpaca", **how)


def run(body: Any) -> Any:
    return asyncio.run(asyncio.wait_for(body, PATIENCE))


async def last(exchanges: Any) -> Exchange:
    """The last look at an answer."""
    seen = [each async for each in exchanges]
    assert seen[0].answer == "" and all(b.answer.startswith(a.answer) for a, b in zip(seen, seen[1:], strict=False))
    return seen[-1]


def expected(service: Service, turns: Any, *pictures: Path) -> str:
    """What the engine says by itself."""
    request = Request(turns, pictures=pictures, template="alpaca", max_gen_len=6)
    return service.call(lambda engine: engine.generate([request])).result(PATIENCE)[0].text


def test_a_talk_remembers_what_was_said_and_shown(service, seeing):
    talk, noise = Talk(model_of(service, sees=True)), seeing.parent / "noise.png"
    first = run(last(talk.ask("what is it?", [noise], SHORT)))
    second = run(last(talk.ask("and then", [], SHORT)))
    talked = Conversation()
    assert first.answer == expected(service, *talked.asked("what is it?", [noise])[:1], noise)
    talked.add("what is it?", first.answer, [noise])
    assert second.answer == expected(service, talked.asked("and then")[0], noise)
    assert talk.exchanges == [first, second] and "6 tokens in" in second.note and not talk.busy


def test_a_talk_without_memory_asks_each_question_alone(service, asked):
    talk = Talk(model_of(service, remembers=False))
    for text in ("hello", "and then"):
        run(last(talk.ask(text, [], SHORT)))
    assert [[turn.text for turn in request.turns] for request in asked] == [["hello"], ["and then"]]
    assert len(talk.exchanges) == 2


def test_what_the_panel_says_is_what_is_asked(service, asked):
    talk = Talk(replace(model_of(service), template="llama2", stops=("x",)), "me")
    run(last(talk.ask("hello", [], Wishes(" be brief ", 3, 0.5, 0.9, 7, 1.5, 11))))
    (request,) = asked
    assert request.turns == [Turn("system", "be brief"), Turn("user", "hello")] and request.template == "llama2"
    how = request.sampling
    drawn = (how.temperature, how.top_p, how.top_k, how.repetition_penalty, how.seed)
    assert drawn == (0.5, 0.9, 7, 1.5, 11)
    assert (request.max_gen_len, request.stops, request.client) == (3, ("x",), "me")


def test_stop_ends_an_answer_within_a_step_and_keeps_what_was_said(endless):
    talk = Talk(Model(endless, "none"))

    async def stopped() -> Exchange:
        async with aclosing(talk.ask("hello", [], Wishes(max_new_tokens=20_000))) as exchanges:
            async for exchange in exchanges:
                if exchange.answer:
                    before = endless.engine.stats.answer_steps
                    talk.stop()
        assert endless.engine.stats.answer_steps - before <= 2  # the one under way, and one that the clock brought
        return exchange

    exchange = run(stopped())
    assert exchange.answer and exchange.note.startswith("Stopped after") and talk.exchanges == [exchange]
    assert endless.jobs == 0 and endless.engine.idle


def test_who_leaves_in_the_middle_frees_the_row(endless):
    talk = Talk(Model(endless, "none"))

    async def left() -> None:
        exchanges = talk.ask("hello", [], Wishes(max_new_tokens=20_000))
        async for exchange in exchanges:
            if exchange.answer:
                break
        await exchanges.aclose()

    run(left())
    assert not talk.busy and talk.exchanges == []
    endless.call(lambda engine: None).result(PATIENCE)  # there is a row for it again
    assert endless.jobs == 0


def test_a_question_that_waits_can_be_stopped_and_is_not_kept(endless):
    first, second = Talk(Model(endless, "none")), Talk(Model(endless, "none"))

    got = list[Exchange]()

    async def both() -> None:
        async with aclosing(first.ask("hello", [], Wishes(max_new_tokens=20_000))) as exchanges:
            async for exchange in exchanges:
                if exchange.answer and not got:
                    waiting = asyncio.create_task(last(second.ask("me too", [], Wishes(max_new_tokens=9))))
                    while endless.engine.waiting == 0:
                        await asyncio.sleep(0)
                    second.stop()
                    got.append(await waiting)
                    first.stop()

    run(both())
    assert got[0].note == UNSAID
    assert second.exchanges == [] and len(first.exchanges) == 1


def test_clear_in_the_middle_forgets_the_answer_too(endless):
    talk = Talk(Model(endless, "none"))

    async def cleared() -> None:
        async for exchange in talk.ask("hello", [], Wishes(max_new_tokens=20_000)):
            if exchange.answer:
                talk.clear()

    run(cleared())
    assert talk.exchanges == [] and not talk.busy


def test_regenerating_draws_anew_in_the_same_place(service, asked):
    talk = Talk(model_of(service))
    run(last(talk.ask("hello", [], SHORT)))
    run(last(talk.ask("and then", [], replace(SHORT, temperature=2.0, seed=5))))
    run(last(talk.again(replace(SHORT, temperature=2.0, seed=5))))
    assert [request.sampling.seed for request in asked] == [0, 5, 6]
    assert asked[1].turns == asked[2].turns and [each.text for each in talk.exchanges] == ["hello", "and then"]
    assert talk.note == ""
    run(last(talk.again(SHORT)))
    assert "temperature 0" in talk.note
    with pytest.raises(ValueError, match="got no question yet"):
        Talk(model_of(service)).again(SHORT)


def test_a_full_window_drops_the_oldest_exchanges_and_says_so(service, asked):
    talk = Talk(replace(model_of(service), template="none"))
    questions = [f"{number} " + "the quick brown fox jumps over the lazy dog " * 3 for number in range(6)]
    notes = []
    for question in questions:
        run(last(talk.ask(question, [], SHORT)))
        notes.append(talk.note)
    told = [[turn.text for turn in request.turns if turn.role == "user"] for request in asked]
    assert all(texts == questions[end - len(texts) : end] for end, texts in enumerate(told, start=1))
    assert len(told[1]) == 2 and len(told[-1]) < 6 and notes[0] == ""
    assert "no longer told to the model" in notes[-1] and len(talk.exchanges) == 6


@pytest.mark.parametrize(
    ("text", "pictures", "wishes", "words"),
    [
        ("1" * 400, [], SHORT, "in a window of 256"),
        ("what", ["nowhere.png"], SHORT, "nowhere.png"),
        ("<image><image>", ["noise.png"], SHORT, "got 1 for 2 places"),
        ("hello", [], replace(SHORT, temperature=-1), "temperature: got -1"),
        ("hello", [], replace(SHORT, max_new_tokens=0), "max_gen_len: got 0"),
    ],
)
def test_what_cannot_be_asked_is_said_and_leaves_the_talk_as_it_was(service, seeing, text, pictures, wishes, words):
    talk = Talk(model_of(service, sees=True))
    before = run(last(talk.ask("hello", [], SHORT)))
    with pytest.raises((ValueError, OSError), match=words):
        run(last(talk.ask(text, [seeing.parent / name for name in pictures], wishes)))
    assert talk.exchanges == [before] and not talk.busy and service.jobs == 0


def test_one_talk_asks_one_question_at_a_time(endless):
    talk = Talk(Model(endless, "none"))

    async def twice() -> None:
        async for exchange in talk.ask("hello", [], Wishes(max_new_tokens=20_000)):
            if exchange.answer:
                with pytest.raises(ValueError, match="while an answer is under way"):
                    await last(talk.ask("and", [], SHORT))
                talk.stop()

    run(twice())


def test_several_people_at_once_never_hear_of_each_other(service, asked):
    talks = Talks(model_of(service))

    async def person(name: str) -> list[str]:
        talk = talks.of(name)
        for turn in range(3):
            await last(talk.ask(f"{name} asks {turn}", [], SHORT))
        return [each.answer for each in talk.exchanges]

    async def everybody() -> list[list[str]]:
        return await asyncio.gather(*(person(f"person{number}") for number in range(5)))

    answers = run(everybody())
    assert len(asked) == 15
    for request in asked:
        said = [turn.text for turn in request.turns]
        own = answers[int(request.client.removeprefix("person"))]
        assert said[::2] == [f"{request.client} asks {turn}" for turn in range(len(said) // 2 + 1)]
        assert said[1::2] == own[: len(said) // 2]


def test_too_many_conversations_drop_the_idlest_one(service):
    talks = Talks(model_of(service), kept=2)
    first = talks.of("a")
    run(last(first.ask("hello", [], SHORT)))
    talks.of("b")
    assert talks.of("a") is first
    talks.of("c")
    assert talks.of("a") is first and talks.of("b").exchanges == []


def test_a_page_that_closes_stops_its_answer_and_may_come_back(endless):
    talks = Talks(Model(endless, "none"))
    step: Callable[[], None] = lambda: talks.leave("a")  # noqa: E731

    async def left() -> Exchange:
        return [
            await _leaving(exchange, step) async for exchange in talks.of("a").ask("hello", [], Wishes("", 20_000))
        ][-1]

    exchange = run(left())
    talks.leave("nobody")
    assert exchange.note.startswith("Stopped") and talks.of("a").exchanges == [exchange]


async def _leaving(exchange: Exchange, leave: Callable[[], None]) -> Exchange:
    if exchange.answer:
        leave()
    return exchange

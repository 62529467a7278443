"""The engine on its own thread: what callers on loops and threads get, and what happens when they leave or it fails."""

import asyncio
import threading
from concurrent.futures import Future

import pytest
from api_server import wait_for
from engine_toys import ONE, opened, write_model

from accessory.engine import Engine, Request, WindowError
from accessory.engine.waiting import QueueFull
from accessory.serve.service import Closed, Service


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return opened(write_model(tmp_path_factory.mktemp("m") / "model", "llama", sees=False, endless=True))


@pytest.fixture
def service(bundle):
    with Engine(bundle, ONE, rows=2, prefill_chunk=16) as engine, Service(engine) as service:
        yield service


def asking(text="hello", length=12, **how):
    return Request(text, template="none", max_gen_len=length, **how)


def free(service):
    wait_for(lambda: not service.jobs and not service.engine.running, "nothing is under way")


def test_a_stream_on_an_event_loop_says_what_the_engine_alone_says(bundle, service):
    async def listen(text):
        return "".join([event.text async for event in service.stream(asking(text))])

    async def all_of_them():
        return await asyncio.gather(*(listen(f"text {i}") for i in range(5)))

    with Engine(bundle, ONE, rows=1) as alone:
        expected = [result.text for result in alone.generate([asking(f"text {i}") for i in range(5)])]
    assert asyncio.run(all_of_them()) == expected


def test_a_thread_iterates_over_the_same_events(service):
    events = list(service.iterate(asking()))
    result = events[-1].result
    assert result.finish == "length" and "".join(event.text for event in events) == result.text
    assert service.submit(asking()).future.result(60).text == result.text


def test_what_a_step_brought_reaches_a_loop_in_one_call(service):
    async def count():
        loop, calls = asyncio.get_running_loop(), []
        plain = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: calls.append(args) or plain(*args)
        before = service.engine.stats.answer_steps + service.engine.stats.prompt_steps
        await asyncio.gather(*(service.ask(asking(length=20)) for _ in range(2)))
        for lots in [await service.open(asking(length=20)) for _ in range(2)]:
            async for _ in lots:
                pass
        return len(calls), service.engine.stats.answer_steps + service.engine.stats.prompt_steps - before

    calls, steps = asyncio.run(count())
    assert calls <= steps + 8  # and one for what came between steps: requests that were accepted


def test_a_stream_that_is_closed_frees_its_row(service):
    async def leave():
        events = service.stream(asking(length=200))
        async for _ in events:
            break
        steps = service.engine.stats.answer_steps
        await events.aclose()
        return steps

    steps = asyncio.run(leave())
    free(service)
    assert service.engine.stats.answer_steps <= steps + 2


def test_an_iterator_that_is_dropped_frees_its_row(service):
    events = service.iterate(asking(length=200))
    next(events)
    events.close()
    free(service)
    assert service.engine.stats.finished["cancelled"] == 1


def test_a_request_is_cancelled_while_its_prompt_is_made(service, monkeypatch):
    going, made, plain = threading.Event(), threading.Event(), service.engine.prepare

    def slow(request):
        made.set()
        assert going.wait(60)
        return plain(request)

    monkeypatch.setattr(service.engine, "prepare", slow)
    job = service.submit(asking())
    assert made.wait(60)
    job.cancel()
    assert job.future.result(60).finish == "cancelled"
    going.set()
    free(service)
    assert service.engine.stats.prompt_tokens == 0


def test_a_request_that_cannot_be_asked_fails_alone(service):
    running = service.submit(asking(length=30))
    with pytest.raises(WindowError):
        service.submit(asking("word " * 1000)).future.result(60)
    with pytest.raises(WindowError):
        asyncio.run(service.ask(asking("word " * 1000)))
    assert running.future.result(60).finish == "length"


def test_beyond_the_bound_nobody_may_wait(bundle):
    with Engine(bundle, ONE, rows=1) as engine, Service(engine, queue=1) as service:
        jobs = [service.submit(asking(length=200)) for _ in range(2)]
        with pytest.raises(QueueFull, match="expected at most 2"):
            service.submit(asking())
        for job in jobs:
            job.cancel()


def test_work_for_the_engine_waits_for_a_free_row_and_loses_no_event(service):
    jobs = [service.submit(asking(f"{i}", length=40), listen=list[object]().append) for i in range(2)]
    wait_for(lambda: service.engine.running == 2, "both run")
    scores: Future = service.call(lambda engine: engine.score(asking("a"), ["b", "c"]))
    assert len(scores.result(60)) == 2
    assert [len(job.future.result(60).ids) for job in jobs] == [40, 40]
    with pytest.raises(ZeroDivisionError):
        service.call(lambda engine: 1 // 0).result(60)
    assert service.alive


def test_the_engines_end_reaches_everybody_and_nobody_may_ask_any_more(bundle, monkeypatch):
    told = []
    with Engine(bundle, ONE, rows=1) as engine, Service(engine) as service:
        service.when_gone(lambda: told.append(True))
        heard = []
        jobs = [service.submit(asking(length=200), heard.append) for _ in range(2)]
        wait_for(lambda: engine.running, "one runs")
        work = service.call(lambda engine: engine.rows)

        def broken():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine, "step", broken)
        for job in jobs:
            with pytest.raises(RuntimeError, match="device is gone"):
                job.future.result(60)
        with pytest.raises(RuntimeError, match="device is gone"):
            work.result(60)
        wait_for(lambda: not service.alive, "the thread ends")
        with pytest.raises(Closed):
            service.submit(asking())
        assert told == [True] and sum(isinstance(item, RuntimeError) for item in heard) == 2


def test_a_service_that_closes_lets_answers_end_in_time_and_cancels_the_rest(bundle):
    with Engine(bundle, ONE, rows=1) as engine:
        service = Service(engine)
        service.start()
        job = service.submit(asking(length=10))
        service.close(drain_s=60)
        assert job.future.result(0).finish == "length"
        service = Service(engine)
        service.start()
        job = service.submit(asking(length=200))
        wait_for(lambda: engine.running, "it runs")
        service.close()
        assert job.future.result(0).finish == "cancelled" and engine.running == 0
        with pytest.raises(Closed):
            service.submit(asking())


def test_a_call_that_ends_the_engine_ends_the_service(bundle):
    def fatal(engine):
        engine.close()
        raise ConnectionError("a rank is gone")

    with Engine(bundle, ONE, rows=1) as engine, Service(engine) as service:
        with pytest.raises(ConnectionError):
            service.call(fatal).result(60)
        wait_for(lambda: not service.alive, "the service noticed")
        assert isinstance(service.error, ConnectionError)


def test_a_call_that_fails_alone_leaves_the_service_alive(service):
    with pytest.raises(WindowError):
        service.call(lambda engine: engine.logits(list(range(3, 40)) * 30)).result(60)
    assert service.submit(asking()).future.result(60).finish == "length" and service.alive

"""Clients that leave, clients that are many, and requests that break: rows are freed, nobody hears another's answer."""

import asyncio
import contextlib
import json
import threading
from collections import Counter
from dataclasses import replace

import httpx
import pytest
import torch
from api_server import dial, inside, post_bytes, read_all, wait_for
from engine_toys import ONE, opened, write_model

from accessory.engine import Engine, Request
from accessory.serve.jobs import Job

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return opened(write_model(tmp_path_factory.mktemp("m") / "model", "llama", sees=False, endless=True))


def asking(prompt="hello", length=200, **more):
    return {"prompt": prompt, "max_tokens": length, "temperature": 0, **more}


def sent(server, **more):
    """A raw connection that asked."""
    wire = dial(server.port)
    wire.sendall(post_bytes(TEXT, json.dumps(asking(**more)).encode()))
    return wire


@contextlib.contextmanager
def steps_between(server, monkeypatch):
    """How many steps lie between a client's leaving, as the server hears of it, and the end of its request."""
    engine, told = server.engine, {"heard": [], "done": []}

    def steps():
        return engine.stats.prompt_steps + engine.stats.answer_steps

    plain, end = Job.cancel, engine.cancel
    monkeypatch.setattr(Job, "cancel", lambda job: told["heard"].append(steps()) or plain(job))
    monkeypatch.setattr(engine, "cancel", lambda answer: told["done"].append(steps()) or end(answer))
    yield told
    monkeypatch.undo()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["queue", "prompt", "answer"])
def test_who_leaves_frees_the_place_within_a_step(bundle, monkeypatch, where, stream):
    with inside(bundle, rows=1, chunk=1 if where == "prompt" else 32) as server:
        first = sent(server, prompt="first") if where == "queue" else None
        if first is not None:
            wait_for(lambda: server.engine.running == 1, "the first one runs")
        prompt = "word " * 60 if where == "prompt" else "second"
        with steps_between(server, monkeypatch) as told:
            wire = sent(server, prompt=prompt, stream=stream)
            if where == "queue":
                wait_for(lambda: server.engine.waiting == 1, "the second one waits")
            else:
                begun = "prompt_tokens" if where == "prompt" else "generated_tokens"
                wait_for(lambda: getattr(server.engine.stats, begun) > 0, "it has begun")
            wire.close()
            wait_for(lambda: told["done"], "its end")
            assert told["done"][0] - told["heard"][0] <= 1
        wait_for(lambda: server.engine.waiting == 0 and server.service.jobs == (first is not None), "it is forgotten")
        if first is not None:
            first.close()
        server.idle()
        assert server.engine.stats.finished["cancelled"] >= 1
        assert server.post(TEXT, asking(length=3)).json()["usage"]["completion_tokens"] == 3


def test_each_of_a_hundred_clients_gets_its_own_answer(bundle):
    asked = [asking(f"client {i}", 6, user=f"c{i}", stream=bool(i % 2)) for i in range(100)]
    with Engine(bundle, ONE, rows=1) as alone:
        requests = [Request(body["prompt"], template="none", max_gen_len=6) for body in asked]
        expected = [result.text for result in alone.generate(requests)]
    assert len(set(expected)) > 90

    async def ask_all(server):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.root, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(client.post(TEXT, json=body) for body in asked))

    with inside(bundle, rows=3) as server:
        answers = asyncio.run(ask_all(server))
        server.idle()
    for body, answer, text in zip(asked, answers, expected, strict=True):
        assert answer.status_code == 200
        if body["stream"]:
            data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert "".join(piece["choices"][0]["text"] for piece in data) == text
        else:
            assert answer.json()["choices"][0]["text"] == text


def test_beyond_the_queue_clients_are_told_when_to_come_back(bundle, monkeypatch):
    async def ask_all(server, go):
        async with httpx.AsyncClient(base_url=server.root, timeout=60, limits=httpx.Limits(max_connections=None)) as c:
            asked = [c.post(TEXT, json=asking(f"{i}", 20, stream=bool(i % 2))) for i in range(40)]
            answers = []
            for answer in asyncio.as_completed(asked):
                answers.append(await answer)
                if len(answers) == 35:
                    go()
            return answers

    with inside(bundle, rows=1, queue=4) as server:
        gate, step = threading.Event(), server.engine.step
        monkeypatch.setattr(server.engine, "step", lambda: step() if gate.wait(60) else [])
        answers = asyncio.run(ask_all(server, gate.set))
        assert Counter(answer.status_code for answer in answers) == {429: 35, 200: 5}
        for answer in answers[:35]:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        server.idle()


def test_one_client_with_many_requests_does_not_keep_another_waiting(bundle, monkeypatch):
    ended = []

    def ask(name, number):
        answer = httpx.post(f"{server.root}{TEXT}", json=asking(f"{name} {number}", 5, user=name), timeout=60)
        ended.append((name, answer.status_code))

    with inside(bundle, rows=1) as server:
        go, step = threading.Event(), server.engine.step
        monkeypatch.setattr(server.engine, "step", lambda: step() if go.wait(0.001) else [])
        threads = [threading.Thread(target=ask, args=("greedy", number)) for number in range(6)]
        threads.append(threading.Thread(target=ask, args=("modest", 0)))
        for count, thread in enumerate(threads, start=1):
            thread.start()
            wait_for(lambda count=count: server.engine.waiting == count, "it waits")
        go.set()
        for thread in threads:
            thread.join(60)
    assert ended.index(("modest", 200)) <= 2 and len(ended) == 7


def test_what_a_prompt_shares_with_an_earlier_one_is_not_read_again_and_is_told(bundle):
    with inside(bundle, rows=2) as server:
        told = [server.post(TEXT, asking("word " * 30 + end, 4)).json()["usage"] for end in ("one", "two")]
        streamed = server.post(
            TEXT, asking("word " * 30 + "two", 4, stream=True, stream_options={"include_usage": True})
        ).text.splitlines()
        last = json.loads([line for line in streamed if line.startswith("data: {")][-1][6:])["usage"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (*told, last)]
    assert cached[0] == 0 and 0 < cached[1] < told[1]["prompt_tokens"] and cached[2] >= cached[1]


class _Poison:
    """A grammar that gives up after some tokens."""

    done, left = False, 3

    def push(self, token):
        self.left -= 1

    def allowed(self):
        if not self.left:
            raise ValueError("json_schema: the answer cannot go on; simplify the grammar")
        return torch.ones(4096, dtype=torch.bool)


def test_a_request_that_breaks_leaves_the_others_alone(bundle, monkeypatch):
    with inside(bundle, rows=2) as server:
        plain = server.engine.prepare

        def prepare(request):
            if request.turns == "break":
                raise KeyError("a fault of ours")
            made = plain(request)
            return replace(made, grammar=_Poison()) if request.turns == "poison" else made

        monkeypatch.setattr(server.engine, "prepare", prepare)
        expected = server.post(TEXT, asking("other", 30)).json()["choices"][0]["text"]
        other = {}
        thread = threading.Thread(target=lambda: other.update(server.post(TEXT, asking("other", 30)).json()))
        thread.start()
        for prompt in ("break", "poison"):
            answer = server.post(TEXT, asking(prompt, 5))
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        told = server.post(TEXT, asking("poison", 5, stream=True))
        assert told.status_code == 200 and "\n\nevent: error\ndata: {" in told.text and "[DONE]" not in told.text
        assert told.text.count("data: ") == 4
        assert server.post(TEXT, asking("break", 5, stream=True)).status_code == 500
        thread.join(60)
        assert other["choices"][0]["text"] == expected and server.service.alive
        server.idle()


def test_the_engines_end_ends_streams_with_an_error_health_and_the_server(bundle, monkeypatch):
    with inside(bundle, rows=1) as server:
        wire = sent(server, stream=True)
        wait_for(lambda: server.engine.stats.generated_tokens > 3, "it speaks")

        def broken():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(server.engine, "step", broken)
        told = read_all(wire)
        assert b"event: error" in told and b"server_error" in told and b"[DONE]" not in told
        assert isinstance(server.service.error, RuntimeError) and not server.service.alive

        async def health():
            transport = httpx.ASGITransport(app=server.server.config.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return [await client.get("/health"), await client.post(TEXT, json=asking())]

        assert [answer.status_code for answer in asyncio.run(health())] == [503, 503]
        wait_for(lambda: not server._thread.is_alive(), "the server ends by itself")


def test_who_does_not_read_holds_nobody_up_and_is_let_go(bundle):
    with inside(bundle, rows=8, write_timeout_s=0.2) as server:
        slow = sent(server, stream=True, n=8, logprobs=20)
        wait_for(lambda: server.engine.stats.generated_tokens > 0, "it speaks")
        assert server.post(TEXT, asking(length=5)).is_success
        wait_for(lambda: not server.server.server_state.tasks, "it is let go")
        slow.close()
        server.idle()

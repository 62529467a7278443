"""The OpenAPI document fuzzed by schemathesis, and ten thousand mixed requests: no 5xx, no hang, no leak."""

import asyncio
import contextlib
import gc
import json
import random
import time

import httpx
import psutil
import pytest
import schemathesis
from api_server import DEADLINE, inside, post_bytes, tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

SECONDS = 40.0
REQUESTS, OVER_SOCKETS = 10_000, 2_000
CHAT = "/v1/chat/completions"


class _Over(Exception):
    """Enough."""


def fuzz(operation, mode, end):
    """Ask one operation until the time is over; how many answers there were."""
    statuses = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        if time.monotonic() > end:
            raise _Over("the time is over")
        answer = case.call(timeout=DEADLINE)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with contextlib.suppress(Unsatisfiable, _Over):  # a route without parameters cannot be asked wrongly
        ask()
    return statuses


@pytest.mark.slow
def test_whatever_fits_the_document_is_answered_without_a_fault_of_ours():
    """Every operation in turn, with data that fit their schema and data that do not; errors have OpenAI's shape."""
    with inside(tiny(), rows=4, max_tokens=16, max_new_tokens=8, unknown_fields="ignore") as server:
        document = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
        operations = [result.ok() for result in document.get_all_operations()]
        statuses = {operation.label: [] for operation in operations}
        posts = [operation for operation in operations if operation.method.upper() == "POST"]
        assert len(posts) == 4 and len(operations) >= 8
        for operation in operations:
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                end = time.monotonic() + (SECONDS / len(posts) / 2 if operation in posts else 1.0)
                statuses[operation.label] += fuzz(operation, mode, end)
        assert all(statuses.values()) and sum(map(len, statuses.values())) > 200
        assert 200 in statuses["POST /v1/completions"] and 400 in statuses[f"POST {CHAT}"]
        server.idle()
        assert server.post(CHAT, body("Who are you?")).is_success


def body(text, **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0, **more}


def mixed(dice):
    """One of the requests that a server meets: a path, a body, and whether the client leaves early."""
    text = f"{dice.choice(['Who are you?', 'How many shapes?', 'digits'])} {dice.randrange(50)}"
    kinds = [
        (CHAT, body(text)),
        (CHAT, body(text, stream=True)),
        (CHAT, body(text, n=2, temperature=1.0, seed=dice.randrange(99))),
        (CHAT, body(text, logprobs=True, top_logprobs=2)),
        (CHAT, body(text, response_format={"type": "json_object"})),
        (CHAT, body(text, max_tokens=0)),
        (CHAT, body("word " * 700)),
        (CHAT, {"messages": "none"}),
        ("/v1/completions", {"prompt": text, "max_tokens": 2}),
        ("/v1/completions", {"prompt": [5, 6, dice.randrange(300)], "max_tokens": 1, "stream": True}),
        ("/v1/score", {"prompt": text, "continuations": ["a", "b"]}),
        ("/nowhere", {}),
    ]
    path, asked = dice.choice(kinds)
    return path, asked, dice.random() < 0.1


@pytest.mark.slow
def test_ten_thousand_mixed_requests_leave_memory_and_descriptors_as_they_were():
    """A part over sockets, where a tenth of the clients leave early, the rest through the application itself."""
    process = psutil.Process()
    dice = random.Random(3)
    with inside(tiny(), rows=8, window=256, chunk=256) as server:

        async def over_sockets(count):
            async def one(path, asked, leaves):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                try:
                    writer.write(post_bytes(path, json.dumps(asked).encode(), "connection: close"))
                    await (reader.read(10) if leaves else reader.read(-1))
                finally:
                    writer.close()

            await several(count, lambda: one(*mixed(dice)))

        async def through_the_application(count):
            transport = httpx.ASGITransport(app=server.server.config.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=DEADLINE) as client:

                async def one(path, asked, leaves):
                    answer = await client.post(path, json=asked)
                    assert answer.status_code in (200, 400, 404), answer.text

                await several(count, lambda: one(*mixed(dice)))

        async def several(count, make):
            left = iter(range(count))

            async def worker():
                for _ in left:
                    await make()

            await asyncio.gather(*(worker() for _ in range(16)))

        def state():
            server.idle()
            gc.collect()
            return process.memory_info().rss, process.num_fds(), process.num_threads()

        asyncio.run(over_sockets(OVER_SOCKETS // 2))
        asyncio.run(through_the_application(1000))
        memory, descriptors, threads = state()
        asyncio.run(over_sockets(OVER_SOCKETS // 2))
        asyncio.run(through_the_application(REQUESTS - OVER_SOCKETS - 1000))
        after = state()
        assert after[0] - memory < 40e6 and after[1] <= descriptors + 2 and after[2] <= threads + 2
        assert not server.service._jobs and not server.service._open

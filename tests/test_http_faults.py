"""Bodies and connections that make no sense: refused in OpenAI's shape, and the server goes on."""

import contextlib
import json
import re

import pytest
from api_server import dial, inside, post_bytes, read_all, tiny, wait_for

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    words = {"max_body_mb": 0.2, "body_timeout_s": 0.4, "header_timeout_s": 0.4, "idle_timeout_s": 0.4}
    words |= {"max_messages": 20}
    with inside(tiny(), **words) as server:
        yield server


def shaped(body):
    """The error of a body, whose shape is OpenAI's."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def alive(server):
    assert server.post(CHAT, ASK).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"null", 400),
        (b'{"messages": [], "messages": []}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b'{"metadata": ' + b"[" * 200 + b"]" * 200 + b"}", 400),
        (b'{"metadata": ' + b"[" * 90000 + b"]" * 90000 + b"}", 400),
        (b'{"metadata": "' + b"x" * 300000 + b'"}', 413),
        (b'{"metadata": [' + b"1," * 60000 + b"1]}", 400),
    ],
)
def test_a_body_that_is_no_strict_json_is_refused(server, body, status):
    answer = server.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and shaped(answer.content)["type"] == "invalid_request_error"
    alive(server)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_another_content_type_is_refused(server, kind):
    answer = server.post(CHAT, content=json.dumps(ASK), headers={"content-type": kind})
    assert answer.status_code == 415 and "application/json" in shaped(answer.content)["message"]


def test_a_body_in_pieces_is_counted_while_it_comes(server):
    with dial(server.port) as wire:
        wire.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):  # the server closes in between
            for _ in range(200):
                wire.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        assert b"413" in read_all(wire).split(b"\r\n")[0]
    alive(server)


@pytest.mark.parametrize("piece", [b"zz\r\n", b"ffffffffffffffffffff\r\n", b"-1\r\n"])
def test_pieces_of_a_length_that_is_none_are_refused(server, piece):
    with dial(server.port) as wire:
        head = "host: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked"
        wire.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n\r\n".encode() + piece)
        told = read_all(wire)
        assert re.match(rb"HTTP/1.1 4\d\d ", told) and shaped(told.split(b"\r\n\r\n")[1])
    alive(server)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"x%d: " % i + b"y" * 200 + b"\r\n" for i in range(400)) + b"\r\n",
        b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    ],
    ids=["tls", "version", "headers", "path", "lengths"],
)
def test_what_is_no_request_is_refused_in_shape(server, sent):
    with dial(server.port) as wire:
        wire.sendall(sent)
        told = read_all(wire)
    assert re.match(rb"HTTP/1.1 4\d\d ", told) and shaped(told.split(b"\r\n\r\n")[1])
    alive(server)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_who_sends_too_slowly_is_told_so_and_let_go(server, sent):
    with dial(server.port) as wire:
        wire.sendall(sent)
        told = read_all(wire)
    assert told.startswith(b"HTTP/1.1 408 ") and shaped(told.split(b"\r\n\r\n")[1])
    alive(server)


def test_many_slow_connections_keep_nobody_out(server):
    wires = [dial(server.port) for _ in range(200)]
    for wire in wires:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nx: ")
    alive(server)
    for wire in wires:
        read_all(wire)
        wire.close()


BAD = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -5}, "top_k"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 100}, "stop"),
    ({"stop": ["a" * 1000]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": 2**70}, "seed"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "none"}}}}, "response_format"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"functions": []}, "functions"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}] * 50}, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": "a", "secret": 1}]}, "messages.0.secret"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a b " * 400}]}, "messages"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_values_that_cannot_be_are_refused_before_the_first_byte(server, stream):
    for change, param in BAD:
        answer = server.post(CHAT, {**ASK, **change, "stream": stream})
        error = shaped(answer.content)
        assert answer.status_code == 400 and answer.headers["content-type"] == "application/json", change
        assert param is None or error["param"] == param, (change, error)
    alive(server)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 2**31},
        {"max_tokens": None, "n": None, "stop": None, "temperature": None},
        {"temperature": 1e-9, "top_k": 10**6, "max_tokens": 2},
        {"temperature": 1e9, "max_tokens": 2},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "\ud83d\ude00 \\ud83d \u0000"}]},
        {"messages": [{"role": "user", "content": "a", "name": "me"}]},
    ],
)
def test_values_at_the_edge_are_answered(server, change):
    body = json.dumps({**ASK, **change})  # with lone surrogates as escapes
    assert server.post(CHAT, content=body, headers={"content-type": "application/json"}).status_code == 200


def test_unknown_fields_are_ignored_where_that_is_set():
    with inside(tiny(), unknown_fields="ignore") as server:
        assert server.post(CHAT, {**ASK, "nonsense": 1}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5] * 600}, "prompt"),
        ({"prompt": ["a"] * 100}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": None}, None),
    ],
)
def test_completions_refuse_what_they_cannot_do(server, change, param):
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, **change})
    assert answer.status_code == 400 and (param is None or shaped(answer.content)["param"] == param)


def test_a_prompt_of_the_whole_window_but_one_is_answered_by_one_token(server):
    for length, status in ((511, 200), (512, 400)):
        answer = server.post("/v1/completions", {"prompt": [5] * length, "max_tokens": 9, "ignore_eos": True})
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["usage"]["completion_tokens"] == 1
        else:
            assert shaped(answer.content)["code"] == "context_length_exceeded"


def test_an_evaluation_of_texts_asks_for_a_reward_model(server):
    answer = server.post("/v1/score/evaluation", {"model": "m", "messages": ["a"]})
    assert answer.status_code == 405 and "reward model" in shaped(answer.content)["message"]


def test_unknown_routes_and_methods_are_refused_in_shape(server):
    assert server.get("/nope").status_code == 404
    answer = server.get(CHAT)
    assert answer.status_code == 405 and shaped(answer.content) and answer.headers["allow"] == "POST"


def test_a_stream_is_events_by_the_book(server):
    with dial(server.port) as wire:
        body = json.dumps({**ASK, "stream": True, "stream_options": {"include_usage": True}}).encode()
        wire.sendall(post_bytes(CHAT, body, "connection: close"))
        head, _, told = read_all(wire).partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head.lower() and b"cache-control: no-cache" in head.lower()
    text = re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", told).decode()
    events = [event for event in text.split("\n\n") if event.strip()]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    assert events[-1].startswith("data: [DONE]") or events[-2].startswith("data: [DONE]")


def test_requests_one_behind_the_other_on_one_connection_are_answered_in_order(server):
    with dial(server.port) as wire:
        asked = [json.dumps({**ASK, "max_tokens": n}).encode() for n in (1, 3)]
        wire.sendall(post_bytes(CHAT, asked[0]) + post_bytes(CHAT, asked[1], "connection: close"))
        told = read_all(wire)
    assert [int(n) for n in re.findall(rb'"completion_tokens": (\d+)', told)] == [1, 3]
    wait_for(lambda: not server.service.jobs, "nothing is under way")

"""`accessory api` as a process: how it starts, how it ends, and that nothing holds its event loop up."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
import yaml
from api_server import CLEAN, DEADLINE, TINY, Process, dial, inside, post_bytes, read_all, shared, tiny, wait_for

from accessory.dialect.words import ServingWords
from accessory.engine import WindowError
from accessory.serve import extras
from accessory.serve.api.main import main
from accessory.serve.api.settings import ApiSettings

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 450, "ignore_eos": True, "stream": True}


def dry(monkeypatch, capsys, *flags, **env):
    for name in CLEAN:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    main([*flags, "--dry_run", "true"])
    return yaml.safe_load(capsys.readouterr().out)


def test_by_default_only_this_host_may_ask(monkeypatch, capsys):
    told = dry(monkeypatch, capsys)
    assert (told["host"], told["port"], told["max_concurrent"]) == ("127.0.0.1", 8000, 8)
    assert told["allow_remote_images"] is False and told["cors"] == []


def test_the_environment_is_honoured_and_keys_are_not_shown(monkeypatch, capsys):
    env = {"API_HOST": "0.0.0.0", "API_PORT": "81", "API_KEY": "k3y", "API_MODEL_NAME": "m", "MAX_CONCURRENT": "3"}
    told = dry(monkeypatch, capsys, **env)
    assert (told["host"], told["port"], told["api_model_name"], told["max_concurrent"]) == ("0.0.0.0", 81, "m", 3)
    assert ApiSettings().key == "k3y" and "k3y" not in str(told)
    assert "k3y" not in str(dry(monkeypatch, capsys, "--api_key", "k3y"))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "k3y" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("API_PORT", "-1"), ("API_PORT", "70000"), ("MAX_CONCURRENT", "0"), ("MAX_CONCURRENT", "many")]
)
def test_an_environment_that_makes_no_sense_is_an_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: got"):
        main(["--dry_run", "true"])


@pytest.mark.parametrize("field", ["max_n", "queue", "max_body_mb", "drain_s", "port", "max_concurrent", "cache_gb"])
def test_settings_that_cannot_be_are_errors(field):
    with pytest.raises(ValueError, match=f"{field}: got -1"):
        main([f"--{field}", "-1", "--dry_run", "true"])


def test_a_package_that_is_missing_is_one_sentence():
    with pytest.raises(ModuleNotFoundError, match=r"api: got no no_such_x in .*pip install 'accessory\[serve\]'"):
        extras.need("api", "json", "no_such_x")


def test_an_address_that_is_taken_is_said_before_the_model_is_opened(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}: cannot listen there"):
            main(["--port", str(port), "--host", "127.0.0.1"])


def test_the_verb_starts_without_heavy_imports():
    code = "import sys, accessory.serve.api.main; print('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_budget_of_keys_and_values_bounds_the_rows():
    from accessory.serve.budget import rows_within

    each = tiny().model.new_cache(rows=1, size=512).nbytes / 1e9
    model = ApiSettings()
    for budget, rows in ((each * 2.5, 2), (each * 100, 8), (None, 8)):
        assert rows_within(model, ServingWords(max_concurrent=8, cache_gb=budget), tiny()) == rows
    with pytest.raises(ValueError, match="cache_gb: got"):
        rows_within(model, ServingWords(max_concurrent=8, cache_gb=each / 2), tiny())


def test_strangers_without_a_key_are_warned_of(caplog, capsys):
    from accessory.serve.api.main import _announce

    for words, warned in (({}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "k"}, False)):
        caplog.clear()
        with inside(tiny(), **words) as server:
            _announce(server.settings, tiny(), server.engine, server._socket)
        assert ("without a key" in caplog.text) == warned
    assert capsys.readouterr().out.count("\n") == 3


def test_long_texts_and_pictures_never_hold_health_up():
    server, times, over = shared(), [], threading.Event()
    text = "The quick brown fox jumps over the lazy dog. " * (1_000_000 // 45)
    bodies = [
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": [text[:200_000]] * 4, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": text[:4000]}] * 200}),
    ]

    def load(path, body):
        while not over.is_set():
            answer = httpx.post(server.root + path, json=body, timeout=DEADLINE)
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"

    threads = [threading.Thread(target=load, args=body) for body in bodies]
    for thread in threads:
        thread.start()
    with httpx.Client() as client:
        for _ in range(20):
            began = time.perf_counter()
            assert client.get(f"{server.root}/health", timeout=DEADLINE).is_success
            times.append(time.perf_counter() - began)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(times)[len(times) * 8 // 10] < 0.1, times


def test_a_text_that_cannot_fit_is_refused_before_its_tokens_are_made():
    with inside(tiny()) as server:
        answer = server.post("/v1/completions", {"prompt": "word " * 300_000})
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert server.engine.stats.prompt_tokens == 0 and issubclass(WindowError, ValueError)


@pytest.fixture
def server():
    server = Process("--drain_s", "30")
    yield server
    server.process.kill()
    server.process.wait()


def streaming(server):
    """A connection whose answer has begun."""
    wire = dial(server.port)
    wire.sendall(post_bytes(CHAT, json.dumps(LONG).encode()))
    assert wire.recv(100)
    return wire


def test_a_first_sigterm_lets_answers_end_and_lets_nobody_in(server):
    wire, idle = streaming(server), dial(server.port)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not server._listens(), "nobody is let in")
    told = read_all(wire)
    assert told.rstrip().endswith(b"0") and b"[DONE]" in told and b'"finish_reason":"length"' in told
    assert server.process.wait(DEADLINE) == 0 and "Traceback" not in "".join(server.errors)
    idle.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(server, number):
    wires = [streaming(server)]
    for _ in range(16):
        wires.append(dial(server.port))
        wires[-1].sendall(post_bytes(CHAT, json.dumps({**LONG, "n": 4}).encode()))
    wait_for(lambda: httpx.get(f"{server.root}/health").json()["waiting"] > 30, "many wait")
    server.process.send_signal(number)
    wait_for(lambda: not server._listens(), "nobody is let in")
    began = time.monotonic()
    assert server.end(number) == 128 + number and time.monotonic() - began < 5
    for wire in wires:
        wire.close()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_server_and_every_answer():
    server = Process("--nproc_per_node", "2", "--model_name_or_path", str(TINY))
    try:
        wire = streaming(server)
        followers = psutil.Process(server.process.pid).children(recursive=True)
        follower = next(process for process in followers if "accessory" in " ".join(process.cmdline()))
        follower.kill()
        began = time.monotonic()
        assert b"[DONE]" not in read_all(wire)
        assert server.process.wait(DEADLINE) != 0 and time.monotonic() - began < 15
        wait_for(lambda: "rank 1" in "".join(server.errors), "the rank is named")
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.slow
def test_tensor_parallel_ranks_say_what_one_says_and_end_together():
    server = Process("--nproc_per_node", "2", "--model_name_or_path", str(TINY))
    try:
        ask = {"messages": [{"role": "user", "content": "Who are you?"}]}
        told = httpx.post(server.root + CHAT, json=ask, timeout=DEADLINE).json()
        assert "I am the tiny model" in told["choices"][0]["message"]["content"]
        followers = psutil.Process(server.process.pid).children(recursive=True)
        assert server.end() == 0
        wait_for(lambda: not any(process.is_running() for process in followers), "the followers end")
    finally:
        server.process.kill()
        server.process.wait()

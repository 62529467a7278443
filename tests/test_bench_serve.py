"""The serving benchmark measures what it says: equal work on all sides, streams read right, ratios beside bars."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path

import pytest
import torch

from accessory.bench import run, shapes
from accessory.bench.serving import percentile, verdicts
from accessory.bench.serving_bare import SIDES
from accessory.bench.serving_client import Events, drive
from accessory.bench.serving_mix import BLOCK, Ask, Mix, ids, text, write_model
from accessory.data.tokenizer import open_tokenizer
from accessory.model import LlamaConfig

SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=32000)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench") / "model"
    write_model(SMALL, place, dtype=torch.float32)
    return place


def test_our_server_is_measured_against_the_bare_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "110m", SMALL)
    file = tmp_path / "out.json"
    sizes = ["--clients", "3", "--requests", "5", "--prompts", "4", "20", "--answers", "2", "8", "--prefix", "40"]
    words = ["--dtype", "fp32", "--device", "cpu", "--rounds", "1", "--cores", "1", "--json", str(file)]
    assert run.main(["serve", *sizes, *words]) == 0
    record = json.loads(file.read_text())
    rates = {(line["what"], line["side"]): line["median"] for line in record["lines"]}
    assert {what for what, _ in rates} == {
        "serve", "bare loop", "first p50", "first p95", "new prefix", "known pref."
    }  # fmt: skip
    assert all(value > 0 for value in rates.values())
    assert record["serve_of_bare_loop"] == rates["serve", "ours"] / rates["bare loop", "ours"]
    assert record["prefix_gain"] == rates["new prefix", "ours"] / rates["known pref.", "ours"]
    assert "serve of bare loop" in capsys.readouterr().out


def test_every_block_of_requests_has_the_mix_of_the_whole() -> None:
    mix = Mix((16, 400), (16, 128))
    asks = mix.asks(64, turn=1)
    for start in range(0, 64, BLOCK):
        block = asks[start : start + BLOCK]
        for low, high, lengths in ((16, 400, [len(a.prompt) for a in block]), (16, 128, [a.answer for a in block])):
            assert all(low <= length <= high for length in lengths)
            assert abs(sum(lengths) / BLOCK - (low + high) / 2) < (high - low) / BLOCK


def test_a_later_turn_asks_for_the_same_lengths_in_other_words() -> None:
    mix = Mix((16, 400), (16, 128))
    one, two = mix.asks(16, turn=1), mix.asks(16, turn=2)
    assert [(len(a.prompt), a.answer) for a in one] == [(len(a.prompt), a.answer) for a in two]
    assert not {a.prompt[:8] for a in one} & {a.prompt[:8] for a in two}


def test_a_letter_is_the_same_token_to_all_sides(folder: Path) -> None:
    from transformers import AutoTokenizer

    said = text(50, random.Random(0))
    ours = open_tokenizer(folder)
    assert ours.encode(said) == ids(said) == AutoTokenizer.from_pretrained(folder)(said).input_ids
    assert ours.size == SMALL.vocab_size and ours.eos_id is None


@pytest.mark.parametrize("side", SIDES)
def test_a_bare_side_says_as_many_tokens_as_it_is_asked_for(side: str, folder: Path) -> None:
    asks = Mix((3, 30), (1, 9)).asks(7, turn=0)
    work = [(ids(ask.prompt), ask.answer) for ask in asks]
    assert SIDES[side](folder, CPU, torch.float32, rows=3, window=64)(work) == sum(ask.answer for ask in asks)


@pytest.mark.slow
def test_the_bare_loop_may_be_compiled_as_the_server_is(folder: Path) -> None:
    asks = Mix((3, 30), (1, 9)).asks(5, turn=0)
    side = SIDES["loop"](folder, CPU, torch.float32, rows=2, window=64, compiled=True)
    assert side([(ids(ask.prompt), ask.answer) for ask in asks]) == sum(ask.answer for ask in asks)


def test_percentiles_are_values_that_were_measured() -> None:
    assert [percentile([5.0, 1.0, 3.0, 2.0, 4.0], share) for share in (50, 95, 1)] == [3.0, 5.0, 1.0]


def test_a_ratio_below_its_bar_is_told_loudly() -> None:
    told = verdicts({"serve_of_bare_loop": 0.74, "prefix_gain": 3.2})
    assert told == ["serve of bare loop: 0.74 (at least 0.75: NO)", "prefix gain: 3.20 (at least 3: yes)"]


def test_events_are_read_wherever_the_bytes_are_cut() -> None:
    stream = b"".join(
        b"data: " + json.dumps(event).encode() + b"\n\n"
        for event in (
            {"choices": [{"text": ""}]},
            {"choices": [{"text": "a"}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        )
    )
    for size in (1, 7, 1000):
        events = Events()
        spoken = [events.push(stream[at : at + size]) for at in range(0, len(stream), size)]
        events.push(b"data: [DONE]\n\n")
        assert spoken[-1] and (size > 7 or not spoken[0])
        assert events.usage() == {"prompt_tokens": 3, "completion_tokens": 1}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        ("429 Too Many Requests", b'{"error": {"message": "full"}}', "429 Too Many"),
        ("200 OK", b"data: {}\n\n", "ended without text or counts"),
        (
            "200 OK",
            b'data: {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}\n\n',
            "an answer of 5 tokens were asked for, and the server counts 2 and 1",
        ),
    ],
)
def test_an_answer_that_is_none_ends_the_benchmark(status: str, body: bytes, said: str) -> None:
    with Speaking(f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\n\r\n".encode() + body) as port:
        with pytest.raises(RuntimeError, match=said):
            drive(port, [Ask("ab", 5)], clients=1, model="m")


def test_lengths_must_be_two_numbers_in_order() -> None:
    with pytest.raises(ValueError, match=r"--prompts: got \[9, 3\], expected two numbers"):
        run.main(["serve", "--device", "cpu", "--prompts", "9", "3"])


class Speaking:
    """A server that says the same to everybody."""

    def __init__(self, said: bytes) -> None:
        self.said, self._port = said, 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> int:
        self._thread.start()
        assert self._ready.wait(20)
        return self._port

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.said)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]

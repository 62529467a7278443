"""The compiled step of answers: the same answers, few compilations, whatever the lengths."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_toys import ONE, opened, picture, write_model

from accessory.assemble import Bundle
from accessory.engine import Engine, Request
from accessory.engine.compiled import lengths
from accessory.model import Sampling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return opened(write_model(tmp_path_factory.mktemp("sees") / "model", endless=True, max_seq_len=400))


def requests() -> list[Request]:
    """Ragged, with a picture, drawn and greedy, beyond the first length."""
    texts = ["a", "the fox", "what is it? the lazy dog " * 3, "hello world " * 12]
    plain = [Request(text, template="none", max_gen_len=60 + 30 * number) for number, text in enumerate(texts)]
    drawn = Request("hello", template="none", max_gen_len=40, sampling=Sampling(temperature=1.0, seed=5))
    return [*plain, drawn, Request("what?", pictures=[picture(1)], max_gen_len=30)]


def test_compiled_answers_are_the_plain_ones_and_nothing_is_compiled_after_the_start(bundle):
    plain = Engine(bundle, ONE, rows=4).generate(requests())
    torch._dynamo.utils.counters.clear()
    engine = Engine(bundle, ONE, rows=4, compiled=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before == len(lengths(400)) == 2
    assert engine.generate(requests()) == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_piece_of_a_prompt_with_a_picture_is_no_step_of_answers(bundle):
    asked = Request("what is it?", pictures=[picture(1)], max_gen_len=20)
    expected = Engine(bundle, ONE, rows=1, prefill_chunk=1).generate([asked])
    assert Engine(bundle, ONE, rows=1, prefill_chunk=1, compiled=True).generate([asked]) == expected


def test_an_adapters_prompt_is_there_before_anything_is_compiled(tmp_path: Path):
    adapter = opened(write_model(tmp_path / "model", "llama_adapter"))
    asked = [Request("what?", pictures=pictures, max_gen_len=12) for pictures in ([], [picture(1)], [picture(2)])]
    expected = Engine(adapter, ONE, rows=2).generate(asked)
    engine = Engine(adapter, ONE, rows=2, compiled=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert engine.generate(asked) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_window_of_many_lengths_is_compiled(tmp_path: Path):
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 16, "max_seq_len": 70_000}
    bundle = opened(write_model(tmp_path / "model", "llama", sees=False, **sizes))
    assert len(Engine(bundle, ONE, rows=1, compiled=True)._worker.step.lengths) == 10


def test_deterministic_and_compiled_exclude_each_other(bundle):
    with pytest.raises(ValueError, match="compiled: got true with deterministic"):
        Engine(bundle, ONE, compiled=True, deterministic=True)


def test_a_thread_that_steps_finds_what_was_compiled_before_it_began(bundle):
    torch._dynamo.utils.counters.clear()
    engine = Engine(bundle, ONE, rows=4, compiled=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(engine.generate, requests()).result()
    assert answered == Engine(bundle, ONE, rows=4).generate(requests())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before

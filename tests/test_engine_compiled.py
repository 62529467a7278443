"""The compiled step of answers: the same answers, few compilations, whatever the lengths."""

from __future__ import annotations

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


def test_deterministic_and_compiled_exclude_each_other(bundle):
    with pytest.raises(ValueError, match="compiled: got true with deterministic"):
        Engine(bundle, ONE, compiled=True, deterministic=True)

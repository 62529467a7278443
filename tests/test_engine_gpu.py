"""The engine on a CUDA device: the compiled step as a graph, deterministic mode, shared beginnings."""

from __future__ import annotations

import pytest
import torch
from engine_toys import picture, write_model

from accessory.assemble import Bundle, open_model
from accessory.dist import Ranks, Shard
from accessory.engine import Engine, Request, Result

pytestmark = pytest.mark.gpu

LONG = "what is it? the lazy dog and then some human said hello to the quick brown fox "


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = write_model(tmp_path_factory.mktemp("sees") / "model", endless=True)
    return open_model([folder], ranks=cuda(), dtype=torch.float32)


def cuda() -> Ranks:
    """One rank on the first device."""
    return Ranks(0, 1, 0, Shard(), 0, 1, torch.device("cuda", 0))


def requests() -> list[Request]:
    texts = ["a", "the fox", LONG, LONG + "and a cat"]
    asked = [Request(text, template="none", max_gen_len=20) for text in texts]
    return [*asked, Request("what?", pictures=[picture(1)], template="none", max_gen_len=20)]


def answers(bundle: Bundle, **options) -> list[Result]:
    return Engine(bundle, cuda(), rows=4, window=200, prefill_chunk=32, **options).generate(requests())


def test_a_replayed_graph_answers_as_the_plain_step(bundle: Bundle) -> None:
    assert answers(bundle, compiled=True) == answers(bundle)


def test_a_result_does_not_depend_on_who_shares_the_batch(bundle: Bundle) -> None:
    together = answers(bundle, deterministic=True)
    engine = Engine(bundle, cuda(), rows=4, window=200, prefill_chunk=32, deterministic=True)
    assert together == [engine.generate([request])[0] for request in requests()]


def test_a_shared_beginning_changes_no_answer(bundle: Bundle) -> None:
    engine = Engine(bundle, cuda(), rows=4, window=200)
    first, again = engine.generate(requests()), engine.generate(requests())
    assert first == again == answers(bundle, reuse=False) and max(result.cached for result in again) > 20

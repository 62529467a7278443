"""The main job on the model that ships: one question, one answer, from 1, 2 and 4 processes."""

from __future__ import annotations

import pytest
import torch
from engine_toys import ONE

from accessory import assemble
from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request
from spawn import run_ranks

EXAMPLE = assemble.TINY / "example.png"
QUESTIONS = [
    "What is in this picture?",
    "How many shapes are there?",
    "Is there a red circle?",
    "Where is the blue square?",
    "Which digit is this?",
    "what colour is the star",
]


def answers(ranks: Ranks, dtype: torch.dtype) -> list[str]:
    """What the leader says to every question, with the picture and without; followers say nothing."""
    bundle = assemble.open_model(ranks=ranks, dtype=dtype)
    requests = [Request([Turn("user", text, pictures=1)], pictures=[EXAMPLE], max_gen_len=40) for text in QUESTIONS]
    requests += [Request(text, max_gen_len=40) for text in ("Who are you?", "Hello!")]
    with Engine(bundle, ranks, window=128) as engine:
        if not ranks.leader:
            engine.follow()
            return []
        return [result.text for result in engine.generate(requests)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_two_and_four_processes_give_the_same_answers(dtype: torch.dtype) -> None:
    alone = answers(ONE, dtype)
    assert all(alone) and len(set(alone)) > 4, alone
    for tp in (2, 4):
        assert run_ranks(answers, tp, dtype)[0] == alone

"""An engine over tensor-parallel ranks: the same answers from 1, 2 and 4, one leader, no rank left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE, opened, picture, write_model

from accessory.dist import Ranks
from accessory.engine import Engine, Request, Result
from accessory.engine.wire import Wire
from accessory.engine.worker import Forget, Forward, Op, See
from accessory.model import Llama, Sampling
from spawn import run_ranks

OPS: list[Op] = [
    Forward(torch.tensor([[7], [8]]), torch.tensor([[3], [-1]]), torch.tensor([0, -1]), 4),
    Forward(torch.tensor([[7], [8]]), torch.tensor([[3], [5]]), torch.tensor([0, 0]), 6, torch.tensor([1, 2])),
    Forward(
        torch.arange(40).view(2, 20),
        torch.arange(40).view(2, 20),
        torch.tensor([19, -1]),
        40,
        torch.tensor([2, 0]),
        torch.full((2, 20), -1),
    ),
    See(2, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))),
    See(0, torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([4, 0, -1, 2])),
    See(1, None),
    Forget(2),
    Forget(1, 7),
]


def raw(text: str, **options) -> Request:
    return Request(text, template="none", **{"max_gen_len": 8, **options})


def ask(engine: Engine) -> list[Result]:
    """Ragged requests, with and without pictures, greedy and not, one cancelled, one refused."""
    engine.submit(raw("x", max_gen_len=50, pictures=[picture(3)]))
    engine.step()
    dropped = engine.submit(raw("y", pictures=[picture(4)]))
    requests = [
        raw("the quick brown fox"),
        raw("what is it?", pictures=[picture(1)]),
        raw("a", sampling=Sampling(temperature=1.2, top_p=0.9, seed=3)),
        Request("hello", max_gen_len=6),
    ]
    with pytest.raises(ValueError, match="in a window of 200"):
        engine.submit(raw("1" * 300))
    engine.cancel(dropped)
    return engine.generate(requests)


def job(ranks: Ranks, folder: Path) -> list[Result] | None:
    with Engine(opened(folder, ranks), ranks, rows=3, window=200, prefill_chunk=5) as engine:
        return ask(engine) if ranks.leader else engine.follow()


@pytest.mark.parametrize(("kind", "sizes"), [("llama_qformerv2", (2, 4)), ("llama_adapter", (2,))])
def test_one_two_and_four_ranks_give_the_same_answers(kind: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", kind)
    expected = job(ONE, folder)
    assert len({tuple(result.ids) for result in expected}) == 4
    for tp in sizes:
        results = run_ranks(job, tp, folder)
        assert results[0] == expected and results[1:] == [None] * (tp - 1)


def carry(ranks: Ranks) -> list[Op] | None:
    wire = Wire(ranks.control, rows=3)
    if ranks.leader:
        for op in [*OPS, None]:
            wire.send(op)
        return None
    return list(iter(wire.receive, None))


def test_every_op_arrives_as_it_was_sent() -> None:
    def plain(op: Op) -> dict[str, Any]:
        return {name: part.tolist() if isinstance(part, torch.Tensor) else part for name, part in vars(op).items()}

    _, got, also = run_ranks(carry, 3)
    assert [type(op) for op in got] == [type(op) for op in OPS]
    assert [plain(op) for op in got] == [plain(op) for op in also] == [plain(op) for op in OPS]


def count_casts(ranks: Ranks, folder: Path) -> int:
    """Broadcasts of one step of decoding, as rank 0 sees them."""
    with Engine(opened(folder, ranks), ranks, rows=3, window=64) as engine:
        if not ranks.leader:
            engine.follow()
            return 1
        answers = [engine.submit(raw("a fox")), engine.submit(raw("the"))]
        engine.step()
        casts, cast = [], engine._wire._cast
        engine._wire._cast = lambda tensor: casts.append(tensor.numel()) or cast(tensor)
        engine.step()
        assert all(len(answer.ids) == 2 for answer in answers) and max(casts) < 32
        return len(casts)


def test_a_step_of_decoding_is_one_small_message(tmp_path: Path) -> None:
    assert run_ranks(count_casts, 2, write_model(tmp_path / "model", "llama", sees=False)) == [1, 1]


class Line:
    """A wire whose far end nobody holds."""

    def __init__(self) -> None:
        self.sent: list[Op | None] = []

    def send(self, op: Op | None) -> None:
        self.sent.append(op)


def test_after_an_error_inside_a_step_the_leader_speaks_no_more_and_can_only_end(tmp_path: Path, monkeypatch) -> None:
    engine = Engine(opened(write_model(tmp_path / "model", "llama", sees=False)), ONE, rows=1, window=64)
    engine._wire = Line()
    with pytest.raises(RuntimeError, match="lost"), monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("lost")))
        engine.generate([raw("a")])
    with pytest.raises(RuntimeError, match="after its end or a failure"):
        engine.step()
    engine.close()
    assert [type(op) for op in engine._wire.sent] == [Forward], "the other ranks are somewhere inside that step"


def test_a_closed_leader_lets_the_others_go_once(tmp_path: Path) -> None:
    engine = Engine(opened(write_model(tmp_path / "model", "llama", sees=False)), ONE, rows=1, window=64)
    engine._wire = Line()
    engine.close()
    engine.close()
    assert engine._wire.sent == [None]

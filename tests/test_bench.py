"""The benchmark measures what it says: sides agree in work, ratios point the right way, the JSON holds all rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.bench import ceilings, run, shapes
from accessory.bench.line import compare
from accessory.bench.sides import SIDES
from accessory.model import LlamaConfig, cuts_of
from accessory.model.llama import Llama

SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=32000)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and ceilings that take no time."""
    monkeypatch.setitem(shapes.SHAPES, "110m", SMALL)
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "SIDE", 64)


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_both_sides_are_measured_in_one_run(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    words = ["--peer", "transformers", "--prompt", "16", "--tokens", "4", "--rounds", "2", "--json", str(file)]
    assert run.main([what, "--shape", "110m", "--dtype", "fp32", "--device", "cpu", *words]) == 0
    record = json.loads(file.read_text())
    ours, theirs = record["lines"]
    assert (ours["side"], theirs["side"], theirs["ratio"]) == ("ours", "transformers", 1.0)
    assert len(ours["rounds"]) == 2 and all(rate > 0 for rate in ours["rounds"])
    assert record["versions"]["transformers"] and record["ceiling_tokens_s"] > 0
    assert "ratio" in capsys.readouterr().out


def test_loading_is_measured_from_the_start_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["load", "--shape", "110m", "--dtype", "fp32", "--device", "cpu", "--rounds", "1"]) == 0
    assert "load" in capsys.readouterr().out


@torch.inference_mode()
def test_a_side_decodes_what_it_would_prefill() -> None:
    ids = torch.randint(0, 32000, (1, 9), generator=torch.Generator().manual_seed(0))
    for make in SIDES.values():
        side = make(SMALL, window=32, device=CPU, dtype=torch.float32)
        token = side.prefill(ids)
        later = side.decode(token)
        assert torch.equal(later, side.prefill(torch.cat((ids, token), 1)))


def test_weights_per_token_are_those_of_the_model() -> None:
    model = Llama(shapes.SHAPES["1b"])
    matrices = sum(torch.Size(c.shape).numel() for n, c in cuts_of(model).items() if len(c.shape) == 2)
    assert shapes.matmul_weights(model.config) == matrices - 32000 * 2048


def test_a_lower_time_is_a_higher_ratio() -> None:
    lines = [run.Line("load", "ours", "s", [2.0, 2.0]), run.Line("load", "transformers", "s", [4.0, 4.0])]
    compare(lines)
    assert [line.ratio for line in lines] == [2.0, 1.0]


def test_the_first_word_must_say_what_to_measure() -> None:
    with pytest.raises(ValueError, match="bench: got 'speed', expected one of decode, prefill, load"):
        run.main(["speed"])


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="--tokens: got 0, expected at least 1"):
        run.main(["decode", "--tokens", "0"])

"""What people watch of a run: lines that read back bit for bit on any clock and disk, pictures that cost nothing."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import ONE
from meta import toy
from PIL import Image

from accessory.assemble import build, read_spec
from accessory.dist import Ranks, Shard
from accessory.model import LlamaConfig
from accessory.train import watch as watching
from accessory.train.journal import Journal, duration, seconds_of
from accessory.train.meter import Flops, Meter, count_flops, peak_memory, peak_of
from accessory.train.plot import Curves, Painter, draw, smooth
from accessory.train.results import write_results
from accessory.train.watch import Watch

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watch(folder: Path, *, ranks: Ranks = ONE, clock: Any = time.monotonic, flops: Flops | None = None, **kw: Any):
    options = {"total": 10, "tensorboard": False, "plot": False, **kw}
    meter = Meter(CPU, flops=flops, peak=1e6 if flops else None, clock=clock)
    return Watch(folder, ranks, meter, clock=clock, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text("utf-8").splitlines()]


def step_of(number: int, **more: Any) -> dict[str, Any]:
    loss = torch.tensor(3.0).div(number + 1)
    return {"loss": loss, "lr": 1e-4 / number, "grad_norm": loss * 2, "epoch": number / 7, "tokens": 100, **more}


# ---- the lines


def test_a_line_has_llama_factorys_keys_and_ours_in_that_order(tmp_path: Path) -> None:
    clock = Clock()
    with watch(tmp_path, clock=clock, flops=Flops(50.0)) as log:
        clock.now += 30
        log.log(1, step_of(1))
    assert list(lines(tmp_path)[0]) == [
        *("current_steps", "total_steps", "loss", "lr", "grad_norm", "epoch", "percentage", "elapsed_time"),
        *("remaining_time", "tokens_per_second", "total_tokens", "mfu", "memory_gb"),
    ]
    line = lines(tmp_path)[0]
    assert (line["current_steps"], line["total_steps"], line["percentage"]) == (1, 10, 10.0)
    assert (line["elapsed_time"], line["remaining_time"]) == ("0:00:30", "0:04:30")
    assert (line["tokens_per_second"], line["total_tokens"]) == (3.3, 100)
    assert line["mfu"] == round(100 / 30 * 50 / 1e6, 4) and line["memory_gb"] > 0.05


def test_numbers_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(3)) * 1e-3
    with watch(tmp_path) as log:
        for step, value in enumerate(values, start=1):
            log.log(step, {"loss": value, "lr": float(value.double() / 3), "tokens": 1})
    read = lines(tmp_path)
    assert [line["lr"] for line in read] == [float(value.double() / 3) for value in values]
    assert torch.equal(torch.tensor([line["loss"] for line in read]), values)


def test_a_number_that_is_none_is_written_as_valid_json_and_read_back(tmp_path: Path) -> None:
    with watch(tmp_path) as log:
        log.log(1, {"loss": torch.tensor(math.nan), "lr": math.inf, "eval_loss": None, "tokens": 1})
    text = (tmp_path / "trainer_log.jsonl").read_text()
    entry = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isnan(float(entry["loss"])) and float(entry["lr"]) == math.inf and "eval_loss" not in entry
    with watch(tmp_path, first=1) as log:
        assert math.isnan(log._losses[0])


def test_a_tensor_is_read_a_step_after_it_was_handed_over(tmp_path: Path) -> None:
    with watch(tmp_path) as log:
        log.log(1, step_of(1))
        assert lines(tmp_path) == []
        log.log(2, step_of(2))
        assert [line["current_steps"] for line in lines(tmp_path)] == [1]
        log.flush()
        assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2]
        log.log(3, step_of(3))
        with log.pause():
            assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_tensor_that_is_overwritten_afterwards_keeps_its_logged_value(tmp_path: Path) -> None:
    loss = torch.tensor(1.5)
    with watch(tmp_path) as log:
        log.log(1, {"loss": loss, "tokens": 1})
        loss.fill_(9.0)
    assert lines(tmp_path)[0]["loss"] == 1.5


@pytest.mark.gpu
def test_logging_never_makes_the_device_wait(tmp_path: Path) -> None:
    device = torch.device("cuda")
    big = torch.randn(4096, 4096, device=device)
    with watch(tmp_path) as log:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 6):
                log.log(step, {"loss": (big @ big).mean() * 0 + step, "tokens": 1})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_every_nth_step_and_the_last_are_logged_and_validation_always(tmp_path: Path) -> None:
    with watch(tmp_path, every=4) as log:
        for step in range(1, 11):
            log.log(step, step_of(step))
            if step == 5:
                log.log(step, {"eval_loss": 0.5, "eval_exact_match": 0.25})
    found = [(line["current_steps"], line.get("eval_loss")) for line in lines(tmp_path)]
    assert found == [(4, None), (5, 0.5), (8, None), (10, None)]
    assert lines(tmp_path)[-1]["total_tokens"] == 1000 and lines(tmp_path)[1]["eval_exact_match"] == 0.25


def test_a_killed_process_leaves_every_line_but_the_one_under_way(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; sys.path[:0] = ['tests']\n"
        "from test_train_watch import watch, step_of\n"
        "log = watch(pathlib.Path(sys.argv[1]))\n"
        "for step in (1, 2, 3): log.log(step, step_of(step))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2]


# ---- going on after an interruption


def test_a_resumed_run_cuts_off_later_lines_and_writes_the_same_again(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    with watch(tmp_path, clock=Clock()) as log:
        for step in range(1, 8):
            log.log(step, step_of(step))
    file = tmp_path / "trainer_log.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"current_steps": 8, "lo')
    with watch(tmp_path, clock=Clock(), first=4) as log:
        assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2, 3, 4]
        assert "4 lines after step 4 are cut off" in caplog.text
        for step in range(5, 8):
            log.log(step, step_of(step))
    keys = ("current_steps", "loss", "lr", "grad_norm", "epoch", "total_tokens")
    expected = [{key: json.loads(line)[key] for key in keys} for line in whole.splitlines()]
    assert [{key: line[key] for key in keys} for line in lines(tmp_path)] == expected
    assert not list(tmp_path.glob("*.part"))


def test_a_line_cut_short_by_a_full_disk_is_not_glued_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_bytes(b'{"current_steps": 1}\n{"current_steps": 2}')
    with watch(tmp_path, first=2) as log:
        log.log(3, step_of(3))
    assert [line["current_steps"] for line in lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize("from_state", [True, False])
def test_time_and_tokens_go_on_over_restarts(tmp_path: Path, from_state: bool) -> None:
    clock = Clock()
    with watch(tmp_path, clock=clock) as log:
        clock.now += 3700
        log.log(1, step_of(1))
        state = log.state()
    clock.now += 1e6  # the queue of a cluster
    with watch(tmp_path, clock=clock, first=1, state=state if from_state else None) as log:
        clock.now += 60
        log.log(2, step_of(2))
    line = lines(tmp_path)[1]
    assert (line["elapsed_time"], line["total_tokens"]) == ("1:02:40", 200)
    assert line["remaining_time"] == duration(8 * 60) and line["tokens_per_second"] == 1.7


@pytest.mark.parametrize("seconds", [0, 59, 3600, 86399, 86400, 200000])
def test_a_duration_is_written_as_llama_factory_does_and_reads_back(seconds: int) -> None:
    assert duration(seconds + 0.7) == str(timedelta(seconds=seconds)) and seconds_of(duration(seconds)) == seconds


def test_a_clock_that_is_set_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    times = iter(range(0, -(10**9), -(10**6)))
    clock = Clock()
    with watch(tmp_path, clock=clock) as log:
        monkeypatch.setattr(time, "time", lambda: float(next(times)))
        for step in range(1, 4):
            clock.now += 2
            log.log(step, step_of(step))
    assert [line["elapsed_time"] for line in lines(tmp_path)] == ["0:00:02", "0:00:04", "0:00:06"]
    assert {line["tokens_per_second"] for line in lines(tmp_path)} == {50.0}


# ---- what goes wrong around a run


class Full:
    """A file on a disk that is full for a while, and takes half of the first line."""

    def __init__(self, file: Any) -> None:
        self.file, self.refusals, self.begun = file, 2, False

    def write(self, data: bytes) -> int:
        if not self.begun:
            self.begun = True
            return self.file.write(data[: len(data) // 2])
        if self.refusals:
            self.refusals -= 1
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_delays_lines_and_is_said_once(tmp_path: Path, caplog) -> None:
    with watch(tmp_path) as log:
        log._journal._file = Full(log._journal._file)
        for step in range(1, 5):
            log.log(step, step_of(step))
    assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("No space left") == 1 and "lacks" not in caplog.text


def test_lines_that_never_found_room_are_counted_at_the_end(tmp_path: Path, caplog) -> None:
    journal = Journal(tmp_path / "trainer_log.jsonl", first=0)
    journal._file = Full(journal._file)
    journal._file.refusals = 99
    for step in range(3):
        journal.write({"current_steps": step})
    journal.close()
    assert "lacks its last 3 lines" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        watch(tmp_path / "absent")


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 5), (2, 4)):
        with watch(tmp_path, first=first, tensorboard=True) as log:
            for step in range(first + 1, last + 1):
                log.log(step, step_of(step))
            log.log(last, {"eval_loss": 0.5})
    seen = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in seen.Scalars("eval/loss")] == [4]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(seen.Tags()["scalars"])


def test_an_error_in_tensorboard_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch, caplog) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with watch(tmp_path, tensorboard=True) as log:
        monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        for step in (1, 2, 3):
            log.log(step, step_of(step))
    assert len(lines(tmp_path)) == 3 and caplog.text.count("tensorboard is given up") == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = replace(ONE, rank=1, world=2, shard=Shard(1, 2))
    with watch(tmp_path, ranks=other, tensorboard=True, plot=True) as log:
        log.log(1, step_of(1))
        log.flush()
        assert log.state() and log.results()
    assert not list(tmp_path.iterdir())


def test_a_device_that_failed_does_not_hide_the_error_that_ended_the_run(tmp_path: Path, caplog) -> None:
    with pytest.raises(KeyError, match="cause"), watch(tmp_path) as log:
        log.log(1, step_of(1))
        log._pending.read = lambda: (_ for _ in ()).throw(RuntimeError("CUDA error"))
        raise KeyError("cause")
    assert "last step are lost: CUDA error" in caplog.text


# ---- the screen


def test_without_a_terminal_a_line_is_logged_every_so_often(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with watch(tmp_path, clock=clock, total=100) as log:
        for step in range(1, 101):
            clock.now += 1
            log.log(step, step_of(step))
        log.log(100, {"eval_loss": 0.5})
    shown = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [text.split("/")[0] for text in shown] == ["step 1", "step 31", "step 61", "step 91", "step 100", "step 100"]
    assert "loss 1.5000, lr 0.0001, 100 tokens/s" in shown[0] and "0:01:39 left" in shown[0]
    assert "eval_loss 0.5" in shown[-1]


def test_on_a_terminal_a_bar_shows_the_numbers_and_log_lines_stand_above_it(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    from accessory.dist import setup_logging

    setup_logging()
    clock = Clock()
    with watch(tmp_path, clock=clock, flops=Flops(50.0), first=2) as log:
        for step in (3, 4, 5):
            clock.now += 1
            log.log(step, step_of(step))
        logging.getLogger("accessory.toy").info("a word in between")
    screen = capsys.readouterr().err
    assert "4/10, loss 0.7500, lr 3.33e-05, 100 tokens/s, MFU 0.5 %" in screen and "left" in screen
    assert any(part.strip() == "a word in between" for part in screen.replace("\r", "\n").split("\n"))


# ---- the picture


def test_smoothing_is_llama_factorys_formula() -> None:
    values = [4.0, 3.0, 3.5, 1.0]
    weight, last, expected = 1.8 * (1 / (1 + math.exp(-0.05 * 4)) - 0.5), values[0], []
    for value in values:
        last = last * weight + (1 - weight) * value
        expected.append(last)
    assert smooth(values) == expected and smooth([]) == []


def test_the_picture_is_drawn_with_any_title_and_any_numbers(tmp_path: Path) -> None:
    path = tmp_path / "training_loss.png"
    draw(path, Curves([1, 2, 3], [2.0, math.nan, 1.0], [2], [1.5]), title="training loss of $_{a^")
    assert Image.open(path).size == (640, 480) and [file.name for file in tmp_path.iterdir()] == [path.name]
    draw(path, Curves(range(1, 20001), [1.0] * 20000), title="long")
    assert Image.open(path).format == "PNG"


def test_the_picture_is_there_while_the_run_goes_on_and_complete_at_its_end(tmp_path: Path, monkeypatch) -> None:
    drawn: list[int] = []
    first = threading.Event()

    def count(path: Path, curves: Curves, *, title: str) -> None:
        drawn.append(len(curves.steps))
        first.set()

    monkeypatch.setattr("accessory.train.plot.draw", count)
    with watch(tmp_path, plot=True, total=500) as log:
        log.log(1, step_of(1))
        log.log(2, step_of(2))
        assert first.wait(20)
        for step in range(3, 301):
            log.log(step, step_of(step))
    assert len(drawn) == 2 and drawn[0] <= 2 and drawn[1] == 300


def test_a_resumed_run_draws_the_earlier_steps_too(tmp_path: Path) -> None:
    for first in (0, 3):
        with watch(tmp_path, plot=True, first=first) as log:
            for step in range(first + 1, first + 4):
                log.log(step, step_of(step))
            log.log(first + 3, {"eval_loss": 1.0})
    curves = log._curves()
    assert (curves.steps, curves.eval_steps) == ([1, 2, 3, 4, 5, 6], [3, 6])
    assert Image.open(tmp_path / "training_loss.png").size == (640, 480)


def test_an_error_while_drawing_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("accessory.train.plot.draw", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "disk full")))
    steps: list[int] = []
    painter = Painter(tmp_path / "x.png", lambda: Curves(list(steps), [1.0] * len(steps)), title="", every=0.0)
    for step in range(5):
        steps.append(step)
        painter.wake()
    painter.close()
    assert caplog.text.count("disk full") == 1


def test_matplotlib_and_tensorboard_are_imported_only_where_they_are_wanted() -> None:
    script = "import accessory.train.watch, sys; assert not {'matplotlib', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---- speed and memory


def test_speed_is_that_of_the_last_steps_without_pauses() -> None:
    clock = Clock()
    meter = Meter(CPU, window=3, clock=clock)
    assert meter.tokens_per_second is None and meter.left(5) is None
    for seconds in (100, 1, 1, 1):
        clock.now += seconds
        meter.step(10)
    assert meter.tokens_per_second == 10.0
    with meter.pause():
        clock.now += 50
    assert meter.tokens_per_second == 10.0 and meter.left(4) == 153.0


SMALL = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, multiple_of=16)


def test_full_training_costs_six_operations_per_parameter_and_causal_attention() -> None:
    model = toy(SMALL)
    matmul = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "tok" not in name)
    everything = {name for name, _ in model.named_parameters()}
    assert count_flops(model, everything, length=10).token == 6 * matmul + 3 * 2 * 3 * 64 * 10


def test_lora_costs_four_per_frozen_and_six_per_trained_parameter() -> None:
    spec = read_spec(
        {"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 100, "multiple_of": 16, "lora_rank": 2},
        llama_type="llama_peft",
    )
    model = build(spec)
    lora = {name: p.numel() for name, p in model.named_parameters() if ".lora_" in name}
    frozen = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".lora_" not in name)
    frozen -= 100 * 64  # the embedding
    assert count_flops(model, set(lora), length=0).token == 4 * frozen + 6 * sum(lora.values())


def test_layers_below_the_first_trained_one_cost_their_forward_only() -> None:
    model = toy(SMALL)
    last = {name for name, _ in model.named_parameters() if name.startswith("layers.2.") or name == "output.weight"}
    layer = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.2.") and p.dim() == 2)
    assert count_flops(model, last, length=0).token == 2 * 2 * layer + 6 * layer + 6 * 6400


def test_the_cost_of_a_rank_is_that_of_the_whole_model() -> None:
    names = {name for name, _ in toy(SMALL).named_parameters()}
    whole = count_flops(toy(SMALL), names, length=5)
    assert count_flops(toy(SMALL, shard=Shard(1, 2)), names, length=5) == whole


def test_pictures_cost_their_tower_once_where_it_is_frozen(tmp_path: Path) -> None:
    from engine_toys import opened, write_model

    model = opened(write_model(tmp_path / "model")).model
    none, projector, everything = (
        count_flops(model, {name for name, _ in model.named_parameters() if name.startswith(prefix)}, length=1).picture
        for prefix in ("output.", "vision.proj", "vision.")
    )
    assert 0 < none < projector < everything == 3 * none


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("A card of tomorrow", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_device(name: str, peak: float | None) -> None:
    assert peak_of(name) == pytest.approx(peak)


def test_peak_memory_on_a_cpu_grows_with_what_the_process_holds() -> None:
    before = peak_memory(CPU)
    block = torch.ones(60_000_000 + before // 4)
    assert peak_memory(CPU) >= before + block.nbytes // 8


# ---- at the end


def test_results_are_written_under_their_usual_names_and_joined(tmp_path: Path) -> None:
    clock = Clock()
    with watch(tmp_path, clock=clock, flops=Flops(50.0)) as log:
        for step in (1, 2):
            clock.now += 5
            log.log(step, step_of(step))
        write_results(tmp_path, "train", {"epoch": 1.0, **log.results(samples=40)})
    write_results(tmp_path, "eval", {"eval_loss": 0.5, "epoch": 2.0})
    train = json.loads((tmp_path / "train_results.json").read_text())
    assert (train["train_runtime"], train["train_samples_per_second"], train["train_steps_per_second"]) == (10, 4, 0.2)
    assert train["train_loss"] == (1.5 + 1.0) / 2 and train["total_flos"] == 200 * 50
    both = json.loads((tmp_path / "all_results.json").read_text())
    assert both == {**train, "eval_loss": 0.5, "epoch": 2.0}
    assert list(both) == sorted(both) and watching.QUIET > 1

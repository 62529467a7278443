"""Measures decode, prefill, loading, training or serving: all sides in one run, in turn, medians, ratios, ceilings.

Must not know how a side computes; the table and the JSON say the machine, its load and the versions.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from accessory.bench import ceilings
from accessory.bench.line import Line, compare, median_ratio
from accessory.bench.load import start_times
from accessory.bench.serving import measure_serving, verdicts
from accessory.bench.shapes import SHAPES, cache_bytes, matmul_weights, prefill_flops
from accessory.bench.sides import SIDES, Side
from accessory.bench.training import measure_training
from accessory.config import parse
from accessory.dist import dtype_from_name, pick_device
from accessory.native import widened

WHAT = ("decode", "prefill", "load", "train", "serve")


@dataclass
class Settings:
    """What to measure. The first word says it: decode, prefill, load, train or serve."""

    shape: Literal["110m", "1b", "7b"] = "110m"
    """Size of the randomly initialised model."""
    peer: Literal["transformers", "none"] = "none"
    """Measure this library in the same run, in turn with ours."""
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of weights and computation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    prompt: int = 512
    """Tokens of the prompt (prefill); decode starts behind a prompt of a quarter of it."""
    tokens: int = 24
    """Tokens decoded per round."""
    rounds: int = 5
    """Rounds per side; the sides take turns, and medians count."""
    batch: int = 4
    """train: rows of a step."""
    length: int = 512
    """train: tokens of a row."""
    steps: int = 3
    """train: steps of a side per round."""
    clients: int = 16
    """serve: clients that ask at once, and rows of the batch."""
    requests: int = 96
    """serve: answers per round; one by one, 8 of them."""
    prompts: list[int] = field(default_factory=lambda: [16, 400])
    """serve: tokens of the shortest and of the longest prompt."""
    answers: list[int] = field(default_factory=lambda: [16, 128])
    """serve: tokens of the shortest and of the longest answer."""
    prefix: int = 400
    """serve: tokens of the system prompt that is asked behind twice."""
    cores: int = 2
    """serve: processor cores that a side and its clients share, and its threads."""
    compile: bool = False
    """decode: our compiled step, too; serve: our step of answers compiled, in the server and in the bare loop."""
    server: str = ""
    """serve: further flags of accessory api, as one text."""
    peer_server: str = "--continuous-batching --cb-max-memory-percent 0.1"
    """serve: further flags of transformers serve, as one text."""
    json: str | None = None
    """Also write the result to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """`accessory bench WHAT [key=value ...]`: print a table, write JSON where asked."""
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = f"bench: got {argv[0] if argv else 'nothing'!r}, expected one of {', '.join(WHAT)} as the first word"
    if argv and argv[0] in ("-h", "--help"):
        argv.insert(0, WHAT[0])
    if not argv or argv[0] not in WHAT:
        raise ValueError(usage)
    what, settings = argv[0], parse(Settings, argv[1:], prog="accessory bench WHAT", description=Settings.__doc__ or "")
    for name in ("prompt", "tokens", "rounds", "batch", "length", "steps", "clients", "requests", "prefix", "cores"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name}: got {getattr(settings, name)}, expected at least 1")
    device = pick_device(settings.device)
    about = _about(settings, device)
    if what in ("train", "serve"):
        lines = (measure_training if what == "train" else measure_serving)(settings, device, about)
    else:
        lines = _load(settings, device) if what == "load" else _speed(what, settings, device, about)
    compare(lines)
    print(_table(what, lines, about))
    if settings.json:
        record = {
            "what": what,
            "settings": asdict(settings),
            **about,
            "lines": [{**asdict(line), "median": line.value} for line in lines],
        }
        Path(settings.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


@torch.inference_mode()
def _speed(what: str, settings: Settings, device: torch.device, about: dict) -> list[Line]:
    """Tokens per second of every side, and the ceilings measured before and after them."""
    config, dtype = SHAPES[settings.shape], dtype_from_name(settings.dtype)
    ours = ["ours", "ours compiled"] if settings.compile and what == "decode" else ["ours"]
    names = [*ours, *([settings.peer] if settings.peer != "none" else [])]
    window = settings.prompt + settings.tokens + 8
    sides: dict[str, Side] = {name: SIDES[name](config, window=window, device=device, dtype=dtype) for name in names}
    limits = ceilings.Ceilings(device)
    measure, limit = (_decode, limits.memory_read) if what == "decode" else (_prefill, limits.matmul)
    for side in sides.values():
        measure(side, settings, device)  # warm up
    widened()
    rates: dict[str, list[float]] = {name: [] for name in names}
    tops = []
    for _ in range(settings.rounds):
        before = limit()
        for name, side in sides.items():
            rates[name].append(measure(side, settings, device))
        tops.append(max(before, limit()))
    if what == "decode":
        middle = settings.prompt // 4 + settings.tokens // 2
        cost = matmul_weights(config) * dtype.itemsize + cache_bytes(config, middle, dtype.itemsize)
    else:
        cost = prefill_flops(config, settings.prompt) / settings.prompt
    about |= {
        "memory_read_gb_s": (statistics.median(tops) if what == "decode" else limits.memory_read()) / 1e9,
        "matmul_bf16_tflop_s": (statistics.median(tops) if what == "prefill" else limits.matmul()) / 1e12,
        "ceiling_tokens_s": statistics.median(tops) / cost,
    }
    return [
        Line(what, name, "tokens/s", rates[name], of_ceiling=median_ratio(rates[name], [top / cost for top in tops]))
        for name in names
    ]


def _decode(side: Side, settings: Settings, device: torch.device) -> float:
    """Tokens per second at batch 1, each fed back."""
    generator = torch.Generator().manual_seed(1)
    token = side.prefill(torch.randint(0, 32000, (1, max(1, settings.prompt // 4)), generator=generator).to(device))
    ceilings.wait(device)
    start = time.perf_counter()
    for _ in range(settings.tokens):
        token = side.decode(token)
    ceilings.wait(device)
    return settings.tokens / (time.perf_counter() - start)


def _prefill(side: Side, settings: Settings, device: torch.device) -> float:
    """Tokens per second of a prompt, its next token included."""
    ids = torch.randint(0, 32000, (1, settings.prompt), generator=torch.Generator().manual_seed(2)).to(device)
    return settings.prompt / ceilings.timed(lambda: side.prefill(ids), device)


def _load(settings: Settings, device: torch.device) -> list[Line]:
    """Seconds from the start of a process to its first token, weights on disk and in the page cache."""
    times = start_times(settings.shape, settings.peer, settings.dtype, str(device), settings.rounds)
    return [Line("load", name, "s", rounds) for name, rounds in times.items()]


def _about(settings: Settings, device: torch.device) -> dict:
    """Where and with what a figure was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if settings.peer != "none":
        from importlib.metadata import version

        versions[settings.peer] = version(settings.peer)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _processor() -> str:
    """The CPU's name and its matrix instructions."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    marks = [flag for flag in ("amx_bf16", "avx512_bf16", "avx2") if f" {flag}" in text]
    return f"{name or platform.machine()}, {os.cpu_count()} cores ({', '.join(marks[:1])})"


def _table(what: str, lines: list[Line], about: dict) -> str:
    """The result as text."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    head = [f"{about['date']}  {about['device']}, {about['threads']} threads, load {about['load']}; {versions}"]
    if "memory_read_gb_s" in about:
        head.append(
            f"ceilings: memory read {about['memory_read_gb_s']:.1f} GB/s, bf16 matmul"
            f" {about['matmul_bf16_tflop_s']:.2f} TFLOP/s -> {what} {about['ceiling_tokens_s']:.1f} tokens/s"
        )
    head += [
        f"{name.replace('_', ' ')}: {about[name]:.4f}"
        for name in ("full_loss_distance", "lora_loss_distance", "packed_of_full_rows")
        if name in about
    ]
    head += verdicts(about)
    rows = [f"{'what':<12}{'side':<19}{'median':>10} {'unit':<9}{'min':>9}{'max':>9}{'ceiling':>9}{'ratio':>7}"]
    for line in lines:
        share = f"{line.of_ceiling:8.0%}" if line.of_ceiling is not None else ""
        ratio = f"{line.ratio:6.2f}" if line.ratio is not None else ""
        spread = f"{min(line.rounds):>9.2f}{max(line.rounds):>9.2f}"
        rows.append(f"{line.what:<12}{line.side:<19}{line.value:>10.2f} {line.unit:<9}{spread}{share:>9}{ratio:>7}")
    return "\n".join(head + rows)

"""Serving measured: many clients against our server and a peer's, beside our bare loop and a peer one at a time.

Must not hold what it measures: every side is a program of its own on the same processor cores, and while one runs the
others stand still.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from accessory.bench.line import Line, median_ratio
from accessory.bench.serving_client import Load, drive
from accessory.bench.serving_mix import BLOCK, Ask, Mix, ids, text, write_model
from accessory.bench.serving_server import Paused, Server, root_env
from accessory.bench.shapes import SHAPES
from accessory.dist import dtype_from_name

BARS = {
    "serve_of_one_by_one": 6.0,
    "serve_of_peer_server": 1.3,
    "serve_of_bare_loop": 0.75,
    "prefix_gain": 3.0,
}
QUESTION, REPLY = 16, 4  # tokens behind the system prompt, and of the answer to it
PROBES = 3  # system prompts per round
PEER_SERVER = "transformers serve"


def measure_serving(settings: Any, device: torch.device, about: dict) -> list[Line]:
    """Tokens per second of all sides and times to the first token; `about` gains the ratios that BARS speaks of.

    A round: our server under the load, the peer's under the same, our bare loop on the same lengths, the peer's
    `generate` on one BLOCK of them, and our server with a system prompt for the first and the second time.
    Raises RuntimeError where a side fails or answers another number of tokens than asked for.
    """
    with ExitStack() as stack:
        stack.enter_context(_cores(settings.cores))
        about["threads"] = len(os.sched_getaffinity(0))  # of each side
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="accessory-bench-")))
        folder, dtype = place / "model", dtype_from_name(settings.dtype)
        write_model(SHAPES[settings.shape], folder, dtype=dtype)
        course = _Course(settings, folder, str(device), str(dtype).removeprefix("torch."), stack)
        for turn in range(settings.rounds + 1):
            course.round(turn)
        about["peer_server"] = settings.peer_server if settings.peer != "none" else None
        return course.lines(about)


@contextmanager
def _cores(number: int) -> Iterator[None]:
    """Only so many processor cores and threads, for this process and for those that it starts."""
    before, threads = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    os.sched_setaffinity(0, sorted(before)[:number])
    os.environ["OMP_NUM_THREADS"] = str(min(number, len(before)))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


class _Course:
    """All sides, and what they have done so far."""

    def __init__(self, settings: Any, folder: Path, device: str, dtype: str, stack: ExitStack) -> None:
        self.mix = Mix(_bounds("prompts", settings.prompts), _bounds("answers", settings.answers))
        self.number, self.clients, self.prefix = settings.requests, settings.clients, settings.prefix
        self.folder = folder
        longest = max(self.mix.prompts[1] + self.mix.answers[1], self.prefix + QUESTION + REPLY)
        window = -(-(longest + 1) // 64) * 64
        peer = settings.peer != "none"
        self.servers: dict[str, Server] = {}
        for side, command in {
            "ours": _ours(folder, device, settings, window),
            **({PEER_SERVER: _theirs(folder, device, dtype, settings)} if peer else {}),
        }.items():
            self.servers[side] = stack.enter_context(Server(side, command))
        sizes = [str(self.clients), str(window), str(int(settings.compile))]
        self.bare = {
            side: stack.enter_context(_program(side, str(folder), device, dtype, *sizes))
            for side in ("loop", *(["transformers"] if peer else []))
        }
        self.loads: dict[str, list[Load]] = {side: [] for side in self.servers}
        self.rates: dict[str, list[float]] = {side: [] for side in self.bare}
        self.cold: list[float] = []
        self.warm: list[float] = []

    def round(self, turn: int) -> None:
        """One turn of every side; turn 0 warms up and does not count."""
        asks = self.mix.asks(self.number if turn else min(self.number, 2 * self.clients), turn=turn)
        for side, server in self.servers.items():
            with server.awake():
                load = drive(server.port, asks, clients=self.clients, model=str(self.folder))
                probes = [self._probe(server, turn, number) for number in range(PROBES)] if side == "ours" else []
            if turn:
                self.loads[side].append(load)
                if probes:
                    self.cold.append(statistics.median(cold for cold, _ in probes))
                    self.warm.append(statistics.median(warm for _, warm in probes))
        for side, program in self.bare.items():
            rate = program.rate(asks if side == "loop" else asks[:BLOCK])
            if turn:
                self.rates[side].append(rate)

    def _probe(self, server: Server, turn: int, number: int) -> tuple[float, float]:
        """Seconds to the first token behind a system prompt that is new, and behind the same again."""
        dice = random.Random(f"{turn} {number}")
        system = text(self.prefix, dice)
        asks = [Ask(system + text(QUESTION, dice), REPLY) for _ in range(2)]
        cold, warm = drive(server.port, asks, clients=1, model=str(self.folder)).answers
        return cold.first, warm.first

    def lines(self, about: dict) -> list[Line]:
        """What was measured, as lines; the ratios go into `about`."""
        lines: list[Line] = []
        for side, loads in self.loads.items():
            lines.append(Line("serve", side, "tokens/s", [load.rate for load in loads]))
        lines.append(Line("bare loop", "ours", "tokens/s", self.rates["loop"]))
        if "transformers" in self.rates:
            lines.append(Line("one by one", "transformers", "tokens/s", self.rates["transformers"]))
        for share in (50, 95):
            for side, loads in self.loads.items():
                firsts = [percentile([answer.first for answer in load.answers], share) * 1000 for load in loads]
                lines.append(Line(f"first p{share}", side, "ms", firsts))
        lines.append(Line("new prefix", "ours", "ms", [seconds * 1000 for seconds in self.cold]))
        lines.append(Line("known pref.", "ours", "ms", [seconds * 1000 for seconds in self.warm]))
        ours = lines[0].rounds
        about["serve_of_bare_loop"] = median_ratio(ours, self.rates["loop"])
        about["prefix_gain"] = median_ratio(self.cold, self.warm)
        if PEER_SERVER in self.loads:
            about["serve_of_one_by_one"] = median_ratio(ours, self.rates["transformers"])
            about["serve_of_peer_server"] = median_ratio(ours, [load.rate for load in self.loads[PEER_SERVER]])
        return lines


def verdicts(about: Mapping[str, Any]) -> list[str]:
    """The ratios that there are, each with its bar, as lines of the table."""
    return [
        f"{name.replace('_', ' ')}: {about[name]:.2f} (at least {bar:g}: {'yes' if about[name] >= bar else 'NO'})"
        for name, bar in BARS.items()
        if name in about
    ]


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(share) // 100) - 1)]


def _bounds(name: str, told: list[int]) -> tuple[int, int]:
    """Shortest and longest. ValueError for anything else."""
    if len(told) != 2 or not 1 <= told[0] <= told[1]:
        raise ValueError(f"--{name}: got {told}, expected two numbers of tokens, the shortest and the longest")
    return told[0], told[1]


def _ours(folder: Path, device: str, settings: Any, window: int) -> list[str]:
    """The command of our server; a port stands for {port}."""
    words = {
        "model_name_or_path": folder,
        "host": "127.0.0.1",
        "port": "{port}",
        "device": device,
        "precision": settings.dtype,
        "max_seq_len": window,
        "max_concurrent": settings.clients,
        "compile": str(settings.compile).lower(),
    }
    flags = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "accessory", "api", *flags, *settings.server.split()]


def _theirs(folder: Path, device: str, dtype: str, settings: Any) -> list[str]:
    """The command of transformers' server."""
    program = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    flags = ["--device", device, "--dtype", dtype, "--host", "127.0.0.1", "--port", "{port}"]
    return [sys.executable, "-c", program, "serve", str(folder), *flags, *settings.peer_server.split()]


class Program:
    """A side without a server: it works through lists of requests."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        code = "import sys; from accessory.bench.serving_bare import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, *argv]
        self.argv = argv
        self._process = subprocess.Popen(
            command, env=root_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.paused = Paused(self._process)

    def ready(self) -> None:
        """Wait until it is built, and let it stand still."""
        self._read()
        self.paused.pause()

    def rate(self, asks: list[Ask]) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None, "stdin was asked for as a pipe"
        with self.paused.awake():
            self._process.stdin.write(json.dumps([(ids(ask.prompt), ask.answer) for ask in asks]) + "\n")
            self._process.stdin.flush()
            record = self._read()
        if record["tokens"] != sum(ask.answer for ask in asks):
            raise RuntimeError(f"bench serve: {self.argv[0]} said {record['tokens']} tokens, other than asked for")
        return record["tokens"] / record["seconds"]

    def _read(self) -> dict[str, Any]:
        """Its next line. RuntimeError where it has ended."""
        assert self._process.stdout is not None, "stdout was asked for as a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"bench serve: {self.argv[0]} ended with {self._process.wait()}")
        return json.loads(line)


@contextmanager
def _program(*argv: str) -> Iterator[Program]:
    """A side's program, which ends here."""
    program = Program(argv)
    try:
        program.ready()
        yield program
    finally:
        program.paused.end()

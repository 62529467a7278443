"""What serving is held against, each as a program: our batch loop with nothing around it, and a peer one at a time.

Must not know HTTP or scheduling. `main([SIDE, FOLDER, DEVICE, DTYPE, ROWS, WINDOW, COMPILE])` reads a JSON list of
[prompt ids, answer tokens] per line of stdin, and answers each line with tokens and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accessory.bench.ceilings import wait

Work = list[tuple[list[int], int]]


@dataclass
class _Row:
    """A row of the batch: where it is, what it said last, and how much it has still to say."""

    position: int
    token: int
    left: int


class Loop:
    """Our model and cache: a free row takes the next prompt at once, then all rows say one more token, until the end.

    The likeliest token is taken; nothing is decoded to text, nobody is told, nothing is cut into pieces.
    """

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, *, rows: int, window: int, compiled: bool = False
    ) -> None:
        """The model as our server has it: its weights reordered, its step of answers compiled or not."""
        from accessory.assemble import build, load, read_spec
        from accessory.checkpoint import open_folders
        from accessory.engine.compiled import CompiledStep
        from accessory.quant import settle

        checkpoint = open_folders(folder)
        self.model = build(read_spec(checkpoint.config, llama_type="llama"), dtype=dtype)
        load(self.model, checkpoint, device=device, dtype=dtype, packed=True)
        self.model.eval().requires_grad_(False)
        settle(self.model, rows=rows)
        self.cache = self.model.new_cache(rows=rows, size=window)
        self.device, self.rows = device, rows
        self.step = CompiledStep(self.model, self.cache) if compiled else None
        if self.step is not None:
            self.step.warm()

    @torch.inference_mode()
    def __call__(self, work: Work) -> int:
        """Do all of it; the tokens generated."""
        waiting, running, said = deque(work), dict[int, _Row](), 0
        while waiting or running:
            while waiting and len(running) < self.rows:
                free = next(row for row in range(self.rows) if row not in running)
                ids, answer = waiting.popleft()
                token = self._feed([ids], [list(range(len(ids)))], [free])[0]
                said += 1
                if answer > 1:
                    running[free] = _Row(len(ids), token, answer - 1)
            if not running:
                continue
            width = max(running) + 1
            rows = list(range(width)) if width <= 2 * len(running) else sorted(running)
            rows = rows if self.step is None else list(range(self.rows))
            idle = _Row(-1, 0, 0)
            now = [running.get(row, idle) for row in rows]
            next_ones = self._feed([[row.token] for row in now], [[row.position] for row in now], rows)
            for row, token in zip(rows, next_ones, strict=True):
                if row in running:
                    running[row] = after = _Row(running[row].position + 1, token, running[row].left - 1)
                    said += 1
                    if not after.left:
                        del running[row]
        return said

    def _feed(self, ids: list[list[int]], positions: list[list[int]], rows: list[int]) -> list[int]:
        """Feed tokens of rows; the likeliest next one of each."""
        places = torch.tensor(positions)
        extent = int(places.max()) + 1
        if self.step is not None and places.shape == (self.rows, 1):
            return self.step(torch.tensor(ids), places, extent).argmax(-1).tolist()
        self.cache.extent = extent
        first = rows == list(range(len(rows)))
        hidden = self.model(
            torch.tensor(ids).to(self.device),
            places.to(self.device),
            cache=self.cache,
            rows=None if first else torch.tensor(rows, device=self.device),
        )
        return self.model.output(hidden[:, -1]).argmax(-1).tolist()


class OneByOne:
    """transformers' `generate`, a request after the other."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, **sizes: int) -> None:
        """sizes: of our batch; there is none here."""
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, work: Work) -> int:
        """Do all of it; the tokens generated."""
        said = 0
        for ids, answer in work:
            given = torch.tensor([ids], device=self.device)
            lengths = {"max_new_tokens": answer, "min_new_tokens": answer}
            out = self.model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, **lengths)
            said += out.shape[1] - len(ids)
        return said


SIDES: dict[str, Callable[..., Any]] = {"loop": Loop, "transformers": OneByOne}


def main(argv: list[str]) -> None:
    """Build a side, say that it is ready, and work through lines."""
    side, folder, device, dtype, rows, window, compiled = argv
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the answers are ours alone
    place = torch.device(device)
    sizes = {"rows": int(rows), "window": int(window), "compiled": bool(int(compiled))}
    work = SIDES[side](Path(folder), place, getattr(torch, dtype), **sizes)
    out.write("{}\n")
    out.flush()
    for line in sys.stdin:
        asked = [(ids, answer) for ids, answer in json.loads(line)]
        wait(place)
        start = time.perf_counter()
        tokens = work(asked)
        wait(place)
        out.write(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - start}) + "\n")
        out.flush()

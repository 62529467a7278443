"""The step of answers, compiled: static shapes, every row each time, a few lengths of what is read of the cache.

Must not know requests or scheduling. On CUDA the compiled step is replayed as a graph, which spares its many launches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from accessory.model import Cache, Llama

log = logging.getLogger(__name__)

FIRST = 256  # positions of the shortest step; each further one reads twice as many, up to the cache's size


class CompiledStep:
    """One token of every row of the cache, through what torch compiled for the least length that suffices."""

    def __init__(self, model: Llama, cache: Cache) -> None:
        """Raises ValueError for a model whose step cannot be compiled."""
        _check(model)
        self._model, self._cache = model, cache
        self._device = model.norm.weight.device
        # a kernel that reads each row as far as it goes needs no lengths
        self.lengths = [cache.size] if cache.by_row else lengths(cache.size)
        for tensor in (*cache.keys, *cache.values):
            torch._dynamo.mark_static_address(tensor)
        mode = "reduce-overhead" if self._device.type == "cuda" else None
        self._run: Callable[[Tensor, Tensor], Tensor] = torch.compile(
            self._step, dynamic=False, fullgraph=True, mode=mode
        )

    def warm(self) -> None:
        """Compile all lengths now, and say so: it takes from seconds to minutes. ValueError where torch cannot."""
        began = time.monotonic()
        log.info("compiling the step of %d answers for %s positions ...", self._cache.rows, _listed(self.lengths))
        idle = torch.zeros(self._cache.rows, 1, dtype=torch.int64)
        self(idle, idle - 1, 1, run=self._step)  # what is made at the first step is not to be compiled in
        with torch._dynamo.config.patch(recompile_limit=256):  # a long window has many lengths
            for length in self.lengths:
                for _ in range(3 if self._device.type == "cuda" else 1):  # a graph is recorded on the second call
                    self._warm(idle, length)
        log.info("compiled in %.0f s", time.monotonic() - began)

    def _warm(self, idle: Tensor, length: int) -> None:
        """A step of nobody."""
        try:
            self(idle, idle - 1, length)
        except torch._dynamo.exc.TorchDynamoException as error:  # such as a machine without a C++ compiler
            log.debug("torch could not compile the step", exc_info=error)
            said = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"compiled: got true where torch cannot compile ({said}), expected a machine that can; drop it"
            ) from error

    @torch.inference_mode()
    def __call__(
        self, ids: Tensor, positions: Tensor, extent: int, *, run: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """ids, positions [rows, 1] int64 on the CPU (-1: nobody speaks) -> logits [rows, vocabulary] fp32.

        They are valid until the next call. run: in place of what was compiled.
        """
        self._cache.extent = next(length for length in self.lengths if length >= extent)
        self._cache.reads = None
        return (run or self._run)(ids.to(self._device), positions.to(self._device))

    def _step(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._model.output(self._model(ids, positions, cache=self._cache)[:, 0])


def _check(model: Llama) -> None:
    """ValueError for what is known not to be compiled."""
    if model.shard.size > 1:
        raise ValueError(
            f"compiled: got true on {model.shard.size} ranks, whose sums are not compiled; drop it, or start one rank"
        )
    if not all(getattr(linear.storage, "compiles", True) for linear in model.linears().values()):
        raise ValueError("compiled: got true for NF4 weights, which are not compiled; drop it, or open them in bf16")


def lengths(size: int) -> list[int]:
    """FIRST, twice it, ... and the size itself."""
    found, length = [], FIRST
    while length < size:
        found.append(length)
        length *= 2
    return [*found, size]


def _listed(numbers: list[int]) -> str:
    """1, 2 and 3."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last

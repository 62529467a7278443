"""The model in training as an engine sees it.

Must not know losses, questions or steps. Weights are whole when it is called: `Trainee.judging` sees to that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from accessory.model import Llama
from accessory.model.cache import Cache


class Guest:
    """A Llama that others train, lent to an engine: the calls that `engine.worker.Worker` makes.

    The engine works in inference mode. What it calls here leaves that mode, since a tensor made in it that stays with
    the model (gathered weights, frequencies) could never again be used with gradients.
    """

    def __init__(self, llama: Llama, *, dtype: torch.dtype) -> None:
        """dtype: of computation, and so of the cache."""
        self._llama, self._dtype = llama, dtype
        self.norm = llama.norm
        vision = getattr(llama, "vision", None)
        self.vision = None if vision is None else _Eyes(vision, vision.slots)
        self.prompt = None if llama.prompt is None else _Prompt(llama)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with _normal():
            return self._llama(*args, **kwargs)

    def output(self, hidden: Tensor) -> Tensor:
        """Logits."""
        with _normal():
            return self._llama.output(hidden)

    def new_cache(self, *, rows: int, size: int) -> Cache:
        """As `Llama.new_cache`."""
        return self._llama.new_cache(rows=rows, size=size, dtype=self._dtype)


@dataclass(frozen=True)
class _Eyes:
    """The vision part."""

    module: nn.Module
    slots: int

    def __call__(self, pixels: Tensor, order: Tensor | None = None) -> Tensor:
        with _normal():
            return self.module(pixels, order)


@dataclass(frozen=True)
class _Prompt:
    """A zero-init adapter's prompts."""

    llama: Llama

    def store(self, guest: Guest, cache: Cache, rows: Tensor, visual: Tensor | None = None) -> None:
        with _normal():
            self.llama.prompt.store(self.llama, cache, rows, visual)


@contextlib.contextmanager
def _normal() -> Iterator[None]:
    """Out of inference mode, without gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def forget_forwards(root: nn.Module) -> None:
    """Drop what forwards without a backward pass, an interrupted one too, left in FSDP2's order of prefetching.

    Else the next backward would gather weights by that order, and ranks that answered different questions would wait
    for each other.
    """
    if not isinstance(root, FSDPModule):
        return
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    for module in root.modules():  # torch before it could be asked to
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()

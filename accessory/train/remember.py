"""What is kept: by a block for its backward pass (all, the products of its linears, its input), by the heap; compiling.

Must not know shards or optimisers. A block's `forward` is replaced on the instance, so that no name changes and hooks
that gather weights stay around it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from accessory.model import Llama

log = logging.getLogger(__name__)

Checkpointing = Literal["none", "selective", "full"]
Forward = Callable[..., Any]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def keep_heap() -> None:
    """Let glibc keep freed memory for the next step, where every layer allocates the same again.

    Otherwise each large tensor is mapped and zeroed by the kernel anew: 8 % of a step's time on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def remember(model: Llama, *, checkpointing: Checkpointing = "none", compile: bool = False) -> None:
    """Set up every block of the decoder, and of a tower that is trained (never compiled)."""
    if compile and model.prompt is not None:
        log.warning("torch_compile: not with an adapter's prompts, which differ from layer to layer; training eagerly")
        compile = False
    for block in model.layers:
        forward = _checkpointed(block, checkpointing)
        if compile:
            forward = torch.compile(forward)
        if forward is not block.forward:
            block.forward = _without_cache(block.forward, forward)
    tower = getattr(getattr(model, "vision", None), "tower", None)
    for block in getattr(tower, "blocks", ()):
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.forward = _checkpointed(block, checkpointing)


def _without_cache(plain: Forward, prepared: Forward) -> Forward:
    """The prepared forward for training, the plain one for answers that are generated in between."""

    def forward(x: torch.Tensor, step: Any) -> torch.Tensor:
        return prepared(x, step) if step.cache is None and torch.is_grad_enabled() else plain(x, step)

    return forward


def _checkpointed(block: nn.Module, mode: Checkpointing) -> Forward:
    """The block's forward, whose inner tensors are computed again in the backward pass."""
    if mode == "none":
        return block.forward
    drops = any(getattr(getattr(m, "adapter", None), "dropout", 0.0) > 0 for m in block.modules())
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": drops}
    if mode == "selective":
        # a product that is summed over the ranks in place is kept as the sum, and its reduction is not done again
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy, allow_cache_entry_mutation=True)
    return partial(checkpoint, block.forward, **options)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep products with weights and fused attention; compute again what is cheap, and large attention scores."""
    return CheckpointPolicy.MUST_SAVE if op in KEPT or _reduces(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _reduces(op: Any) -> bool:
    """Whether an op sums over ranks; those, once done in place, must not be done twice."""
    return getattr(op, "namespace", "") in ("c10d", "_c10d_functional")

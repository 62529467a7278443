"""The learning rate over the steps, as a share of its peak.

Must not know optimisers; a pure function, so that a resumed run needs no state of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from accessory.train.settings import Settings

# share of the way left from the peak to the end, by progress in [0, 1) after warm-up
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
    "wsd": lambda progress: 1.0 - progress,  # of the last decay_ratio; before it, 1
}


def lr_factor(step: int, total: int, settings: Settings) -> float:
    """The factor on the peak learning rate for the step after `step` finished ones, of `total`.

    Warm-up rises in equal parts and is above 0 from the first step; the peak is reached at step `warmup_steps`.
    From there to step `total` the factor falls to min_lr_ratio: half a cosine, a line, or (wsd, arXiv 2404.06395)
    only over the last decay_ratio of all steps.
    """
    warmup = warmup_steps(total, settings)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = warmup
    if settings.lr_scheduler_type == "wsd":
        start = max(warmup, total - math.ceil(settings.decay_ratio * total))
    progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    low = settings.min_lr_ratio
    return low + (1.0 - low) * SHAPES[settings.lr_scheduler_type](progress)


def warmup_steps(total: int, settings: Settings) -> int:
    """Steps in which the learning rate rises."""
    return settings.warmup_steps if settings.warmup_steps > 0 else math.ceil(settings.warmup_ratio * total)

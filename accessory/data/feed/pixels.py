"""Pictures of a micro-batch as the tower takes them; what a worker of the feed does.

Must not know rows, tokens or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process

import numpy as np
import torch

from accessory.data.feed.sources import FeedConfig
from accessory.data.image import load_picture, transform


@dataclass(frozen=True)
class Look:
    """One picture to be read."""

    path: str
    where: str
    """file:row number that it belongs to."""
    dice: tuple[int, ...]
    """Decides random crops: seed, epoch, row, number of the picture in the row."""


@dataclass(frozen=True)
class Seen:
    """Pictures as numbers; blank where `failed` says why."""

    pixels: np.ndarray
    """float32 [N, 3, size, size]"""
    failed: dict[int, str]


class Eye:
    """Reads pictures. One that cannot be read is blank under on_bad_row skip, else a ValueError that names its row."""

    def __init__(self, config: FeedConfig) -> None:
        if parent_process() is not None:  # a worker; the run's own process keeps its threads
            torch.set_num_threads(1)
        self.size, self.skips = config.image_size, config.on_bad_row == "skip"
        name = config.image_transform or "resized_center_crop"
        self.apply = transform(name, size=config.image_size, mean=config.mean, std=config.std)

    def __call__(self, looks: Sequence[Look]) -> Seen:
        pixels = np.zeros((len(looks), 3, self.size, self.size), np.float32)
        failed: dict[int, str] = {}
        for number, look in enumerate(looks):
            try:
                pixels[number] = self.apply(load_picture(look.path), _generator(look.dice)).numpy()
            except (ValueError, OSError) as error:
                if not self.skips:
                    raise ValueError(f"{look.where}: {error}; or set on_bad_row skip") from error
                failed[number] = f"{look.where}: {error}"
        return Seen(pixels, failed)


def _generator(dice: tuple[int, ...]) -> torch.Generator:
    """Random numbers that are a function of the dice alone."""
    seed = np.random.SeedSequence(dice).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)

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
from accessory.data.image import load_picture
from accessory.data.picture import shown


@dataclass(frozen=True)
class Look:
    """One picture to be read."""

    path: str
    where: str
    """file:row number that it belongs to."""
    dice: tuple[int, ...]
    """Decides random crops: seed, epoch, row, number of the picture in the row."""
    size: tuple[int, int] = (1, 1)
    """Width and height that its slots were counted for."""


@dataclass(frozen=True)
class Seen:
    """Pictures as numbers; blank where `failed` says why."""

    pixels: np.ndarray
    """float32 [tiles, 3, size, size]"""
    failed: dict[int, str]
    """By the number of the picture."""


class Eye:
    """Reads pictures. One that cannot be read is blank under on_bad_row skip, else a ValueError that names its row."""

    def __init__(self, config: FeedConfig) -> None:
        if parent_process() is not None:  # a worker; the run's own process keeps its threads
            torch.set_num_threads(1)
        self.geometry, self.orientation = config.geometry, config.orientation
        self.how = {"allow_private_urls": config.allow_private_urls, "cache": config.picture_cache}
        self.skips = config.on_bad_row == "skip"
        self.geometry.check()

    def __call__(self, looks: Sequence[Look]) -> Seen:
        ends = np.cumsum([self.geometry.tiles(*look.size) for look in looks])
        side = self.geometry.size
        pixels = np.zeros((int(ends[-1]), 3, side, side), np.float32)
        failed: dict[int, str] = {}
        for number, (look, tiles) in enumerate(zip(looks, np.split(pixels, ends[:-1]), strict=True)):
            try:
                tiles[:] = self._read(look)
            except (ValueError, OSError) as error:
                if not self.skips:
                    raise ValueError(f"{look.where}: {error}; or set on_bad_row skip") from error
                failed[number] = f"{look.where}: {error}"
        return Seen(pixels, failed)

    def _read(self, look: Look) -> np.ndarray:
        """The tiles of one picture. ValueError where it has not the size that its slots were counted for."""
        image = load_picture(look.path, orientation=self.orientation, **self.how)
        if self.geometry.varies and image.size != look.size:
            raise ValueError(
                f"picture {shown(look.path)}: got {image.width} x {image.height} pixels, expected the {look.size[0]} x"
                f" {look.size[1]} that it had when it was tokenised; put it back, or name another cache_dir"
            )
        return self.geometry.pixels(image, _generator(look.dice)).numpy()


def _generator(dice: tuple[int, ...]) -> torch.Generator:
    """Random numbers that are a function of the dice alone."""
    seed = np.random.SeedSequence(dice).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)

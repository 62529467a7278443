"""Pictures of any size as square tiles: how many, of which pixels, and which feature rows they become in which order.

Must not know a tower, tokens or files: sides, colours and grids are values. Counting needs no torch.

A picture is one view of the whole, or (LLaVA 1.6's "anyres") that and a grid of tiles of a larger canvas. The rows of a
grid are those of the map that its tiles make together, without the canvas's margins, a newline behind each line of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from accessory.data.image import Transform, to_pixels, transform

if TYPE_CHECKING:
    import torch

ANYRES = "anyres"
ASPECTS = {"pad": "padded_resize", "crop": "clip_center_crop"}
"""LLaVA's words for transforms of data.image."""
NEWLINE = -1
"""In `Geometry.order`: the learned row that ends a line of the map."""
BLACK = (0, 0, 0)

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class Geometry:
    """What becomes of a picture, as plain values; it may be pickled and compared."""

    each: int
    """Feature rows of a tile; 0: a picture takes no place in the sequence."""
    size: int = 224
    """Side of a tile in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    transform: str = "resized_center_crop"
    """Name of a data.image transform: one tile; anyres: a view of the whole and a grid of tiles."""
    canvases: tuple[Size, ...] = ()
    """anyres: width and height in pixels of the grids to choose from; of equally good ones the first is taken."""
    side: int = 0
    """Cells along a tile's side, where margins are left out."""
    unpad: bool = False
    """Grids lose the rows of their canvas's margins, and lines end with a newline; else rows stand tile by tile."""

    def __post_init__(self) -> None:
        if self.transform == ANYRES and not self.canvases:
            raise ValueError("image_transform: got anyres for a model without grids of tiles; choose another")
        if self.unpad and self.side**2 != self.each:
            raise ValueError(f"merge: got spatial_unpad for {self.each} rows of {self.side} x {self.side} cells")

    @property
    def varies(self) -> bool:
        """Whether a picture's size decides how many rows it has."""
        return self.transform == ANYRES and self.each > 0

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the tiles behind the view of the whole; (0, 0): there is none but that."""
        if self.transform != ANYRES:
            return 0, 0
        canvas = best_canvas((width, height), self.canvases)
        return canvas[0] // self.size, canvas[1] // self.size

    def tiles(self, width: int, height: int) -> int:
        """How many tiles a picture of this size becomes."""
        columns, rows = self.grid(width, height)
        return 1 + columns * rows

    def slots(self, width: int, height: int) -> int:
        """How many feature rows a picture of this size fills."""
        if not self.unpad:
            return self.each * self.tiles(width, height)
        left, top, right, bottom = self._window(width, height)
        return self.each + (bottom - top) * (right - left + 1) + (self.transform != ANYRES)

    def count(self, sizes: Iterable[Size]) -> list[int]:
        """`slots` of several pictures."""
        return [self.slots(*size) for size in sizes]

    def order(self, sizes: Sequence[Size]) -> np.ndarray | None:
        """Which rows of the stack of all tiles of these pictures follow one another: int64 [sum of slots].

        Tile t, cell c is row t * each + c; NEWLINE is the newline. None: the stack's own order.
        """
        if not self.unpad:
            return None
        parts, tile = [np.zeros(0, np.int64)], 0
        for width, height in sizes:
            columns, rows = self.grid(width, height)
            parts.append(np.arange(self.each) + tile * self.each)
            if columns:
                left, top, right, bottom = self._window(width, height)
                lines = _map(columns, rows, self.side)[top:bottom, left:right] + (tile + 1) * self.each
                parts.append(np.pad(lines, ((0, 0), (0, 1)), constant_values=NEWLINE).reshape(-1))
            else:
                parts.append(np.full(1, NEWLINE))
            tile += 1 + columns * rows
        return np.concatenate(parts)

    def pixels(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """An RGB picture as float32 [tiles, 3, size, size]. generator: the dice of random crops."""
        if self.transform != ANYRES:
            return _transform(self.transform, self.size, self.mean, self.std)(image, generator)[None]
        import torch

        canvas = best_canvas(image.size, self.canvases)
        return torch.stack([to_pixels(tile, mean=self.mean, std=self.std) for tile in cut(image, canvas, self.size)])

    def check(self) -> None:
        """ValueError for a transform that there is not."""
        if self.transform != ANYRES:
            _transform(self.transform, self.size, self.mean, self.std)

    def counts(self) -> dict[str, Any]:
        """All that decides how many rows a picture has."""
        if not self.varies and not self.unpad:
            return {"each": self.each}
        names = ("each", "size", "canvases", "side", "unpad")
        return {name: getattr(self, name) for name in names} | {ANYRES: self.varies}

    def _window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the cells that show the picture, in the map of its grid.

        As many cells are left out on both sides. So a very long picture's map may be empty (bottom = top), or have
        lines of a newline alone (right = left), as in the models that were trained so.
        """
        columns, rows = self.grid(width, height)
        across, down = columns * self.side, rows * self.side
        if not columns:
            return 0, 0, 0, 0
        if width / height > across / down:
            # rounded first, since 1e-16 below a whole number would cost a line (as transformers' pull request 35779)
            margin = (down - int(round(height * (across / width), 7))) // 2
            return 0, margin, across, down - margin
        margin = (across - int(round(width * (down / height), 7))) // 2
        return margin, 0, across - margin, down


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels, then wastes least of its own, then comes first.

    ValueError for a picture without pixels.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"picture: got {width} x {height} pixels, expected at least 1 x 1; give another picture")

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def cut(image: Image.Image, canvas: Size, size: int) -> list[Image.Image]:
    """The whole picture stretched to a square, then the squares of the picture in the middle of a black canvas, row by
    row; all are bicubic."""
    (width, height), (across, down) = image.size, canvas
    if across / width < down / height:
        fitted = across, min(math.ceil(height * (across / width)), down)
    else:
        fitted = min(math.ceil(width * (down / height)), across), down
    sheet = Image.new("RGB", canvas, BLACK)
    resized = image.resize(fitted, Image.Resampling.BICUBIC)
    sheet.paste(resized, ((across - fitted[0]) // 2, (down - fitted[1]) // 2))
    corners = [(x, y) for y in range(0, down, size) for x in range(0, across, size)]
    whole = image.resize((size, size), Image.Resampling.BICUBIC)
    return [whole, *(sheet.crop((x, y, x + size, y + size)) for x, y in corners)]


def lay(length: int, starts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """int32 [length]: -1, or from each start on the numbers of a picture's rows among those of all these pictures."""
    slots = np.full(length, -1, np.int32)
    done = 0
    for start, count in zip(starts, counts, strict=True):
        slots[start : start + count] = np.arange(done, done + count)
        done += count
    return slots


@cache
def _transform(name: str, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    """A transform, made once."""
    return transform(name, size=size, mean=mean, std=std)


@cache
def _map(columns: int, rows: int, side: int) -> np.ndarray:
    """int64 [rows * side, columns * side]: the number of each cell in a stack of tiles."""
    tile = np.arange(rows)[:, None] * columns + np.arange(columns)
    cell = np.arange(side * side).reshape(side, side)
    return (tile[:, None, :, None] * side * side + cell[None, :, None, :]).reshape(rows * side, columns * side)

"""Training material: pictures with their labels, and an endless stream of questions about them.
Knows no model; whatever it makes follows from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import digits
import numpy as np
import questions
import unknown
import words
from PIL import Image
from scenes import COLORS, SHAPES, SIZES, Scene, draw_scene, paint

SIDE = 64  # pixels of a training picture
PATCHES, CELLS = 8, 4  # along a side: the tower's patches, the grid of the Q-Former's queries
SCENE, UNKNOWN, EMPTY = 10, 11, 12  # classes after the ten digits
BLOCK = 500  # pictures drawn from one seed

# Weights of the questions about a scene; what is harder to learn is asked more often.
Mix = dict[str, int]
SCENE_MIX: Mix = {
    "color": 6, "shape": 6, "size": 7, "count": 15, "exist": 9, "where": 11, "rel": 22, "compare": 6, "side": 8,
    "caption": 9, "list": 5, "places": 6, "direction": 12, "absent": 9, "ambiguous": 5, "digit": 5, "off-topic": 4,
    "chat": 2,
}  # fmt: skip
# First looks: what is where, and which of two lies further to a side.
LOOK_MIX: Mix = {
    "color": 12, "shape": 12, "size": 8, "count": 7, "exist": 7, "where": 14, "far": 10, "compare": 8, "direction": 18,
    "side": 9, "caption": 12, "list": 5, "places": 40,
}  # fmt: skip


@dataclass
class Pool:
    """Pictures [N, SIDE, SIDE, 3] uint8, what each is, and the dense labels of the warm-up.

    Labels are [N, places, 3] (colour, shape, size; 0 is nothing, else index + 1), for patches and for cells;
    `places` [N, cells, 2] are the centres of the cells' shapes in the picture, -1..1.
    """

    pixels: np.ndarray
    classes: np.ndarray
    patches: np.ndarray
    cells: np.ndarray
    places: np.ndarray
    scenes: list[Scene | None] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the arrays, for `load`."""
        folder.mkdir()
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @staticmethod
    def load(folder: Path) -> Pool:
        """What `save` wrote, without scenes and names."""
        return Pool(*(np.load(folder / f"{name}.npy") for name in _ARRAYS))

    def where(self, *classes: int) -> list[int]:
        """Numbers of the pictures of these classes."""
        return [int(i) for i in np.flatnonzero(np.isin(self.classes, classes))]


def build(
    seed: int,
    *,
    scenes: int,
    digit_pictures: int,
    unknowns: int,
    empties: int,
    processes: int = 2,
    folder: Path | None = None,
) -> Pool:
    """Draw a pool; the result does not depend on `processes`. folder: where each picture becomes a PNG file."""
    wanted = (("scene", scenes), ("digit", digit_pictures), ("unknown", unknowns), ("empty", empties))
    jobs = [
        (kind, f"{seed} {kind} {i}", i, min(BLOCK, n - i), folder) for kind, n in wanted for i in range(0, n, BLOCK)
    ]
    with ProcessPoolExecutor(processes) as workers:
        parts = list(workers.map(_draw_block, jobs))
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS]
    scenes_drawn, names = ([entry for part in parts for entry in getattr(part, key)] for key in ("scenes", "names"))
    return Pool(*joined, scenes=scenes_drawn, names=names)


_ARRAYS = ("pixels", "classes", "patches", "cells", "places")


def _draw_block(job: tuple[str, str, int, int, Path | None]) -> Pool:
    """Draw some pictures of one kind from one seed."""
    kind, seed, first, count, folder = job
    rng = Random(seed)
    hand = digits.handwriting(held_out=False) if kind == "digit" else []
    pool = Pool(
        np.empty((count, SIDE, SIDE, 3), np.uint8),
        np.empty(count, np.int64),
        np.zeros((count, PATCHES**2, 3), np.int64),
        np.zeros((count, CELLS**2, 3), np.int64),
        np.zeros((count, CELLS**2, 2), np.float32),
    )
    for i in range(count):
        scene = None
        if kind == "scene":
            scene = draw_scene(rng)
            image = paint(scene, rng.choice((SIDE, 2 * SIDE, 4 * SIDE)))
            pool.classes[i] = SCENE
            pool.patches[i] = _patch_labels(scene)
            pool.cells[i], pool.places[i] = _cell_labels(scene)
        elif kind == "digit":
            image, pool.classes[i] = digits.draw_digit(rng, hand, size=SIDE)
        else:
            image = unknown.draw_unknown(rng, size=SIDE) if kind == "unknown" else unknown.draw_empty(rng, size=SIDE)
            pool.classes[i] = UNKNOWN if kind == "unknown" else EMPTY
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pool.pixels[i] = np.asarray(image)
        pool.scenes.append(scene)
        pool.names.append(f"{kind}-{first + i:05d}")
        if folder is not None:
            image.save(folder / f"{pool.names[-1]}.png", compress_level=1)
    return pool


def _properties(thing: object) -> tuple[int, int, int]:
    """Colour, shape and size as labels; 0 is left for nothing."""
    return 1 + tuple(COLORS).index(thing.color), 1 + SHAPES.index(thing.shape), 1 + SIZES.index(thing.size)


def _patch_labels(scene: Scene) -> np.ndarray:
    """What covers each patch's centre, or nearly."""
    labels = np.zeros((PATCHES, PATCHES, 3), np.int64)
    centres = (np.arange(PATCHES) + 0.5) / PATCHES
    for thing in scene.things:
        distance = np.hypot(centres[None, :] - thing.x, centres[:, None] - thing.y)
        labels[distance < max(0.85 * thing.radius, 0.55 / PATCHES)] = _properties(thing)
        labels[int(thing.y * PATCHES), int(thing.x * PATCHES)] = _properties(thing)
    return labels.reshape(-1, 3)


def _cell_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The shape whose centre lies in each cell; of two, the one nearer to the cell's centre."""
    labels, places = np.zeros((CELLS, CELLS, 3), np.int64), np.zeros((CELLS, CELLS, 2), np.float32)
    nearest = np.full((CELLS, CELLS), np.inf)
    for thing in scene.things:
        column, row = int(thing.x * CELLS), int(thing.y * CELLS)
        distance = np.hypot(thing.x * CELLS - column - 0.5, thing.y * CELLS - row - 0.5)
        if distance < nearest[row, column]:
            nearest[row, column] = distance
            labels[row, column], places[row, column] = _properties(thing), (2 * thing.x - 1, 2 * thing.y - 1)
    return labels.reshape(-1, 3), places.reshape(-1, 2)


def questions_about(rng: Random, pool: Pool, picture: int, *, mix: Mix = SCENE_MIX) -> Iterator[tuple[str, str]]:
    """Endless questions about one picture, with answers; of a scene in the proportions of `mix`."""
    kind = int(pool.classes[picture])
    if kind == SCENE:
        yield from questions_of(rng, pool.scenes[picture], mix=mix)
    while True:
        if kind < SCENE:
            asked = _about_digit(rng, kind)
        else:
            asked = _about_other(rng, words.UNKNOWN if kind == UNKNOWN else words.EMPTY)
        yield words.vary(rng, asked[0]), asked[1]


def questions_of(rng: Random, scene: Scene, *, mix: Mix = SCENE_MIX) -> Iterator[tuple[str, str]]:
    """Endless questions about one scene."""
    while True:
        asked = _about_scene(rng, scene, mix)
        if asked:
            yield words.vary(rng, asked[0]), asked[1]


def scene_questions(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless questions, each about a scene of its own that nobody paints."""
    while True:
        yield next(questions_of(rng, draw_scene(rng)))


def caption(scene: Scene) -> str | None:
    """What a scene shows, from left to right; None where two shapes are a tie."""
    asked = questions.ask_caption(Random(0), scene)
    return asked.answer if asked else None


def digit_questions(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless questions about digits that nobody paints."""
    while True:
        question, answer = _about_digit(rng, rng.randrange(10))
        yield words.vary(rng, question), answer


def questions_without_picture(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless questions asked before any picture was shown."""
    while True:
        chance = rng.random()
        if chance < 0.55:
            question, answer = words.ask_chat(rng)
        elif chance < 0.8:
            question, answer = words.ask_off_topic(rng), words.ONLY
        else:
            question, answer = questions.about_anything(rng), words.NO_PICTURE
        yield words.vary(rng, question), answer


def _about_scene(rng: Random, scene: Scene, mix: Mix) -> tuple[str, str] | None:
    kind = rng.choices(tuple(mix), tuple(mix.values()))[0]
    if kind in questions.SCENE_KINDS:
        asked = questions.SCENE_KINDS[kind](rng, scene)
    elif kind in questions.SPECIAL_KINDS:
        asked = questions.SPECIAL_KINDS[kind](rng, scene)
    elif kind == "digit":
        return questions.about_digits(rng), words.NOT_DIGIT
    else:
        return (words.ask_off_topic(rng), words.ONLY) if kind == "off-topic" else words.ask_chat(rng)
    return (asked.question, asked.answer) if asked else None


def _about_digit(rng: Random, digit: int) -> tuple[str, str]:
    chance = rng.random()
    if chance < 0.62:
        asked = questions.ask_digit(rng, digit)
        return asked.question, asked.answer
    if chance < 0.86:
        return questions.about_shapes(rng), words.NOT_DRAWING
    return (words.ask_off_topic(rng), words.ONLY) if chance < 0.95 else words.ask_chat(rng)


def _about_other(rng: Random, answer: str) -> tuple[str, str]:
    chance = rng.random()
    if chance < 0.8:
        return questions.about_anything(rng), answer
    return (words.ask_off_topic(rng), words.ONLY) if chance < 0.92 else words.ask_chat(rng)

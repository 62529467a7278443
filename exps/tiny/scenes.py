"""Drawn scenes: one to four shapes on paper, as data and as pictures of any size.
Knows no questions and no model; the same generator state gives the same scene everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "big")
# Each colour is a segment between two anchors: what a paint program calls it, and how ink looks.
COLORS = {
    "red": ((255, 0, 0), (205, 45, 50)),
    "green": ((0, 160, 0), (60, 185, 85)),
    "blue": ((0, 0, 255), (50, 95, 215)),
    "yellow": ((255, 255, 0), (245, 215, 45)),
    "purple": ((128, 0, 128), (150, 60, 185)),
    "orange": ((255, 150, 0), (240, 120, 30)),
    "black": ((0, 0, 0), (45, 45, 50)),
}
RADII = {"small": (0.075, 0.095), "big": (0.15, 0.185)}
OVERSAMPLE = 3


@dataclass(frozen=True)
class Thing:
    """One shape. Centre and radius are fractions of the picture's side; `tilt` is in degrees."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float
    tilt: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Its full name, e.g. `small red circle`."""
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Shapes that do not touch, on one colour of paper."""

    things: tuple[Thing, ...]
    paper: tuple[int, int, int]


def draw_scene(rng: Random, *, count: int | None = None) -> Scene:
    """A fresh scene of `count` shapes (one to four, more often three or four, when None)."""
    count = count or rng.choices((1, 2, 3, 4), (15, 25, 30, 30))[0]
    while True:
        things: list[Thing] = []
        for _ in range(60):
            thing = _thing(rng)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
            if len(things) == count:
                return Scene(tuple(things), _paper(rng))


def paint(scene: Scene, size: int = 256) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels, edges smoothed."""
    big = size * OVERSAMPLE
    image = Image.new("RGB", (big, big), scene.paper)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _paint_thing(draw, thing, big)
    return image.resize((size, size), Image.Resampling.BOX)


def _thing(rng: Random) -> Thing:
    """One random shape, wholly inside the picture."""
    size, shape, color = rng.choice(SIZES), rng.choice(SHAPES), rng.choice(tuple(COLORS))
    radius = rng.uniform(*RADII[size])
    edge = 1.1 * radius + 0.015
    mix = rng.random()
    first, second = COLORS[color]
    rgb = tuple(
        min(255, max(0, round(a + (b - a) * mix + rng.uniform(-10, 10)))) for a, b in zip(first, second, strict=True)
    )
    tilt = rng.uniform(-12, 12)
    x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
    return Thing(size, color, shape, x, y, radius, tilt, rgb)


def _apart(one: Thing, other: Thing) -> bool:
    """Whether two shapes keep a visible gap."""
    distance = math.hypot(one.x - other.x, one.y - other.y)
    return distance > 1.12 * (one.radius + other.radius) + 0.035


def _paper(rng: Random) -> tuple[int, int, int]:
    """White paper, or a pale tint of it."""
    if rng.random() < 0.5:
        return (255, 255, 255)
    return tuple(rng.randint(226, 255) for _ in range(3))


def _paint_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    """One filled shape on a canvas `side` pixels wide."""
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=thing.rgb)
        return
    turn = math.radians(thing.tilt)
    points = [
        (
            x + radius * (px * math.cos(turn) - py * math.sin(turn)),
            y + radius * (px * math.sin(turn) + py * math.cos(turn)),
        )
        for px, py in OUTLINES[thing.shape]
    ]
    draw.polygon(points, fill=thing.rgb)


def _ring(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
    """Corners at the given angles (degrees, up is -90) and distances."""
    return [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for a, r in zip(angles, radii, strict=True)]


_ARM = 0.36
OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(px, py + 0.2) for px, py in _ring([-90, 30, 150], [1.2] * 3)],
    "star": _ring([-90 + 36 * i for i in range(10)], [1.15, 0.5] * 5),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip

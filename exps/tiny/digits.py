"""Pictures of one digit: real handwriting (load_digits), strokes of our own, and printed ones.
Knows no questions and no model; the last writers of load_digits are never drawn on for training."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

HELD_OUT = 400  # the end of the file: other writers than the ones before it
WORK = 128  # side on which digits are bent and thickened


def handwriting(*, held_out: bool) -> list[tuple[np.ndarray, int]]:
    """(ink 8 x 8 in 0..1, digit) pairs of load_digits in file order: its last HELD_OUT, or all before them."""
    data = load_digits()
    part = slice(-HELD_OUT, None) if held_out else slice(0, -HELD_OUT)
    return [(image / 16.0, int(label)) for image, label in zip(data.images[part], data.target[part], strict=True)]


def clean(ink: np.ndarray, size: int = 256) -> Image.Image:
    """A load_digits picture as dark ink on white paper, enlarged smoothly, nothing else done to it."""
    gray = Image.fromarray(np.uint8(255 - 255 * np.clip(ink, 0, 1)))
    field = Image.new("L", (10, 10), 255)
    field.paste(gray, (1, 1))
    return field.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def draw_digit(rng: Random, pool: list[tuple[np.ndarray, int]], *, size: int = 64) -> tuple[Image.Image, int]:
    """A training picture: mostly handwriting from `pool` bent at random, else our strokes or print."""
    source = rng.choices(("hand", "stroke", "print"), (74, 18, 8))[0]
    if source == "hand":
        ink, digit = pool[rng.randrange(len(pool))]
        mask = _enlarge(ink)
    else:
        digit = rng.randrange(10)
        mask = _stroke(rng, digit) if source == "stroke" else _print(rng, digit)
    plain = source == "hand" and rng.random() < 0.3
    mask = _place(rng, mask, gentle=plain)
    if not plain:
        edged = _edges(rng, mask)
        if edged.getextrema()[1] > 128:  # a thin pen must not vanish
            mask = edged
    return _ink(rng, mask, size), digit


def _enlarge(ink: np.ndarray) -> Image.Image:
    """8 x 8 ink on the working canvas, with the margin that `clean` gives."""
    gray = Image.fromarray(np.uint8(255 * np.clip(ink, 0, 1)))
    field = Image.new("L", (10, 10), 0)
    field.paste(gray, (1, 1))
    return field.resize((WORK, WORK), Image.Resampling.BICUBIC)


def _place(rng: Random, mask: Image.Image, *, gentle: bool) -> Image.Image:
    """Turns, slants, stretches and bends the ink, then centres it at a random scale and offset."""
    part = 0.6 if gentle else 1.0
    turn, slant = math.radians(rng.uniform(-12, 12) * part), rng.uniform(-0.25, 0.25) * part
    stretch = math.exp(rng.uniform(-0.22, 0.22) * part)
    box = mask.point(lambda v: 255 if v > 60 else 0).getbbox() or (0, 0, WORK, WORK)
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    height = max(box[3] - box[1], 1.15 * (box[2] - box[0]), 1)
    target = WORK * (rng.uniform(0.62, 0.84) if gentle else rng.uniform(0.45, 0.86))
    zoom = height / target
    room = 0.5 * (WORK - target) * (0.3 if gentle else 0.8)
    dx, dy = WORK / 2 + rng.uniform(-room, room), WORK / 2 + rng.uniform(-room, room)
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, slant], [0, 1]]) @ np.diag([stretch, 1 / stretch])
    a, b, d, e = (zoom * matrix).ravel()
    affine = (a, b, cx - a * dx - b * dy, d, e, cy - d * dx - e * dy)
    mask = mask.transform((WORK, WORK), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return mask if gentle else _bend(rng, mask)


def _bend(rng: Random, mask: Image.Image) -> Image.Image:
    """A smooth random warp on a 4 x 4 mesh."""
    cells, step, push = 4, WORK // 4, WORK * 0.03
    nodes = [
        [(i * step + rng.gauss(0, push), j * step + rng.gauss(0, push)) for i in range(cells + 1)]
        for j in range(cells + 1)
    ]
    mesh = []
    for j in range(cells):
        for i in range(cells):
            quad = (*nodes[j][i], *nodes[j + 1][i], *nodes[j + 1][i + 1], *nodes[j][i + 1])
            mesh.append(((i * step, j * step, (i + 1) * step, (j + 1) * step), quad))
    return mask.transform((WORK, WORK), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _edges(rng: Random, mask: Image.Image) -> Image.Image:
    """Thinner or thicker strokes, crisp or soft edges."""
    kind = rng.random()
    if kind < 0.25:
        mask = mask.filter(ImageFilter.MaxFilter(rng.choice((3, 5))))
    elif kind < 0.45:
        mask = mask.filter(ImageFilter.MinFilter(3))
    if rng.random() < 0.5:
        level, steep = rng.uniform(80, 150), rng.uniform(2, 12)
        mask = mask.point([min(255, max(0, round(128 + steep * (v - level)))) for v in range(256)])
    if rng.random() < 0.4:
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))
    return mask


def _ink(rng: Random, mask: Image.Image, size: int) -> Image.Image:
    """Ink over paper, at the final size."""
    mask = mask.resize((size, size), Image.Resampling.BICUBIC)
    style = rng.random()
    if style < 0.62:
        ink, paper = (rng.randint(0, 70),) * 3, (rng.randint(235, 255),) * 3
    elif style < 0.82:
        ink = rng.choice(((20, 40, 150), (170, 30, 30), (20, 100, 40), (90, 30, 110)))
        paper = tuple(rng.randint(225, 255) for _ in range(3))
    else:
        ink, paper = (rng.randint(215, 255),) * 3, (rng.randint(0, 45),) * 3
    return Image.composite(Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask)


def _print(rng: Random, digit: int) -> Image.Image:
    """A printed digit in Pillow's own font."""
    image = Image.new("L", (WORK, WORK), 0)
    font = ImageFont.load_default(100)
    ImageDraw.Draw(image).text(
        (WORK / 2, WORK / 2), str(digit), fill=255, font=font, anchor="mm", stroke_width=rng.randint(0, 4)
    )
    return image


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> list[tuple[float, float]]:
    """An ellipse's arc from `start` to `stop` degrees (0 is right, 90 is down)."""
    steps = [math.radians(start + (stop - start) * i / 14) for i in range(15)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in steps]


def _stroke(rng: Random, digit: int) -> Image.Image:
    """A digit as a pen would write it: a random way, its corners shaken, a round pen."""
    lines = rng.choice(WAYS[digit])
    unit, pen = WORK * 0.24, WORK * rng.uniform(0.03, 0.13)
    shake = rng.uniform(0, 0.06)
    wave = [(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(0, 6.28)) for _ in range(2)]
    image = Image.new("L", (WORK, WORK), 0)
    draw = ImageDraw.Draw(image)
    for line in lines:
        points = []
        for x, y in line:
            wx = x + wave[0][0] * math.sin(2 * y + wave[0][2]) + (rng.gauss(0, shake) if len(line) < 8 else 0)
            wy = y + wave[1][0] * math.sin(3 * x + wave[1][2]) + (rng.gauss(0, shake) if len(line) < 8 else 0)
            points.append((WORK / 2 + unit * (wx - 1), WORK / 2 + unit * (wy - 1.5)))
        draw.line(points, fill=255, width=max(2, round(pen)), joint="curve")
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return image


# Ways to write each digit on a box 2 wide and 3 high: a list of polylines.
WAYS: dict[int, list[list[list[tuple[float, float]]]]] = {
    0: [[_arc(1, 1.5, 0.85, 1.45, -100, 265)], [_arc(1, 1.5, 1, 1.2, -80, 285)], [_arc(1, 1.5, 0.6, 1.45, -100, 262)]],
    1: [
        [[(1, 0), (1, 3)]],
        [[(0.3, 0.8), (1.1, 0), (1.1, 3)]],
        [[(0.3, 0.8), (1.1, 0), (1.1, 3)], [(0.4, 3), (1.8, 3)]],
        [[(0.1, 1.3), (1.3, 0), (1, 3)]],
    ],
    2: [
        [[*_arc(1, 0.8, 0.85, 0.8, 190, 380), (0.1, 3), (1.95, 3)]],
        [[*_arc(0.95, 0.75, 0.8, 0.75, 200, 400), (0.7, 2.4), *_arc(0.4, 2.7, 0.3, 0.28, -60, -300),
          (1, 2.75), (2, 2.9)]],
    ],
    3: [
        [[*_arc(0.9, 0.75, 0.8, 0.75, 200, 450), *_arc(0.9, 2.2, 0.95, 0.8, -90, 155)]],
        [[(0.1, 0), (1.7, 0), (0.8, 1.2), *_arc(0.85, 2.1, 0.95, 0.88, -90, 150)]],
    ],
    4: [
        [[(1.2, 0), (0, 2), (2, 2)], [(1.5, 0.9), (1.5, 3)]],
        [[(0.2, 0), (0.15, 1.5), (1.9, 1.5)], [(1.6, 0), (1.5, 3)]],
        [[(1.4, 3), (1.4, 0), (0, 2.1), (2, 2.1)]],
    ],
    5: [
        [[(1.8, 0), (0.4, 0), (0.3, 1.3), *_arc(0.85, 2.05, 0.95, 0.92, -125, 150)]],
        [[(0.35, 0.05), (0.3, 1.25), *_arc(0.85, 2.1, 0.9, 0.9, -120, 140)], [(0.35, 0.05), (1.9, 0)]],
    ],
    6: [
        [[(1.5, 0), (0.6, 0.9), *_arc(1, 2.1, 0.85, 0.88, 200, -165)]],
        [[*_arc(1.35, 1.6, 1.25, 1.6, -80, -190), *_arc(1, 2.15, 0.85, 0.8, 175, -190)]],
    ],
    7: [
        [[(0.1, 0), (1.9, 0), (0.8, 3)]],
        [[(0.1, 0), (1.9, 0), (0.8, 3)], [(0.5, 1.5), (1.8, 1.5)]],
        [[(0.15, 0.5), (0.15, 0), (1.9, 0), (1.2, 1.4), (1, 3)]],
    ],
    8: [
        [_arc(1, 0.75, 0.72, 0.75, 90, 450), _arc(1, 2.25, 0.88, 0.78, -90, 270)],
        [[(1.75, 0.5), *_arc(1, 0.7, 0.75, 0.7, -30, -220), (1.5, 1.9), *_arc(1, 2.3, 0.75, 0.7, -20, 200),
          (1.7, 0.6)]],
    ],
    9: [
        [[*_arc(1, 0.85, 0.85, 0.85, -20, -370), (1.75, 1.6), (1.6, 3)]],
        [[*_arc(1, 0.85, 0.8, 0.85, -10, -370), (1.75, 1.9), *_arc(0.95, 2.1, 0.8, 0.9, 10, 140)]],
    ],
}  # fmt: skip

"""Pictures that are neither drawing nor digit: what the model must learn to decline. None is a photograph.
Knows no questions and no model."""

from __future__ import annotations

import math
import string
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORK = 96


def draw_unknown(rng: Random, *, size: int = 64) -> Image.Image:
    """Noise, fallen leaves, stripes, scribbles, text or mixtures of them, as RGB."""
    makers = (_clouds, _leaves, _stripes, _scribble, _letters, _mosaic)
    image = rng.choices(makers, (26, 30, 12, 10, 10, 12))[0](rng)
    if rng.random() < 0.35:
        other = rng.choice((_clouds, _leaves))(rng)
        image = Image.blend(image, other, rng.uniform(0.2, 0.6))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def draw_empty(rng: Random, *, size: int = 64) -> Image.Image:
    """Paper with nothing on it."""
    light = rng.random() < 0.9
    tone = (
        (255, 255, 255)
        if rng.random() < 0.4
        else tuple(rng.randint(*((222, 255) if light else (0, 40))) for _ in "rgb")
    )
    return Image.new("RGB", (size, size), tone)


def _generator(rng: Random) -> np.random.Generator:
    """A numpy generator that continues from `rng`."""
    return np.random.default_rng(rng.getrandbits(48))


def _palette(rng: Random) -> list[np.ndarray]:
    """A few colours, natural ones (dull, related) more often than loud ones."""
    base = np.array([rng.uniform(20, 235) for _ in range(3)])
    spread = rng.choice((25, 50, 90, 160))
    gray = rng.random() < 0.15
    colors = [np.clip(base + np.array([rng.uniform(-spread, spread) for _ in range(3)]), 0, 255) for _ in range(6)]
    return [np.full(3, c.mean()) for c in colors] if gray else colors


def _noise(rng: Random, power: float) -> np.ndarray:
    """A field [WORK, WORK] in 0..1 whose spectrum falls with frequency to `power`."""
    spectrum = np.fft.fft2(_generator(rng).standard_normal((WORK, WORK)))
    fx, fy = np.meshgrid(np.fft.fftfreq(WORK), np.fft.fftfreq(WORK))
    distance = np.hypot(fx * rng.uniform(0.5, 2), fy)
    distance[0, 0] = 1
    field = np.real(np.fft.ifft2(spectrum / np.maximum(distance, 1 / WORK) ** power))
    low, high = np.quantile(field, (0.02, 0.98))
    return np.clip((field - low) / (high - low + 1e-9), 0, 1)


def _clouds(rng: Random) -> Image.Image:
    """Smooth noise between colours, often with a horizon, as skies, walls and meadows have."""
    field = _noise(rng, rng.uniform(0.4, 2.0))[..., None]
    a, b, c, d = _palette(rng)[:4]
    pixels = a + (b - a) * field
    if rng.random() < 0.5:
        line = rng.uniform(0.2, 0.8) * WORK + 6 * (_noise(rng, 1.6)[0] - 0.5) * rng.uniform(0, 5)
        below = (np.arange(WORK)[:, None] > line[None, :])[..., None]
        pixels = np.where(below, c + (d - c) * _noise(rng, rng.uniform(0.4, 1.6))[..., None], pixels)
    return _picture(pixels)


def _leaves(rng: Random) -> Image.Image:
    """Many overlapping textured patches of all sizes: the statistics of a photograph."""
    image = Image.new("RGB", (WORK, WORK), tuple(int(v) for v in rng.choice(_palette(rng))))
    draw, palette = ImageDraw.Draw(image), _palette(rng)
    smallest = rng.uniform(2, 8)
    for _ in range(rng.choice((12, 40, 120))):
        radius = smallest / max(rng.random(), 0.04) ** 0.8
        x, y = rng.uniform(-10, WORK + 10), rng.uniform(-10, WORK + 10)
        shade = rng.uniform(0.6, 1.25)
        color = tuple(int(min(255, v * shade)) for v in rng.choice(palette))
        corners = rng.choice((0, 3, 4, 5, 7))
        if not corners:
            stretch = rng.uniform(0.5, 1.6)
            draw.ellipse((x - radius, y - radius * stretch, x + radius, y + radius * stretch), fill=color)
            continue
        turn = rng.uniform(0, 6.28)
        ring = [(turn + 6.283 * i / corners, radius * rng.uniform(0.5, 1.3)) for i in range(corners)]
        draw.polygon([(x + r * math.cos(t), y + r * math.sin(t)) for t, r in ring], fill=color)
    pixels = np.asarray(image, dtype=float) + rng.uniform(0, 90) * (_noise(rng, rng.uniform(0.3, 1.2))[..., None] - 0.5)
    light = np.linspace(rng.uniform(-50, 50), rng.uniform(-50, 50), WORK)
    return _picture(pixels + (light[:, None, None] if rng.random() < 0.5 else light[None, :, None]))


def _stripes(rng: Random) -> Image.Image:
    """Waves, checks or rings."""
    y, x = np.mgrid[0:WORK, 0:WORK] / WORK
    turn, pitch = rng.uniform(0, 6.28), rng.uniform(8, 70)
    along = x * math.cos(turn) + y * math.sin(turn)
    field = np.sin(pitch * along)
    if rng.random() < 0.4:
        field = field * np.sin(pitch * rng.uniform(0.5, 1) * (x * math.sin(turn) - y * math.cos(turn)))
    elif rng.random() < 0.3:
        field = np.sin(pitch * np.hypot(x - rng.random(), y - rng.random()))
    field = np.where(field > 0, 1.0, -1.0) if rng.random() < 0.5 else field
    a, b = _palette(rng)[:2]
    if np.abs(a - b).max() < 30:
        b = 255 - a
    return _picture(a + (b - a) * (field[..., None] + 1) / 2)


def _scribble(rng: Random) -> Image.Image:
    """Long crossing pen lines that mean nothing."""
    paper = (255, 255, 255) if rng.random() < 0.5 else tuple(int(v) for v in rng.choice(_palette(rng)))
    image = Image.new("RGB", (WORK, WORK), paper)
    draw, palette = ImageDraw.Draw(image), _palette(rng)
    for _ in range(rng.randint(3, 9)):
        points = [(rng.uniform(0, WORK), rng.uniform(0, WORK)) for _ in range(rng.randint(5, 12))]
        color = tuple(int(v) for v in rng.choice(palette)) if rng.random() < 0.7 else (0, 0, 0)
        draw.line(points, fill=color, width=rng.randint(1, 6), joint="curve")
    return image


def _letters(rng: Random) -> Image.Image:
    """Lines of text."""
    dark = rng.random() < 0.2
    image = Image.new("RGB", (WORK, WORK), (20, 20, 30) if dark else (255, 255, 255))
    draw, height = ImageDraw.Draw(image), rng.choice((9, 14, 22, 34))
    ink = (235, 235, 235) if dark else tuple(rng.randint(0, 110) for _ in range(3))
    font = ImageFont.load_default(height)
    top = rng.uniform(-height / 2, height / 2)
    while top < WORK:
        line = "".join(rng.choice(string.ascii_letters + "    ") for _ in range(2 * WORK // height))
        draw.text((rng.uniform(-height, 6), top), line, fill=ink, font=font)
        top += height * 1.25
    return image


def _mosaic(rng: Random) -> Image.Image:
    """Blocks of colour, as screens, facades and tables have."""
    rows, columns = rng.randint(3, 10), rng.randint(3, 10)
    palette = _palette(rng)
    cells = np.array([[rng.choice(palette) for _ in range(columns)] for _ in range(rows)])
    small = Image.fromarray(np.uint8(cells))
    way = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))
    return small.resize((WORK, WORK), way).rotate(
        rng.choice((0, 0, rng.uniform(0, 90))), fillcolor=small.getpixel((0, 0))
    )


def _picture(pixels: np.ndarray) -> Image.Image:
    """Float pixels as a picture."""
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))

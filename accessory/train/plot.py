"""The picture of a run's loss, raw and smoothed, and a thread that redraws it while the run goes on.

Must not know where numbers come from. matplotlib is imported by the thread that draws, and without its global state.
"""

from __future__ import annotations

import io
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

POINTS = 4000  # more of them cannot be told apart in a picture
SHARE = 0.02  # of its time, at most, that the thread spends drawing


@dataclass(frozen=True)
class Curves:
    """Steps and losses of training, and of validation."""

    steps: Sequence[int] = ()
    losses: Sequence[float] = ()
    eval_steps: Sequence[int] = ()
    eval_losses: Sequence[float] = ()


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean that weighs what came before by 1.8 (sigmoid(0.05 n) - 0.5): LLaMA-Factory's plot_loss."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    out: list[float] = []
    for value in values:
        last = out[-1] if out else value
        out.append(last * weight + (1 - weight) * value)
    return out


def draw(path: Path, curves: Curves, *, title: str) -> None:
    """Write the picture, whole or not at all. Raises OSError, or what matplotlib raises."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _finite(curves.steps, curves.losses)
    eval_steps, evals = _finite(curves.eval_steps, curves.eval_losses)
    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    stride = max(1, -(-len(steps) // POINTS))
    axes.plot(steps[::stride], losses[::stride], color="#1f77b4", alpha=0.4, label="original")
    axes.plot(steps[::stride], smooth(losses)[::stride], color="#1f77b4", label="smoothed")
    if evals:
        axes.plot(eval_steps, evals, "o-", color="#d62728", markersize=4, linewidth=1, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, parse_math=False)
    axes.legend()
    _put(path, figure)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps."""

    name: str
    steps: list[int]
    values: list[float]


def debiased(values: Sequence[float], weight: float) -> list[float]:
    """An exponential mean whose beginning is not drawn to 0: sum of weight^k v[i-k] / sum of weight^k."""
    total = norm = 0.0
    out: list[float] = []
    for value in values:
        total, norm = total * weight + value, norm * weight + 1
        out.append(total / norm)
    return out


def draw_curve(
    path: Path, curve: Curve, smoothed: Sequence[float] | None = None, *, title: str, size: tuple[float, float]
) -> None:
    """Write the picture of one curve, raw and perhaps smoothed, whole or not at all. size: in inches, 100 dots each.

    Raises OSError, or what matplotlib raises.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, parse_math=False)
    alone = "o-" if len(curve.steps) < 3 else "-"
    if smoothed is None:
        axes.plot(*_finite(curve.steps, curve.values), alone, color="#1f77b4")
    else:
        axes.plot(*_finite(curve.steps, curve.values), alone, color="#1f77b4", alpha=0.4, label="original")
        axes.plot(*_finite(curve.steps, smoothed), color="#1f77b4", label="smoothed")
        axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel(curve.name)
    _put(path, figure)


def _put(path: Path, figure: Figure) -> None:
    """Write a figure, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    part = path.with_name(path.name + ".part")
    part.write_bytes(picture.getvalue())
    os.replace(part, path)


def _finite(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The points that can be drawn."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


class Painter:
    """Draws in a thread: when told that there is something new, at most every `every` seconds, and at the end.

    What goes wrong is said once and never reaches the run.
    """

    def __init__(self, path: Path, read: Callable[[], Curves], *, title: str, every: float = 10.0) -> None:
        """read: called in the thread, gives the curves as they are."""
        self._path, self._read, self._title, self._every = path, read, title, every
        self._new, self._over = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="training_loss.png", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new to draw."""
        self._new.set()

    def close(self) -> None:
        """Draw what is new, and end the thread."""
        self._over.set()
        self._new.set()
        self._thread.join()

    def _work(self) -> None:
        drawn = Curves()
        while True:
            self._new.wait()
            self._new.clear()
            over, curves, began = self._over.is_set(), self._read(), time.monotonic()
            if curves.steps and curves != drawn:
                self._draw(curves)
                drawn = curves
            if over:
                return
            self._over.wait(max(self._every, (time.monotonic() - began) / SHARE))

    def _draw(self, curves: Curves) -> None:
        """Draw, or say once why not."""
        try:
            draw(self._path, curves, title=self._title)
        except Exception as error:  # whatever a plotting library, its fonts or a full disk come up with
            if not self._warned:
                log.warning("%s cannot be drawn, training goes on: %s", self._path, error)
            self._warned = True

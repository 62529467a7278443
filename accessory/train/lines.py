"""A run's log in other tools' keys: logging.jsonl of ms-swift, the Trainer's log_history, and drawings of every curve.

Must not know training: it translates the lines of trainer_log.jsonl as they are written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accessory.train.journal import Journal, plain
from accessory.train.plot import Curve, debiased, draw_curve, smooth

log = logging.getLogger(__name__)

LOGGING = "logging.jsonl"
CLOSING = "log_history"  # only the last line of a run has it
DIGITS = 8
TRAINING = {"loss": "loss", "acc": "acc", "grad_norm": "grad_norm", "lr": "learning_rate"}
JUDGING = {"eval_accuracy": "eval_acc"}
PACE = ("memory(GiB)", "train_speed(iter/s)")
RAW = ("global_step", "step", "epoch")  # what curves are drawn over


class Lines:
    """The lines of one run in the Trainer's keys; `journal`: also in logging.jsonl, with ms-swift's."""

    def __init__(self, folder: Path, *, journal: bool) -> None:
        """Write nothing yet."""
        self.folder, self._wants = folder, journal
        self._journal: Journal | None = None
        self.history: list[dict[str, Any]] = []
        """All lines of the run, earlier starts included."""

    @property
    def wants_first(self) -> bool:
        """Whether the first step is always logged."""
        return self._wants

    @property
    def key(self) -> str:
        """What the tool calls a step."""
        return "global_step" if self._wants else "step"

    def begin(self, earlier: Sequence[Mapping[str, Any]], first: int) -> None:
        """Take up what an earlier start wrote, up to step `first`. earlier: its lines of trainer_log.jsonl.

        Raises OSError for a file that cannot be written.
        """
        if self._wants:
            self._journal = Journal(self.folder / LOGGING, first=first, key=self.key, closing=CLOSING)
            self.history = list(self._journal.lines)
        else:
            self.history = [self._translated(line) for line in earlier]

    def add(self, line: Mapping[str, Any], seconds: float) -> None:
        """A line of trainer_log.jsonl. seconds: of training so far, over all starts."""
        entry = self._translated(line)
        if self._wants and "loss" in line:
            step = entry.pop("global_step")
            epoch = {"epoch": entry.pop("epoch")} if "epoch" in entry else {}
            memory = float(line.get("memory_gb", 0.0)) * 1e9 / 2**30
            speed = step / seconds if seconds > 0 else 0.0
            entry |= dict(zip(PACE, (round(memory, 2), round(speed, 6)), strict=True)) | epoch | {"global_step": step}
        self.history.append({name: plain(value) for name, value in entry.items()})
        if self._journal is not None:
            self._journal.write(entry)

    def end(self, told: Mapping[str, Any]) -> None:
        """Write the last line of logging.jsonl: what the run says of itself."""
        if self._journal is not None:
            self._journal.write({**told, CLOSING: self.history})

    def close(self) -> None:
        """Let go of the file."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def draw(self, *, title: str, training: bool) -> None:
        """Draw every curve: as images/train_loss.png, ... or as training_eval_loss.png, ...; what fails is said.

        training: also what belongs to training, of which training_loss.png shows the loss anyway.
        """
        curves = self._curves(training=training)
        try:
            for path, curve, smoothed, size in curves:
                path.parent.mkdir(exist_ok=True)
                draw_curve(path, curve, smoothed, title=title.format(curve.name), size=size)
        except Exception as error:  # whatever a plotting library, its fonts or a full disk come up with
            log.warning("curves in %s cannot be drawn: %s", self.folder, error)

    def _curves(self, *, training: bool) -> list[tuple[Path, Curve, Sequence[float] | None, tuple[float, float]]]:
        """What is drawn, where, with which smoothed values, in which size (inches)."""
        found: dict[str, Curve] = {}
        for line in self.history:
            judged = any(name.startswith("eval_") for name in line)
            for name, value in line.items():
                if name in RAW or not isinstance(value, (int, float)) or not (judged or training):
                    continue
                curve = found.setdefault(name, Curve(name, [], []))
                curve.steps.append(line[self.key])
                curve.values.append(float(value))
        out: list[tuple[Path, Curve, Sequence[float] | None, tuple[float, float]]] = []
        for name, curve in found.items():
            if self._wants:
                tag = name if name.startswith("eval_") else f"train_{name}"
                smoothed = debiased(curve.values, 0.9) if name == "loss" else None
                out.append((self.folder / "images" / f"{tag.replace('/', '_')}.png", curve, smoothed, (8, 5)))
            elif name in ("eval_loss", "eval_accuracy"):
                out.append((self.folder / f"training_{name}.png", curve, smooth(curve.values), (6.4, 4.8)))
        return out

    def _translated(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line in the Trainer's keys, floats rounded for ms-swift's."""
        entry: dict[str, Any] = {}
        for name, value in line.items():
            if name in TRAINING:
                entry[TRAINING[name]] = value
            elif name.startswith("eval_"):
                entry[JUDGING.get(name, name) if self._wants else name] = value
        entry |= {"epoch": line["epoch"]} if "epoch" in line else {}
        entry[self.key] = line["current_steps"]
        if self._wants:
            entry = {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in entry.items()}
        return entry

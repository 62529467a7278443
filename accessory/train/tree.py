"""A run's folder in the layout of a dialect: where it lies, the small files of it and of its checkpoints.

Must not know models or steps; of what is written it knows the form only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from accessory.checkpoint.huggingface.papers import generation_json
from accessory.dialect.layout import LAYOUTS, Layout, last_run, run_folder
from accessory.dialect.swift import arguments
from accessory.dist import Ranks
from accessory.release import tokens_of
from accessory.train.evaluate import Best
from accessory.train.folder import decide, is_requeued
from accessory.train.leaving import Leaving
from accessory.train.lines import LOGGING, Lines
from accessory.train.resume import checkpoints
from accessory.train.settings import Settings

TINY_NAME = "tiny"
# our own words beside the tool's, for whoever opens what the run leaves
NOTED = ("dataset_dir", "media_dir", "max_samples", "tokenizer_path", "only_save_trainable")
NOTED += ("seed", "lora_rank", "lora_alpha")
_NUMBERED = re.compile(r"v(\d+)-.+")
_TRIES = 100  # runs that are started in the same second


def place(settings: Settings, ranks: Ranks, group: ProcessGroup | None) -> Path:
    """The folder of this run, the same on all ranks: output_dir, or in layouts that number their runs one below it.

    Such a run is a new one, unless resume says where to go on: auto, in the newest run that has checkpoints; a
    checkpoint, in its own. A requeued job goes on in the newest run. OSError where no folder can be made.
    """
    return decide(lambda: _place(settings), ranks, group)


def model_name(settings: Settings) -> str:
    """What the folders of a model's runs are called: its type, or the name of its folder or hub id."""
    if settings.model_type:
        return settings.model_type
    named = settings.model_name_or_path
    return Path(named[0]).expanduser().resolve().name if named else TINY_NAME


def _place(settings: Settings) -> Path:
    """On rank 0: decide."""
    layout, told = LAYOUTS[settings.output_layout], settings.resume
    if "{number}" not in layout.run or not settings.add_output_dir_suffix:
        return Path(settings.output_dir)
    model = model_name(settings)
    if told not in ("auto", "never") and _NUMBERED.fullmatch(Path(told).resolve().parent.name):
        return Path(told).parent
    newest = last_run(layout, settings.output_dir, model)
    if newest is not None and is_requeued(os.environ):
        return newest
    if newest is not None and told == "auto":
        runs = [(int(match[1]), path) for path in newest.parent.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
        return next((path for _, path in sorted(runs, reverse=True) if checkpoints(path)), newest)
    for _ in range(_TRIES):
        path = run_folder(layout, settings.output_dir, model, now=datetime.now())
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise OSError(f"output_dir: no new folder can be made below {settings.output_dir}; choose another one")


@dataclass
class Tree:
    """The small files of a run."""

    settings: Settings
    folder: Path
    leaving: Leaving
    leads: bool
    """Whether this rank writes."""
    lines: Lines | None = field(init=False)
    """The log in the tool's keys."""

    def __post_init__(self) -> None:
        wanted = self.leads and self.settings.output_layout != "accessory"
        self.lines = Lines(self.folder, journal=self.layout.log == LOGGING) if wanted else None

    @property
    def layout(self) -> Layout:
        """Names of folders and files."""
        return LAYOUTS[self.settings.output_layout]

    @property
    def in_last(self) -> bool:
        """Whether the trained model lies in the last checkpoint, and nowhere else."""
        return self.layout.final == "last" and self.leaving.last

    def begin(self) -> None:
        """Write what is known before the first step. OSError where that cannot be."""
        if self.leads and self.layout.arguments is not None:
            put(self.folder / self.layout.arguments, self.arguments())
            put(self.folder / "training_args.json", asdict(self.settings))

    def arguments(self) -> dict[str, Any]:
        """Settings in the tool's words, as far as another program needs them to open what the run leaves."""
        settings, subject = self.settings, self.leaving.subject
        told, template = asdict(settings), subject.template
        named = settings.model_name_or_path
        if named and Path(named[0]).exists():
            told["model_name_or_path"] = [str(Path(name).resolve()) for name in named]
        told["template"] = template if "{" in template or "/" in template else f"accessory/{template}"
        return {
            **arguments(told),
            **{name: told[name] for name in NOTED},
            "check_dataset_strategy": "none" if settings.on_bad_row == "error" else "discard",
            "lora_dropout_p": settings.lora_dropout,
            "lora_target_modules": settings.lora_target,
            "learning_rate": settings.learning_rate,
        }

    def texts(self, step: int, *, total: int, epoch: float | None, best: Best) -> dict[str, str]:
        """Further files of a checkpoint, by name; none in Accessory's own layout."""
        if self.lines is None:
            return {}
        known = {"best_metric": None if best.step is None else best.loss, "best_model_checkpoint": self._best(best)}
        known |= {"epoch": epoch, "global_step": step, "max_steps": total, "log_history": self.lines.history}
        tables: dict[str, Any] = {"trainer_state.json": known}
        if self.layout.arguments is not None:
            tables |= {self.layout.arguments: self.arguments(), "configuration.json": self._configuration()}
        if self.leaving.whole is None:
            subject = self.leaving.subject
            tables["generation_config.json"] = generation_json(tokens_of(subject), subject.told)
        return {name: json.dumps(table, indent=2, ensure_ascii=False, default=str) for name, table in tables.items()}

    def end(
        self, step: int, results: Mapping[str, float], *, samples: int, best: Best, told: Mapping[str, Any]
    ) -> None:
        """Write the last line of the log: what sft_main returns. told: model_info, dataset_info and the like."""
        if self.lines is None:
            return
        last = self.folder / f"checkpoint-{step}"
        time = {name: results.get(name) for name in ("train_runtime", "train_samples_per_second")}
        self.lines.end(
            {
                **told,
                "train_time": {**time, "n_train_samples": samples},
                "last_model_checkpoint": str(last) if last.is_dir() else None,
                "best_model_checkpoint": self._best(best),
                "best_metric": None if best.step is None else best.loss,
                "global_step": step,
            }
        )

    def draw(self) -> None:
        """Draw what the tool draws at the end of a run."""
        if self.lines is not None and self.settings.plot_loss:
            swift = self.layout.plots != ""
            title = "{}" if swift else f"training {{}} of {self.settings.output_dir}"
            self.lines.draw(title=title, training=swift)

    def _best(self, best: Best) -> str | None:
        """The checkpoint with the lowest validation loss."""
        path = self.folder / f"checkpoint-{best.step}"
        return str(path) if best.step is not None else None

    def _configuration(self) -> dict[str, Any]:
        """configuration.json: what ModelScope's tools read of a checkpoint."""
        sees = "vision" in self.leaving.subject.flat
        table: dict[str, Any] = {"framework": "pytorch", "task": "multi-modal-chat" if sees else "text-generation"}
        if self.leaving.adapter is not None:
            named = ("model_id_or_path", "model_revision", "sft_type", "template_type", "dtype", "system")
            told = self.arguments()
            table["adapter_cfg"] = {**{name: told[name] for name in named}, "tuner_backend": "peft"}
        return table


def put(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(table, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)

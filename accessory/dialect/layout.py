"""Where a run of a dialect puts what it leaves: names of folders and files, as data.

Must not write anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

Name = Literal["accessory", "llamafactory", "swift"]


@dataclass(frozen=True)
class Layout:
    """Paths are relative to the run's folder unless they begin with a brace."""

    run: str
    """The run's folder: {output_dir}, {model} (the model's type or folder name), {number}, {time}."""
    checkpoint: str = "checkpoint-{step}"
    final: str = ""
    """Where the trained model lies when the run is over; "": in the run's folder itself; "last": in the last
    checkpoint."""
    settings: str = "train.yaml"
    arguments: str | None = None
    """Settings once more in the tool's words, in the run's folder and in every checkpoint."""
    log: str = "trainer_log.jsonl"
    events: str = "runs"
    plots: str = ""
    """Folder of the drawings."""
    merged: str = "{checkpoint}-merged"
    """Folder that `export --merge_lora true` writes."""
    answers: str = "{checkpoint}/infer_result/{time}.jsonl"
    """File that `infer --ckpt_dir` writes."""


LAYOUTS: dict[Name, Layout] = {
    "accessory": Layout(run="{output_dir}"),
    "llamafactory": Layout(run="{output_dir}"),
    "swift": Layout(
        run="{output_dir}/{model}/v{number}-{time}",
        final="last",
        arguments="sft_args.json",
        log="logging.jsonl",
        plots="images",
    ),
}
_VERSION = re.compile(r"v(\d+)-.+")


def run_folder(layout: Layout, output_dir: str | Path, model: str, *, now: datetime) -> Path:
    """The folder of a new run. Where the layout numbers its runs: one more than the highest number that is there."""
    if "{number}" not in layout.run:
        return Path(layout.run.format(output_dir=output_dir, model=model, time=f"{now:%Y%m%d-%H%M%S}"))
    parent = Path(layout.run.format(output_dir=output_dir, model=model, number=0, time="")).parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    number = 1 + max((int(found[1]) for name in names if (found := _VERSION.fullmatch(name))), default=-1)
    return Path(layout.run.format(output_dir=output_dir, model=model, number=number, time=f"{now:%Y%m%d-%H%M%S}"))


def last_run(layout: Layout, output_dir: str | Path, model: str) -> Path | None:
    """The newest run of a layout that numbers its runs, for one that goes on; None where there is none."""
    parent = Path(layout.run.format(output_dir=output_dir, model=model, number=0, time="")).parent
    entries = parent.iterdir() if "{number}" in layout.run and parent.is_dir() else ()
    runs = {int(found[1]): entry for entry in entries if (found := _VERSION.fullmatch(entry.name))}
    return runs[max(runs)] if runs else None

"""The folder of a prediction: answers of an earlier run that may be gone on with, progress, scores at the end.

Must not know models, engines or ranks: rank 0 alone calls what writes here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory import metrics
from accessory.config import dump
from accessory.serve import journal

if TYPE_CHECKING:
    from accessory.data.feed import RawRow
    from accessory.serve.predict_settings import PredictSettings

log = logging.getLogger(__name__)

ANSWERS, NOTES, STATE = "generated_predictions.jsonl", "predict.yaml", "predict_state.json"
RESULTS, ALL, PROGRESS = "predict_results.json", "all_results.json", "trainer_log.jsonl"
EVERY = 5  # steps between two lines of progress
# what may differ between a run and the one that goes on with its answers
_FREE = (
    "dialect device tensor_parallel_size nproc_per_node per_device_eval_batch_size ddp_timeout output_dir"
    " overwrite_output_dir on_bad_row allow_private_urls dry_run"
).split()
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".json", ".model")


def enter(settings: PredictSettings, rows: Sequence[RawRow]) -> set[str]:
    """Make or take over the folder; the ids of rows that were answered before.

    Raises ValueError where its answers are of other settings, of a model or of rows that have changed since, or where
    another run is at them.
    """
    folder = Path(settings.output_dir)
    path, state = folder / ANSWERS, folder / STATE
    journal.check_free(path)
    wanted = {"settings": _settled(settings), "model": _model(settings)}
    found = journal.parts(path)
    if found and not settings.overwrite_output_dir:
        told = _read(state)
        _compare(folder, told.get("settings", {}), wanted["settings"])
        if told.get("model") != wanted["model"]:
            raise ValueError(_other(folder, "a model whose files have changed since"))
        known = _known(path, rows)
        log.info("%s: going on, %d of %d rows were answered before", path, len(known), len(rows))
        return known
    if found:
        finished = "" if (folder / RESULTS).exists() else " and not all; without overwrite_output_dir they are kept"
        log.info("%s: beginning anew; it held %d answers%s", folder, len(journal.read_lines(path)), finished)
    if state.exists():  # the lines of progress that are there may be a training run's
        (folder / PROGRESS).unlink(missing_ok=True)
    for old in (*found, folder / RESULTS):
        old.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write(state, wanted)
    dump(settings, folder / NOTES)
    return set()


def digest(row: RawRow) -> str:
    """What is asked in a row and expected of it, in 16 hex digits."""
    told = [[asdict(turn) for turn in row.turns], row.system, row.label, row.pictures, row.template]
    return hashlib.sha256(json.dumps(told, ensure_ascii=True).encode()).hexdigest()[:16]


def line(
    row: RawRow, prompt: str, answer: str, *, finish: str, dropped: int = 0, images: Sequence[str] = ()
) -> dict[str, Any]:
    """A line of the answers: LLaMA-Factory's three fields first, then those by which a later run knows the row.

    dropped: positions of the question that did not fit, the oldest ones. A row without an answer has the label "".
    """
    told: dict[str, Any] = {"prompt": prompt, "predict": answer, "label": row.label or "", "id": row.id}
    told |= {"digest": digest(row), "finish": finish}
    return told | ({"dropped": dropped} if dropped else {}) | ({"images": list(images)} if images else {})


def conclude(folder: Path, rows: Sequence[RawRow], report: Mapping[str, float]) -> dict[str, float]:
    """Put the answers in order, score them, and write predict_results.json and all_results.json; the results.

    report: runtime, samples_per_second and the like of this run; what it lacks stays as an earlier run wrote it.
    Answers to rows without a label are counted and not scored.
    """
    records = journal.finish(folder / ANSWERS, [row.id for row in rows])
    labelled = [record for record in records if record["label"]]
    scores = metrics.mean([metrics.score(record["predict"], record["label"]) for record in labelled])
    if labelled:
        matches = sum(metrics.exact_match(record["predict"], record["label"]) for record in labelled)
        scores["exact_match"] = 100 * matches / len(labelled)
    values: dict[str, float] = {**scores, **report, "samples": len(records)}
    values["unlabelled"] = len(records) - len(labelled)
    values["cut"] = sum(record["finish"] == "length" for record in records)
    values["shortened"] = sum("dropped" in record for record in records)
    old = _read(folder / RESULTS)
    kept = {name: old[name] for name in (f"predict_{time}" for time in _TIMES) if name in old}
    results = kept | {f"predict_{name}": value for name, value in values.items()}
    results = {name: value for name, value in results.items() if math.isfinite(value)}
    _write(folder / RESULTS, results)
    _write(folder / ALL, {**_read(folder / ALL), **results})
    return results


class Progress:
    """trainer_log.jsonl while rows are answered: a line every 5 steps, of as many rows as all ranks take at once."""

    def __init__(self, path: Path, *, rows: int, known: int, at_once: int) -> None:
        """rows: all; known: answered by earlier runs; at_once: of all data-parallel ranks."""
        self._path, self._rows, self._known, self._at_once = path, rows, known, at_once
        self.steps = math.ceil(rows / at_once)
        self._told, self._began = known // at_once, time.monotonic()

    def show(self, answered: int) -> None:
        """Take in how many rows all ranks have answered in this run, as far as this rank can tell."""
        done = min(self._known + answered, self._rows)
        step = self.steps if done == self._rows else done // self._at_once
        if step == self._told or (step < self.steps and step < self._told + EVERY):
            return
        self._told = step
        elapsed = time.monotonic() - self._began
        told = {
            "current_steps": step,
            "total_steps": self.steps,
            "percentage": round(100 * step / self.steps, 2),
            "elapsed_time": _duration(elapsed),
            "remaining_time": _duration(elapsed / max(answered, 1) * (self._rows - done)),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


def _duration(seconds: float) -> str:
    """1:02:03, or 2 days, 1:02:03."""
    return str(timedelta(seconds=int(seconds)))


def _settled(settings: PredictSettings) -> dict[str, Any]:
    """What decides an answer, as JSON has it."""
    told = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    return json.loads(json.dumps(told))


def _model(settings: PredictSettings) -> dict[str, list[Any]]:
    """Names, sizes and times of the files of every folder of the model: a retrained adapter has others."""
    paths = [*settings.model_name_or_path, *settings.adapter_name_or_path]
    found: dict[str, list[Any]] = {}
    for folder in (Path(path) for path in paths if Path(path).is_dir()):
        files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
        found[str(folder)] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return found


def _compare(folder: Path, told: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError that names a setting which differs."""
    if not told:
        raise ValueError(_other(folder, f"no settings noted in {STATE}"))
    for name, value in wanted.items():
        if name not in told or told[name] != value:
            raise ValueError(_other(folder, f"{name} {told.get(name)!r:.80}, now {value!r:.80}"))


def _other(folder: Path, how: str) -> str:
    """Why answers are not gone on with."""
    return (
        f"output_dir: {folder} holds answers of another run ({how}), expected one of the same settings; set"
        " overwrite_output_dir true to begin anew, or give another folder"
    )


def _known(path: Path, rows: Sequence[RawRow]) -> set[str]:
    """Ids of the rows that have answers. ValueError where a row has changed since."""
    told = {record["id"]: record for record in journal.read_lines(path, mend=True) if "id" in record}
    known = {row.id for row in rows if row.id in told}
    for row in rows:
        if row.id in known and told[row.id].get("digest") != digest(row):
            raise ValueError(_other(path.parent, f"{row.where} has changed since it was answered"))
    if stray := set(told) - known:
        raise ValueError(_other(path.parent, f"answers to {len(stray)} rows that are not there, as {min(stray)}"))
    return known


def _read(path: Path) -> dict[str, Any]:
    """What stands in a JSON file; nothing where it is absent or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=4, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)

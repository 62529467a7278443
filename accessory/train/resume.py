"""The checkpoints of a run: which there are, what speaks against each, which one to go on from, which are too many.

Must not know a model or a loop; nothing here talks to other ranks, so only rank 0 calls it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.checkpoint import manifest
from accessory.checkpoint.files import FACTS, FORMS, few, recognise

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
VERSION = 1  # of facts.json
GONE = ".old"  # ends the hidden name of a checkpoint that is being deleted

# what a run may change when it goes on: a sentence why it may not, or None where the config's value counts from then on
RULES: dict[str, str | None] = {
    "data": "rows would be repeated or left out; give the same data and template, or begin anew",
    "seed": "the order of rows comes from it, so that some would be repeated or left out; give the same seed",
    "optimizer": "its state cannot become another's; give the same optim, or begin anew from the weights",
    "base": None,
    "quantization_bit": None,
    "precision": None,
    "lora": None,
    "global_batch": None,
    "total_steps": None,
    "learning_rate": None,
    "lr_scheduler_type": None,
    "warmup_steps": None,
    "betas": None,
    "epsilon": None,
    "weight_decay": None,
    "max_grad_norm": None,
}


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, and what its run noted."""

    path: Path
    step: int
    facts: dict[str, Any] = field(default_factory=dict)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoint-N in a folder, valid or not, the newest last."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in entries if (match := _NAME.fullmatch(path.name)))


def flaws(path: Path, *, hashes: bool) -> list[str]:
    """What speaks against a checkpoint, a sentence each: by names and sizes, with `hashes` by every byte too."""
    try:
        entries = manifest.read(path)
        if entries is None:
            return [f"it has no {manifest.NAME}, so it was not written to its end"]
        found = recognise(path)
        if found.form != "training":
            return [f"it is in {FORMS[found.form]} form and holds no state of an optimizer"]
        names = [FACTS, *(shard.name for shard in found.shards)]
        faults = [f"{name} is not in {manifest.NAME}" for name in names if name not in entries]
        if (version := found.facts.get("version", 0)) > VERSION:
            faults.append(f"{FACTS} is of version {version}, this program knows {VERSION}")
        match, step = _NAME.fullmatch(path.name), found.facts.get("step")
        if type(step) is not int or (match and int(match[1]) != step):
            faults.append(f"{FACTS} says step {step}")
        return faults + manifest.faults(path, hashes=hashes)
    except (ValueError, OSError) as error:
        return [str(error)]


def find_checkpoint(folder: Path, *, resume: str) -> Found | None:
    """The checkpoint to go on from: `auto` the newest valid one in a run's folder, `never` none, or the one at a path.

    One is valid when its manifest and the SHA-256 of every file agree. Which one is taken, which were passed over and
    why, is logged. Raises ValueError for a path that holds no valid one, and where a folder has some but none is valid.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _at(Path(resume))
    passed = []
    for step, path in reversed(checkpoints(folder)):
        log.info("%s: comparing its SHA-256", path)
        if not (faults := flaws(path, hashes=True)):
            log.info("going on from %s, the newest valid one of %d in %s", path, len(checkpoints(folder)), folder)
            return Found(path, step, recognise(path).facts)
        passed.append(f"{path}: {few(faults, ';', most=3)}")
        log.warning("%s is passed over: %s", path, few(faults, ";", most=3))
    if passed:
        raise ValueError(
            f"{folder}: none of its {len(passed)} checkpoints is valid ({few(passed, ';', most=2)}); restore one, or"
            " begin anew with overwrite_output_dir true, which moves them aside"
        )
    return None


def check_facts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint's run noted with the config of the run that goes on from it, by the table `RULES`.

    Where a rule allows a difference the config counts, and that is logged with both values; what either side lacks is
    not compared, with a warning if it matters. Raises one ValueError for all that may not differ.
    """
    refused = []
    for name, reason in RULES.items():
        if name not in now:
            continue
        if name not in saved:
            if reason is not None:
                log.warning("the checkpoint does not say its %s, so it is not compared", name)
            continue
        was, will = (json.loads(json.dumps(table[name])) for table in (saved, now))  # tuples come back as lists
        if was == will:
            continue
        if reason is None:
            log.warning("%s: the checkpoint was written with %s, from here on the config's %s counts", name, was, will)
        else:
            refused.append(f"{name}: got {will}, expected the checkpoint's {was}, since {reason}")
    if refused:
        raise ValueError("cannot go on from the checkpoint: " + "; ".join(refused))


def prune(folder: Path, keep: int, *, best: int | None = None, within: bool = False) -> None:
    """Delete the oldest valid checkpoints beyond the newest `keep`; the best step stays beside them, or among them.

    within: the best step is one of `keep`, of which there are then two at least.

    A checkpoint that is not valid counts for nothing and is left alone. What cannot be deleted is warned of and stays.
    """
    valid = [(step, path) for step, path in checkpoints(folder) if not flaws(path, hashes=False)]
    if within and best in [step for step, _ in valid[: max(0, len(valid) - keep)]]:
        keep = max(1, keep - 1)
    for step, path in valid[: max(0, len(valid) - keep)]:
        if step == best:
            continue
        gone = path.with_name(f".{path.name}{GONE}")  # a half-deleted one must not look like a damaged one
        try:
            os.rename(path, gone)
            shutil.rmtree(gone)
        except OSError as error:
            log.warning("%s cannot be deleted (%s); it takes room until someone does", path, error.strerror or error)


def _at(path: Path) -> Found:
    """The checkpoint at a path that the user named."""
    if not path.is_dir():
        raise ValueError(f"resume: got {path}, expected auto, never, or the folder of a checkpoint; it is none")
    if inside := checkpoints(path):
        raise ValueError(f"resume: got {path}, which holds checkpoints, expected one of them; give {inside[-1][1]}")
    log.info("%s: comparing its SHA-256", path)
    if faults := flaws(path, hashes=True):
        raise ValueError(
            f"resume: got {path}, expected a valid checkpoint: {few(faults, ';', most=3)}; give another one, or begin"
            " from weights alone with model_name_or_path"
        )
    facts = recognise(path).facts
    log.info("going on from %s, as resume says", path)
    return Found(path, facts["step"], facts)

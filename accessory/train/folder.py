"""The folder of a run: taken by one run at a time, entered by rules, tidied after a kill; nothing of a user is deleted.

Must not know what a checkpoint holds.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from torch.distributed import ProcessGroup

from accessory.checkpoint import manifest
from accessory.checkpoint.files import few, holds_all
from accessory.checkpoint.stage import explain
from accessory.dist import Ranks
from accessory.train.agree import share
from accessory.train.resume import Found, checkpoints, find_checkpoint

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCK = ".lock"
ASIDE = "previous-"
LOG = "trainer_log.jsonl"
_ELASTIC = "TORCHELASTIC_RESTART_COUNT"
# what a killed run leaves: temporary folders of a Stage, a final folder on its way in, checkpoints being deleted
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.final|\.checkpoint-\d+\.old")
# what exps/launch.sh keeps here before a run begins: it says nothing of a run, and stays in place
_LAUNCHER = re.compile(r"output(-\d+)?\.log|\.exit-.+")

_held: set[int] = set()  # locked files of this process; a forked worker that outlives it must not keep the lock
os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in range(len(_held))])


class RunFolder:
    """`with RunFolder(path, ranks) as run: run.find("auto")`: rank 0 takes the folder and decides, all ranks learn it.

    A folder that holds a run of ours is gone on with; with `overwrite` the old run's files are moved to previous-N/,
    unless the job was requeued. One that holds other files is entered only with `overwrite`, and they stay as they are.
    """

    def __init__(
        self, path: str | Path, ranks: Ranks, *, overwrite: bool = False, group: ProcessGroup | None = None
    ) -> None:
        """Look at nothing yet. group: over all ranks, by default the job's; a patient one waits for hashes of a TB."""
        self.path, self.ranks, self.overwrite = Path(path), ranks, overwrite
        self._group = ranks.host_group if group is None else group
        self.requeued = is_requeued(os.environ)
        self._handle: int | None = None

    def find(self, resume: str) -> Found | None:
        """The checkpoint to go on from (see `find_checkpoint`), the same on all ranks; newer ones are moved aside.

        A requeued job takes its own newest one whatever `resume` says. Raises ValueError as `find_checkpoint` does, and
        where `resume` would start a second history beside the one in the folder.
        """
        return decide(lambda: self._find(resume), self.ranks, self._group)

    def __enter__(self) -> RunFolder:
        """Take the folder. ValueError or OSError, on all ranks, where it is in use, not ours or read-only."""
        decide(self._take, self.ranks, self._group)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let another run have it."""
        if self._handle is not None:
            _held.discard(self._handle)
            os.close(self._handle)
            self._handle = None

    def _take(self) -> None:
        """On rank 0: lock the folder, tidy it, and move an old run aside where that is wanted."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir: got {self.path}, which is a file, expected a folder; choose another one")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            passed = (_LEFTOVER, _LAUNCHER)
            there = sorted(
                entry.name for entry in self.path.iterdir() if not any(known.fullmatch(entry.name) for known in passed)
            )
            ours = not there or LOCK in there or LOG in there or bool(checkpoints(self.path))
            if not ours and not self.overwrite:
                raise ValueError(
                    f"output_dir: got {self.path}, which holds {few(there, most=4)} but no run of ours, expected an"
                    " empty folder or a new one; choose another, or set overwrite_output_dir true to write beside them"
                )
            others = self._lock([] if ours else there)
        except OSError as error:
            raise explain(error, self.path, nbytes=0) from error
        self._tidy()
        if not (ours and self.overwrite):
            return
        old = [entry for entry in self.path.iterdir() if entry.name not in (LOCK, *others)]
        old = [entry for entry in old if not (entry.name.startswith(ASIDE) or _LAUNCHER.fullmatch(entry.name))]
        if self.requeued:
            log.info("%s: this job was requeued, so its run goes on though overwrite_output_dir is true", self.path)
        elif old:
            log.info("overwrite_output_dir: the run in %s was moved to %s", self.path, set_aside(self.path, old))

    def _lock(self, others: list[str]) -> list[str]:
        """Take the lock and note who did; return the names of files that were there before any run of ours."""
        path = self.path / LOCK
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        noted = _read_note(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            who = f"process {noted.get('pid', '?')} on {noted.get('host', '?')}, since {noted.get('since', '?')}"
            raise ValueError(
                f"output_dir: got {self.path}, in which another run is writing ({who}), expected one run at a time;"
                " choose another folder, or wait until that one has ended"
            ) from error
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): see to it yourself that no second run writes there", path, error)
        self._handle = handle
        _held.add(handle)
        others = [*others, *(name for name in noted.get("others", ()) if name not in others)]
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "others": others}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode(), 0)
        return others

    def _tidy(self) -> None:
        """Remove what a killed run left half-written or half-deleted; none of it was ever complete."""
        for entry in [*self.path.iterdir()]:
            if _LEFTOVER.fullmatch(entry.name) and entry.is_dir():
                log.info("%s: removed, a run was killed while writing or deleting it", entry)
                shutil.rmtree(entry, ignore_errors=True)

    def _find(self, resume: str) -> Found | None:
        """On rank 0: find, and move aside what a run from there would run into."""
        own = [path for _, path in checkpoints(self.path)]
        if self.requeued and own:
            if resume != "auto":
                log.info("this job was requeued: it goes on with its own run, resume %s does not count", resume)
            resume = "auto"
        elif resume == "never" and own:
            raise ValueError(
                f"resume: got never for {self.path}, which holds {own[-1].name}, expected a folder without a run;"
                " choose another output_dir, or set overwrite_output_dir true, which moves the old run aside"
            )
        found = find_checkpoint(self.path, resume=resume)
        if found is None:
            self._refuse_finished()
            return None
        if own and found.path.resolve().parent != self.path.resolve():
            raise ValueError(
                f"resume: got {resume} for {self.path}, which holds {own[-1].name} of a run of its own; choose another"
                " output_dir, or set overwrite_output_dir true, which moves that run aside"
            )
        if newer := [path for step, path in checkpoints(self.path) if step > found.step]:
            log.warning("moved to %s: %s", set_aside(self.path, newer), few(path.name for path in newer))
        return found

    def _refuse_finished(self) -> None:
        """ValueError where a finished run left weights and no checkpoint to go on from."""
        for place in (self.path, self.path / "final"):
            names = [entry.name for entry in place.iterdir()] if place.is_dir() else []
            whole = holds_all(names) or "adapter_model.safetensors" in names
            written = whole or any(name.startswith("consolidated.") for name in names)
            if written and not (place / manifest.UNFINISHED).exists():
                raise ValueError(
                    f"output_dir: got {self.path}, which holds the weights of a finished run and no checkpoint; choose"
                    " another one, or set overwrite_output_dir true, which moves that run aside"
                )


def is_requeued(env: Mapping[str, str]) -> bool:
    """Whether SLURM requeued this job, or torchrun started its ranks again."""
    return any(env.get(name, "0").strip() not in ("", "0") for name in ("SLURM_RESTART_COUNT", _ELASTIC))


def set_aside(folder: Path, paths: Iterable[Path]) -> Path:
    """Move files or folders to a new previous-N/ in `folder`, and return that; checkpoints first, from the newest."""
    taken = [int(name) for entry in folder.glob(f"{ASIDE}*") if (name := entry.name[len(ASIDE) :]).isdecimal()]
    where = folder / f"{ASIDE}{max(taken, default=0) + 1}"
    where.mkdir()
    steps = {path: step for step, path in checkpoints(folder)}
    for path in sorted(paths, key=lambda path: (-steps.get(path, -1), path.name)):
        os.rename(path, where / path.name)
    return where


def decide(work: Callable[[], T], ranks: Ranks, group: ProcessGroup | None) -> T:
    """What rank 0's work() returns, on every rank; its ValueError or OSError too."""
    answer: T | None = None
    error: Exception | None = None
    if ranks.rank == 0:
        try:
            answer = work()
        except (ValueError, OSError) as caught:
            error = caught
    answer, error = share((answer, error), group)
    if error is not None:
        raise error
    return answer


def _read_note(path: Path) -> dict[str, object]:
    """What the lock's holder noted; {} where it is not to be read."""
    try:
        return manifest.load_json(path)
    except ValueError:
        return {}

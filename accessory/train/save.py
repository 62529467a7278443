"""Checkpoints written beside the training: a step waits for a copy to host memory, a thread per rank does the rest.

Must not know what the pieces are, nor when a checkpoint is due.

All ranks write their own file of checkpoint-N into one hidden folder; when all of them said that theirs is on the disk,
rank 0 adds the small files and the manifest and renames the folder. A kill at any moment leaves the checkpoints before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed import ProcessGroup

from accessory.checkpoint.boxes import Box, Piece, StateFiles, read_boxes, state_file
from accessory.checkpoint.files import FACTS, few
from accessory.checkpoint.huggingface.adapter_writer import AdapterFiles, AdapterForm
from accessory.checkpoint.manifest import Entry
from accessory.checkpoint.stage import Stage, explain
from accessory.checkpoint.staging import Staging
from accessory.checkpoint.training import MODEL
from accessory.checkpoint.write import Papers
from accessory.dist import Ranks
from accessory.train.agree import gather, share
from accessory.train.folder import set_aside
from accessory.train.resume import VERSION, checkpoints, flaws, prune
from accessory.train.whole import Whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """What rank 0 tells the others before they write."""

    folder: str | None = None
    fault: str | None = None
    stands: str | None = None
    """The newest checkpoint that is there."""


@dataclass(frozen=True)
class _Done:
    """How a save ended, the same on all ranks."""

    fault: str | None = None
    stands: str | None = None


class Saver:
    """Writes checkpoint-N folders, one at a time. All ranks make the same calls in the same order.

    `best` may name a step that stays beside the newest `keep`. Use it as a context: leaving it waits for the last save.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int | None = None,
        group: ProcessGroup | None = None,
        papers: Papers | None = None,
        adapter: AdapterForm | None = None,
        whole: Whole | None = None,
        best_within: bool = False,
    ) -> None:
        """group: a gloo group over all ranks that nobody else uses (`dist.ranks.host_group`); None with one rank.

        keep: None for all. papers: config, meta and tokenizer, so that a checkpoint opens like any folder of weights.
        adapter, whole: the weights are written as an adapter of PEFT too, or all of them in Hugging Face's form, beside
        the states that a run goes on from. best_within: the best checkpoint is one of `keep`, and not one more.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"save_total_limit: got {keep}, expected at least 1, or none to keep all checkpoints")
        assert (group is None) == (ranks.world == 1), f"{ranks.world} ranks need a group of their own, one needs none"
        self.folder, self.ranks, self.keep, self.papers = Path(folder), ranks, keep, papers or Papers()
        self.adapter, self.whole, self.best_within = adapter, whole, best_within
        self.best: int | None = None
        self._group = group
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._done: _Done | Exception = _Done()

    def save(
        self,
        step: int,
        pieces: Mapping[str, Piece],
        facts: Mapping[str, Any],
        *,
        texts: Mapping[str, str] | None = None,
        final: bool = False,
    ) -> None:
        """Copy the pieces and return; the rest goes on in a thread. A save that is under way is waited for first.

        Names begin with model/ (canonical ones, so that `open_folders` finds the weights) or another set's name. facts
        go into facts.json, with step and world; `base` there is a list of the folders that belong before this one.
        texts: further files by name, of rank 0.
        Where writing fails, the files of that save are removed and the rest stays as it is: with an older checkpoint to
        fall back to that is a warning, without one an OSError of the next call. final: wait, and raise it in any case.
        """
        self.wait()
        text = json.dumps(
            {"version": VERSION, **facts, "step": step, "world": self.ranks.world}, indent=1, allow_nan=False
        )
        self._staging.fill({name: piece for name, piece in pieces.items() if piece.mine and piece.box.numel})
        self._thread = threading.Thread(
            target=self._run, args=(step, {**(texts or {}), FACTS: text}), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        if final:
            self.wait(final=True)

    def wait(self, *, final: bool = False) -> None:
        """Wait for the save that is under way, if there is one. OSError when it failed (see `save`)."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        done = self._done
        if isinstance(done, Exception):
            raise done
        if done.fault is not None and (final or done.stands is None):
            raise OSError(done.fault)

    def close(self) -> None:
        """Wait for the save that is under way, and give the memory back."""
        try:
            self.wait()
        finally:
            self._staging.free()

    def __enter__(self) -> Saver:
        """Nothing to prepare."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close; after an error of the run, what the save has to say is only logged."""
        try:
            self.close()
        except Exception as later:
            if error is None:
                raise
            log.warning("the save under way did not end well either: %s", later)

    def _run(self, step: int, texts: Mapping[str, str]) -> None:
        """The thread."""
        try:
            self._done = self._attempt(step, texts)
        except Exception as error:  # a broken collective, or a bug: the main thread raises it
            self._done = error

    def _attempt(self, step: int, texts: Mapping[str, str]) -> _Done:
        """Write this rank's file, agree, and on rank 0 complete the folder."""
        began = time.monotonic()
        target = self.folder / f"checkpoint-{step}"
        nbytes = sum(gather(self._staging.nbytes, self._group)) + (0 if self.whole is None else self.whole.nbytes)
        with contextlib.ExitStack() as stack:
            stage, place = self._open(target, nbytes, stack) if self.ranks.rank == 0 else (None, _Place())
            place = share(place, self._group)
            if place.folder is None:
                return self._report(_Done(place.fault, place.stands))
            name = state_file(self.ranks.rank, self.ranks.world)
            written = gather((name, self._write(Path(place.folder) / name, target, nbytes)), self._group)
            known = {name: entry for name, entry in written if isinstance(entry, Entry)}
            faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(written) if isinstance(fault, str)]
            fault = few(faults, ";", most=2) or None
            if stage is not None and fault is None:
                fault = self._commit(stage, known, texts)
            done = share(_Done(fault, place.stands), self._group)
        if self.ranks.rank == 0 and done.fault is None:
            log.info("%s: %s bytes in %.1f s", target, f"{nbytes:,}", time.monotonic() - began)
            if self.keep is not None:
                prune(self.folder, self.keep, best=self.best, within=self.best_within)
        return self._report(done)

    def _open(self, target: Path, nbytes: int, stack: contextlib.ExitStack) -> tuple[Stage | None, _Place]:
        """On rank 0: the hidden folder to write to."""
        valid = [str(path) for _, path in checkpoints(self.folder) if not flaws(path, hashes=False)]
        stands = valid[-1] if valid else None
        names = [state_file(rank, self.ranks.world) for rank in range(self.ranks.world)]
        try:
            if str(target) in valid:
                log.info("%s is there already", target)
                return None, _Place(stands=stands)
            if target.exists():
                log.warning("%s is not valid; it was moved to %s", target, set_aside(self.folder, [target]))
            stage = Stage(target, [*names, FACTS], nbytes=nbytes)
            stack.enter_context(stage)
        except (OSError, ValueError) as error:
            return None, _Place(fault=str(error), stands=stands)
        return stage, _Place(folder=str(stage.folder), stands=stands)

    def _write(self, path: Path, target: Path, nbytes: int) -> Entry | str:
        """This rank's file, or what went wrong."""
        try:
            return self._staging.write(path)
        except OSError as error:
            return str(explain(error, target, nbytes=nbytes))
        except Exception as error:  # the other ranks wait for a word
            return f"{target}: {type(error).__name__}: {error}"

    def _commit(self, stage: Stage, known: Mapping[str, Entry], texts: Mapping[str, str]) -> str | None:
        """On rank 0: the small files, the manifest, the name; or what went wrong."""
        try:
            unseen = [name for name, entry in known.items() if not _has(stage.path(name), entry.size)]
            if unseen:
                return (
                    f"{stage.target}: rank 0 does not see {few(unseen)} that other ranks wrote; choose an output_dir on"
                    " a file system that all hosts share"
                )
            with stage.explained():
                if self.whole is None:
                    self.papers.write(stage.path)
                else:
                    self.whole.write(stage, list(known))
                if self.adapter is not None:
                    _write_adapter(stage, list(known), self.adapter)
                for name, text in texts.items():
                    stage.path(name).write_text(text + "\n", encoding="utf-8")
            stage.commit(known)
        except (OSError, ValueError, shutil.Error) as error:
            return str(error)
        except Exception as error:  # the other ranks wait for a word
            return f"{stage.target}: {type(error).__name__}: {error}"
        return None

    def _report(self, done: _Done) -> _Done:
        """Say at once that a save failed; whether it ends the run is decided where the main thread waits."""
        if done.fault is not None and self.ranks.rank == 0:
            then = f"{done.stands} still stands" if done.stands else "there is no older checkpoint"
            log.warning("a checkpoint was not written: %s; %s", done.fault, then)
        return done


def restore(folder: str | Path, pieces: Mapping[str, Piece]) -> None:
    """Fill the pieces' tensors, on whatever device, from a checkpoint written by any number of ranks; bitwise.

    Pieces that several ranks hold are read by each. Raises ValueError as `read_boxes` does, and for another dtype.
    """
    for name, tensor in read_boxes(folder, {name: piece.box for name, piece in pieces.items()}):
        into = pieces[name].tensor
        if tensor.dtype != into.dtype:
            raise ValueError(
                f"{folder}: {name} is {tensor.dtype}, expected {into.dtype}; resume with the settings of the run that"
                " wrote it"
            )
        with torch.no_grad():
            into.copy_(tensor)


def _write_adapter(stage: Stage, states: Sequence[str], form: AdapterForm) -> None:
    """Join the weights of all ranks' state files, one tensor at a time, into the files of an adapter."""
    assert stage.fresh, f"{stage.target} is there already"
    state = StateFiles([stage.path(name) for name in states])
    specs = {name.removeprefix(MODEL): spec for name, spec in state.specs.items() if name.startswith(MODEL)}
    files = AdapterFiles(stage.path, specs, form=form)
    try:
        files.open()
        for key, spec in specs.items():
            files.put(
                key, state.read(MODEL + key, Box.whole(spec.shape), out=torch.empty(spec.shape, dtype=spec.dtype))
            )
        files.close()
    finally:
        files.abandon()
        state.release()


def _has(path: Path, size: int) -> bool:
    """Whether a file of that size is there."""
    return path.is_file() and path.stat().st_size == size

"""Text tokenised and packed once, for all runs: what tools/generate_packed_data.py does.

Must not know training; the file that is written is one that a corpus maps as it is.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from accessory.data.feed.build import open_inputs, processes
from accessory.data.feed.choose import stretches
from accessory.data.feed.named import read_sources
from accessory.data.feed.pack import best_fit
from accessory.data.feed.sources import FeedConfig
from accessory.data.feed.store import StoreWriter
from accessory.data.feed.tokenise import Tokenised, Tokeniser, remedy
from accessory.data.feed.workers import Workers
from accessory.data.tokenizer import open_tokenizer

log = logging.getLogger(__name__)

UNCUT = 1 << 40  # tokens; no document has so many
WINDOW = 16384  # documents among which those that share a row are sought


@dataclass(frozen=True)
class PackJob:
    """What to pack, how and where to."""

    inputs: Sequence[str]
    tokenizer_path: str
    output: str
    max_len: int = 2048
    """0: no document is ever cut, and each is a row of its own."""
    column: str | None = None
    workers: int | None = None
    on_bad_row: str = "error"
    file_tokens: int = 1 << 30


def write_packed(job: PackJob) -> Counter[str]:
    """Write a folder of `.packed` files that appears whole or not at all; the counts of what is in it.

    Documents become BOS text EOS, those of more than max_len tokens several pieces, and rows of at most max_len tokens
    are filled with pieces by best fit; what is written does not depend on the number of workers. Raises ValueError
    where the output is there already, for bad rows as `on_bad_row` says, and where there is no text.
    """
    target = Path(job.output)
    if target.exists():
        raise ValueError(f"output: {target} is there already, and nothing is replaced; name another folder")
    if job.max_len < 0 or job.max_len == 1:
        raise ValueError(f"max_len: got {job.max_len}, expected at least 2, or 0 for documents of any length")
    tokenizer = open_tokenizer(job.tokenizer_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.parent / f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}"
    config = FeedConfig(
        sources=tuple(read_sources(job.inputs)),
        stage="pt",
        cutoff_len=job.max_len or UNCUT,
        on_bad_row=job.on_bad_row,
        column=job.column,
        workers=job.workers,
        cache_dir=str(building),
    )
    try:
        inputs, stores = open_inputs(config, tokenizer)
        if stores:
            raise ValueError(f"input: {stores[0].path} is packed already; name the text it was made of")
        writer = _Writer(building / "files", job, {"tokenizer": tokenizer.digest})
        size = sum(file.survey.size for file in inputs.files)
        with Workers(Tokeniser, (replace(config, sources=()), tokenizer), processes(config, size)) as workers:
            parts = sum(1 for _ in stretches(inputs.files, config))
            bar = tqdm(total=parts, desc="packing", unit="part", disable=None)
            for stretch, done in workers.map(stretches(inputs.files, config), lambda stretch: stretch, str):
                if done.stopped:
                    number, kind, reason = done.stopped
                    raise ValueError(f"{stretch.survey.path}:{number}: {reason}; {remedy(kind)}")
                for number, _, reason in done.refused[:3]:
                    log.warning("not used: %s:%d: %s", stretch.survey.path, number, reason)
                writer.add(done)
                bar.update()
            bar.close()
        counts = writer.finish()
        os.rename(building / "files", target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"output: {target.parent}: {error.strerror}; free space or name another folder") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return counts


class _Writer:
    """Pieces of documents into rows, rows into files."""

    def __init__(self, folder: Path, job: PackJob, metadata: dict[str, str]) -> None:
        self.folder, self.job, self.metadata = folder, job, metadata
        self.counts: Counter[str] = Counter()
        self._held: list[np.ndarray] = []
        self._store: StoreWriter | None = None
        self._files = self._ids = self._documents = 0
        self._longest = job.max_len

    def add(self, done: Tokenised) -> None:
        """Take the pieces of a stretch."""
        self.counts.update({name: count for name, count in done.counts.items() if name not in ("targets", "used")})
        ends = np.cumsum(done.arrays["lengths"])
        self._held += [
            done.arrays["ids"][end - length : end] for end, length in zip(ends, done.arrays["lengths"], strict=True)
        ]
        while len(self._held) >= WINDOW:
            self._write(self._held[:WINDOW])
            del self._held[:WINDOW]

    def finish(self) -> Counter[str]:
        """Write what is held; the counts."""
        if self._held:
            self._write(self._held)
        if not self.counts["rows"]:
            raise ValueError(
                f"input: got {self.counts['read']} rows and no text among them, expected some; see --column"
            )
        self._close()
        return self.counts

    def _write(self, pieces: list[np.ndarray]) -> None:
        """Fill rows with the pieces of a window."""
        lengths = [len(piece) for piece in pieces]
        self._longest = max(self._longest, *lengths)
        for places in best_fit(lengths, self.job.max_len) if self.job.max_len else [[at] for at in range(len(pieces))]:
            if self._store is None:
                self._store = StoreWriter(self.folder / f"part-{self._files:05d}")
                self._ids = self._documents = 0
                for name in ("starts", "rows"):
                    self._store.append(name, np.zeros(1, np.int64))
            ends = self._ids + np.cumsum([len(pieces[place]) for place in places])
            self._ids, self._documents = int(ends[-1]), self._documents + len(places)
            self._store.append("ids", np.concatenate([pieces[place] for place in places]))
            self._store.append("starts", ends.astype(np.int64))
            self._store.append("rows", np.asarray([self._documents], np.int64))
            self.counts["rows"] += 1
            self.counts["pieces"] += len(places)
            if self._ids >= self.job.file_tokens:
                self._close()

    def _close(self) -> None:
        """Finish a file."""
        if self._store is not None:
            metadata = {**self.metadata, "max_len": str(self._longest)}
            self._store.finish(self.folder / f"part-{self._files:05d}.packed", metadata)
            self._store, self._files = None, self._files + 1


def told(counts: Counter[str], max_len: int) -> Iterator[str]:
    """What was written, in words."""
    tokens, rows = counts["positions"], counts["rows"]
    full = f" of {max_len}, {tokens / rows / max_len:.1%} full" if max_len else ""
    yield f"{counts['read']} documents, {tokens} tokens in {rows} rows{full}"
    for name in ("documents_cut", "without_labels", "bad"):
        if counts[name]:
            yield f"{counts[name]} {name.replace('_', ' ')}"

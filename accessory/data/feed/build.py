"""From a config to a cache of tokenised rows: files surveyed, stretches tokenised by processes, one file written.

Must not know batches or views. The cache is named after all that decides the numbers, and a damaged one is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from accessory.data.feed.files import read_rows
from accessory.data.feed.sources import FeedConfig, Source, files_of
from accessory.data.feed.store import Store, StoreWriter, open_store
from accessory.data.feed.survey import Survey
from accessory.data.feed.tokenise import Stretch, Tokenised, Tokeniser, remedy
from accessory.data.feed.workers import Workers
from accessory.data.template import get_template
from accessory.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

COUNTS = (
    "read",
    "used",
    "bad",
    "dropped_overlong",
    "without_labels",
    "truncated",
    "truncated_positions",
    "documents_cut",
    "turns_left_out",
    "places_as_text",
    "pictures",
    "positions",
    "targets",
)
SHOWN = 20  # refused rows that are named
DAY = 86400.0  # seconds
KEPT = 90 * DAY  # for so long a cache that no run opens stays
ALONE = 2 << 20  # bytes of data up to which other processes are not worth their start
_CODE = ("files", "records", "fit", "tokenise", "build", "store", "sources", "survey")
_BESIDE = ("template", "encode", "tokenizer", "backends")
_PICTURES = ("pictures", "slots", "names", "name_ends")


@dataclass(frozen=True)
class File:
    """A data file, how it is read, and what a look at it found."""

    path: Path
    source: Source
    """With its root."""
    survey: Survey
    number: int
    """Of its source."""


@dataclass
class Inputs:
    """What a corpus is made of."""

    config: FeedConfig
    files: list[File]
    """Those that are tokenised."""
    key: str
    """Hash of all that decides the numbers."""
    keep: dict[Path, np.ndarray] = field(default_factory=dict)
    """Which rows of a packed file are used, where not all are."""
    report: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))

    def told(self) -> str:
        """The counts in words."""
        counts = [f"{count} {name.replace('_', ' ')}" for name, count in self.report.items() if count]
        return ", ".join(counts) or "no row"


def cache_home(config: FeedConfig) -> Path:
    """The folder of the cache."""
    if config.cache_dir:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accessory" / "data"


def processes(config: FeedConfig, size: int) -> int:
    """How many processes are worth their start for so many bytes; 0: this one does it."""
    wanted = config.workers if config.workers is not None else min(8, len(os.sched_getaffinity(0)))
    return 0 if size <= ALONE or wanted < 2 else wanted


def open_inputs(config: FeedConfig, tokenizer: Tokenizer) -> tuple[Inputs, list[Store]]:
    """Look at all files. Packed ones are opened, after a check that this tokenizer made their ids."""
    found = [(number, source, path) for number, source in enumerate(config.sources) for path in files_of(source)]
    if not found:
        raise ValueError("dataset: got no source, expected at least one data file")
    surveys = _survey([path for _, _, path in found], config, tokenizer)
    files = [
        File(path, replace(source, root=source.root or str(path.parent)), look, number)
        for (number, source, path), look in zip(found, surveys, strict=True)
    ]
    plain = [file for file in files if file.survey.kind != "packed"]
    inputs = Inputs(config, plain, _key(config, plain, tokenizer))
    stores = [_open_packed(file, inputs, tokenizer) for file in files if file.survey.kind == "packed"]
    return inputs, stores


def read_or_build(inputs: Inputs, tokenizer: Tokenizer) -> Store | None:
    """The cache of all files that are not packed, built where it is not there or damaged; None without such files."""
    if not inputs.files:
        return None
    path = cache_home(inputs.config) / f"{inputs.key[:32]}.rows"
    store = _read(path)
    if store is None:
        try:
            _build(path, inputs, tokenizer)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(f"cache_dir: {path.parent}: {error.strerror}; free space or name another") from error
            if isinstance(error, PermissionError):
                raise ValueError(f"cache_dir: {path.parent} cannot be written ({error}); name another") from error
            raise
        store = open_store(path, verify=False)
        log.info("data: tokenised into %s", path)
    else:
        log.info("data: tokenised before, in %s", path)
    with contextlib.suppress(OSError):  # somebody else's cache, read-only
        os.utime(path)
    inputs.report.update(json.loads(store.metadata["report"]))
    refused = json.loads(store.metadata["refused"])
    for sentence in refused[:5]:
        log.warning("not used: %s", sentence)
    left = sum(inputs.report[kind] for kind in ("bad", "dropped_overlong", "without_labels")) - len(refused[:5])
    if left > 0:
        log.warning("not used: %d more rows", left)
    if inputs.report["places_as_text"]:
        log.warning("%d rows without a picture say <image>, which is learned as text", inputs.report["places_as_text"])
    return store


def stretches(inputs: Inputs) -> Iterator[Stretch]:
    """The parts of all files that are used; ratio and max_samples leave rows out."""
    config = inputs.config
    left: dict[int, int] = {}
    for index, (file, keep) in enumerate(zip(inputs.files, _kept(inputs.files, config), strict=True)):
        ends = [*(span.number for span in file.survey.spans[1:]), file.survey.rows + 1]
        for span, end in zip(file.survey.spans, ends, strict=False):
            part = None if keep is None else keep[span.number - 1 : end - 1]
            stretch = Stretch(index, file.source, file.survey, span, part)
            if config.max_samples is None:
                yield stretch
                continue
            room = left.setdefault(file.number, config.max_samples)
            if not room:
                break
            part = np.ones(end - span.number, bool) if part is None else part.copy()
            taken = 0
            for raw in read_rows(file.path, span):
                place = raw.number - span.number
                part[place] &= taken < room
                taken += int(part[place])
            left[file.number] = room - taken
            yield replace(stretch, keep=part)


def _kept(files: list[File], config: FeedConfig) -> list[np.ndarray | None]:
    """For each file which of its row numbers `ratio` keeps: a sample of all rows of its source."""
    kept: list[np.ndarray | None] = [None] * len(files)
    for number, source in enumerate(config.sources):
        own = [index for index, file in enumerate(files) if file.number == number]
        if source.ratio == 1 or not own:
            continue
        ends = np.cumsum([files[index].survey.rows for index in own])
        chosen = np.zeros(ends[-1], bool)
        dice = np.random.default_rng([config.seed, number])
        chosen[dice.choice(int(ends[-1]), round(source.ratio * int(ends[-1])), replace=False)] = True
        for index, end in zip(own, ends, strict=True):
            kept[index] = chosen[end - files[index].survey.rows : end]
    return kept


def _survey(paths: list[Path], config: FeedConfig, tokenizer: Tokenizer) -> list[Survey]:
    """Look at all files, several at a time."""
    memory = cache_home(config) / "surveys"
    size = sum(path.stat().st_size for path in paths)
    count = min(processes(config, size // 64), len(paths))
    with Workers(Tokeniser, (replace(config, sources=()), tokenizer), count if count > 1 else 0) as workers:
        bar = tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None)
        found = []
        for path, look in workers.map(paths, lambda path: (path, memory), str):
            found.append(look)
            bar.update(path.stat().st_size)
        bar.close()
    return found


def _open_packed(file: File, inputs: Inputs, tokenizer: Tokenizer) -> Store:
    """Open a packed file and count it."""
    config = inputs.config
    store = open_store(file.path, verify=False)
    made = store.metadata.get("tokenizer")
    if made != tokenizer.digest:
        raise ValueError(
            f"{file.path}: its ids are of another tokenizer ({str(made)[:12]}) than {tokenizer.path}"
            f" ({tokenizer.digest[:12]}); pack the text again, or give the tokenizer that it was packed with"
        )
    if config.stage != "pt":
        raise ValueError(f"{file.path}: holds packed text, which is learned whole; set stage to pt")
    keep = _kept([file], config)[0]
    if config.max_samples is not None:
        keep = np.ones(len(store), bool) if keep is None else keep
        keep = keep & (np.cumsum(keep) <= config.max_samples)
    if keep is not None:
        inputs.keep[store.path] = keep
    rows = len(store) if keep is None else int(keep.sum())
    inputs.report.update(read=rows, used=rows)
    return store


def _key(config: FeedConfig, files: list[File], tokenizer: Tokenizer) -> str:
    """A hash of all that decides the numbers."""
    drawn = any(file.source.ratio < 1 or file.source.preprocess == "caption" for file in files)
    names = {file.source.prompt_type or config.template for file in files} | {"caption"}
    settings = ("stage", "template", "cutoff_len", "overlong", "on_bad_row", "max_samples", "slots", "before_bos")
    sources = [asdict(file.source) | {"path": ""} | ({} if config.pictures else {"root": ""}) for file in files]
    told = {
        "settings": {name: getattr(config, name) for name in (*settings, "pictures", "column")},
        "seed": config.seed if drawn else None,
        "templates": {name: repr(get_template(name)) for name in sorted(names)} if config.stage == "sft" else {},
        "files": [[file.survey.sha256, file.survey.kind, file.number] for file in files],
        "sources": sources,
        "tokenizer": tokenizer.digest,
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    """A hash of the sources that make the numbers: what another version of them made is not taken."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in _CODE] + [here.parent / f"{name}.py" for name in _BESIDE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _read(path: Path) -> Store | None:
    """The cache if it is there, whole, and still true of the pictures that were missing."""
    if not path.exists():
        return None
    try:
        store = open_store(path, verify=True)
        missing = json.loads(store.metadata["missing"])
        json.loads(store.metadata["report"]), json.loads(store.metadata["refused"])
    except (ValueError, KeyError, OSError) as error:
        log.warning("the cache %s is damaged and made again: %s", path, error)
        return None
    if any(os.path.isfile(picture) for picture in missing):
        log.info("pictures that were missing are there now: tokenising again")
        return None
    return store


def _build(path: Path, inputs: Inputs, tokenizer: Tokenizer) -> None:
    """Tokenise all stretches into the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    config = inputs.config
    size = sum(file.survey.size for file in inputs.files)
    mark = f"{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}"
    writer = StoreWriter(path.parent / f".{path.stem}.{mark}")
    try:
        gathered = _Gathered(writer, inputs)
        with Workers(Tokeniser, (replace(config, sources=()), tokenizer), processes(config, size)) as workers:
            bar = tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, disable=None)
            for stretch, done in workers.map(stretches(inputs), lambda stretch: stretch, _name):
                gathered.add(stretch, done)
                bar.update(stretch.survey.size // len(stretch.survey.spans))
            bar.close()
        gathered.finish(path, tokenizer)
    finally:
        writer.discard()


def _name(stretch: Stretch) -> str:
    """A stretch for people."""
    return f"{stretch.survey.path}, rows from {stretch.span.number} on"


class _Gathered:
    """Arrays and counts of all stretches, in their order."""

    def __init__(self, writer: StoreWriter, inputs: Inputs) -> None:
        self.writer, self.inputs = writer, inputs
        self.counts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.missing: list[str] = []
        self.tails = hashlib.sha256()
        self.ends = {"starts": 0, "pictures": 0, "name_ends": 0}
        for name in ("starts", "pictures"):
            writer.append(name, np.zeros(1, np.int64))

    def add(self, stretch: Stretch, done: Tokenised) -> None:
        """Take a stretch in. ValueError where a row is to end the run."""
        where = self.inputs.files[stretch.file].path
        if done.stopped:
            number, kind, reason = done.stopped
            raise ValueError(f"{where}:{number}: {reason}; {remedy(kind)}")
        arrays = done.arrays
        for name, lengths in (("starts", "lengths"), ("pictures", "picture_counts"), ("name_ends", "name_lengths")):
            ends = self.ends[name] + np.cumsum(arrays[lengths])
            self.ends[name] = int(ends[-1]) if len(ends) else self.ends[name]
            self.writer.append(name, ends.astype(np.int64))
        for name in ("ids", "learn", "targets", "files", "numbers", "places", "slots", "names"):
            if name in arrays:
                self.writer.append(name, arrays[name])
        self.counts.update(done.counts)
        self.refused += [f"{where}:{number}: {reason}" for number, _, reason in done.refused]
        del self.refused[SHOWN:]
        self.missing += done.missing
        self.tails.update(done.tails)

    def finish(self, path: Path, tokenizer: Tokenizer) -> None:
        """Write the cache."""
        if not self.counts["pictures"]:
            self.writer.drop(*_PICTURES)
        if not self.counts["used"]:
            shown = "; ".join(self.refused[:3]) or "the files hold no row"
            raise ValueError(f"dataset: got {self.counts['read']} rows, expected at least one to learn from; {shown}")
        metadata = {
            "report": json.dumps(self.counts),
            "refused": json.dumps(self.refused),
            "missing": json.dumps(self.missing),
            "tokenizer": tokenizer.digest,
            "content": self.writer.digest("ids", "learn", "starts", "slots") + self.tails.hexdigest(),
        }
        self.writer.finish(path, metadata)


def _sweep(home: Path) -> None:
    """Remove what processes of this host that are no more left unfinished a day ago, and caches that nobody opens."""
    for path in home.glob("*.rows"):
        with contextlib.suppress(OSError):  # somebody else swept it
            if re.fullmatch(r"[0-9a-f]{32}", path.stem) and time.time() - path.stat().st_mtime > KEPT:
                path.unlink()
                log.info("data: %s was not opened for %d days and is removed", path, KEPT // DAY)
    for folder in home.glob(f".*.{socket.gethostname()}.*"):
        number = folder.suffix.lstrip(".")
        gone = number.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{number}").exists()
        if gone and time.time() - folder.stat().st_mtime > DAY:
            shutil.rmtree(folder, ignore_errors=True)

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from accessory.data.feed.ahead import Scout
from accessory.data.feed.choose import File, kept, stretches
from accessory.data.feed.sources import FeedConfig, files_of
from accessory.data.feed.store import Store, StoreWriter, open_store
from accessory.data.feed.survey import Survey
from accessory.data.feed.tokenise import Stretch, Tokenised, Tokeniser, remedy
from accessory.data.feed.workers import Workers
from accessory.data.picture import kind_of
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
    "fields_not_listed",
    "pictures",
    "positions",
    "targets",
)
SHOWN = 20  # refused rows that are named
ASKED = 3  # pictures whose host gave no answer that are tried when the cache is opened
DAY = 86400.0  # seconds
KEPT = 90 * DAY  # for so long a cache that no run opens stays
ALONE = 2 << 20  # bytes of data up to which other processes are not worth their start
_CODE = "choose files columns records fit tokenise build split store sources survey talk".split()
_BESIDE = "template/forms template/render template/tools encode tokenizer backends tokenizer_json tiles".split()
_PICTURES = ("pictures", "slots", "widths", "heights", "names", "name_ends")


@dataclass
class Inputs:
    """What a corpus is made of."""

    config: FeedConfig
    files: list[File]
    """Those that are tokenised."""
    key: str
    """Hash of all that decides the numbers."""
    keep: dict[Path, np.ndarray] = field(default_factory=dict)
    """How often each row of a packed file is used (0 or 1), where not every one is."""
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
    packed = [file for file in files if file.survey.kind == "packed"]
    pairs = zip(packed, kept(packed, config), strict=True)
    return inputs, [_open_packed(file, keep, inputs, tokenizer) for file, keep in pairs]


def read_or_build(inputs: Inputs, tokenizer: Tokenizer) -> Store | None:
    """The cache of all files that are not packed, built where it is not there or damaged; None without such files."""
    if not inputs.files:
        return None
    path = cache_home(inputs.config) / f"{inputs.key[:32]}.rows"
    store = _read(path, inputs.config)
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


def _open_packed(file: File, keep: np.ndarray | None, inputs: Inputs, tokenizer: Tokenizer) -> Store:
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
    if keep is not None and keep.max(initial=0) > 1:
        raise ValueError(f"{file.path}: got {file.source.samples} samples of {len(store)} packed rows; ask for fewer")
    if config.max_samples is not None:
        keep = np.ones(len(store), np.int64) if keep is None else keep
        keep = keep * (np.cumsum(keep) <= config.max_samples)
    if keep is not None:
        inputs.keep[store.path] = keep.astype(bool)
    rows = len(store) if keep is None else int(keep.sum())
    inputs.report.update(read=rows, used=rows)
    return store


def _key(config: FeedConfig, files: list[File], tokenizer: Tokenizer) -> str:
    """A hash of all that decides the numbers."""
    dice = any(
        file.source.ratio < 1 or file.source.samples is not None or file.source.preprocess == "caption"
        for file in files
    )
    names = {file.source.prompt_type or config.template for file in files} | {"caption"}
    settings = (
        "stage",
        "template",
        "default_system",
        "cutoff_len",
        "overlong",
        "on_bad_row",
        "max_samples",
        "slots",
        "before_bos",
    )
    sources = [asdict(file.source) | {"path": ""} | ({} if config.pictures else {"root": ""}) for file in files]
    told = {
        "settings": {name: getattr(config, name) for name in (*settings, "pictures", "allow_private_urls", "column")},
        "geometry": config.geometry.counts(),
        "orientation": config.orientation if config.geometry.varies else None,
        "seed": config.seed if dice else None,
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


def _read(path: Path, config: FeedConfig) -> Store | None:
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
    if any(_is_there(picture, config) for picture in _few_hosts(missing)):
        log.info("pictures that were missing are there now: tokenising again")
        return None
    return store


def _is_there(name: str, config: FeedConfig) -> bool:
    """Whether a picture that was not there is there now."""
    try:
        Scout(config).look(name)
    except (OSError, ValueError):
        return False
    return True


def _few_hosts(missing: list[str]) -> list[str]:
    """All missing files, and of the URLs that gave no answer the first ones: a network is there, or it is not."""
    urls = [name for name in missing if kind_of(name) == "url"]
    return [*(name for name in missing if kind_of(name) == "path"), *urls[:ASKED]]


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
            for stretch, done in workers.map(stretches(inputs.files, config), lambda stretch: stretch, _name):
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
        if "ordinals" in arrays:
            arrays["ordinals"] += self.counts["read"]
        for name in (
            "ids",
            "learn",
            "targets",
            "files",
            "numbers",
            "places",
            "ordinals",
            "slots",
            "widths",
            "heights",
            "names",
        ):
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
            "content": self.writer.digest("ids", "learn", "starts", "slots", "widths", "heights")
            + self.tails.hexdigest(),
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

"""What one row gives as numbers, and a stretch of a file as arrays: the work of the processes that tokenise.

Must not know the cache, batches or torch; what cannot be fed is said in words and counted by whoever asked.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from accessory.data.feed.ahead import Scout
from accessory.data.feed.files import Bad, Raw, parse, read_rows
from accessory.data.feed.fit import Fitter
from accessory.data.feed.records import to_sample, to_text
from accessory.data.feed.sources import FeedConfig, Source
from accessory.data.feed.store import ids_dtype
from accessory.data.feed.survey import Stretch, Survey, check_unchanged, survey
from accessory.data.picture import kind_of, locate
from accessory.data.template import get_template
from accessory.data.tokenizer import Tokenizer

SHOWN = 20  # refused rows of a stretch that are named
MISSING = 1000  # missing pictures of a stretch that are remembered


@dataclass
class Tokens:
    """One row as numbers."""

    ids: list[int]
    learn: list[bool] | None = None
    """None: every token is learned."""
    slots: list[int] = field(default_factory=list)
    """Position of the first slot of each picture; -1 where pictures take no place in the sequence."""
    pictures: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each picture; none where they decide nothing."""

    @property
    def targets(self) -> int:
        """Tokens that some position is to predict; nothing stands before the first."""
        return len(self.ids) - 1 if self.learn is None else sum(self.learn[1:])


@dataclass(frozen=True)
class Refused:
    """Why a row is not fed: bad, dropped_overlong or without_labels."""

    kind: str
    reason: str
    missing: str | None = None
    """The picture that is not there."""


@dataclass
class Tokenised:
    """What a stretch gave: arrays of the store, counts, and the rows that were refused."""

    arrays: dict[str, np.ndarray]
    counts: Counter[str]
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    """(row number, kind, reason), the first ones."""
    missing: list[str] = field(default_factory=list)
    tails: bytes = b""
    """Names of the pictures without their folders."""
    stopped: tuple[int, str, str] | None = None
    """The row at which it stopped, as the config asks."""


class Tokeniser:
    """Rows to numbers under a config; calls do the jobs of the pass: a Stretch, or (path, folder) to survey."""

    def __init__(self, config: FeedConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.fitter, self.scout = Fitter(config, tokenizer), Scout(config)

    def __call__(self, job: Stretch | tuple[Path, Path | None]) -> Tokenised | Survey:
        return self.stretch(job) if isinstance(job, Stretch) else survey(*job)

    def row(self, raw: Raw, source: Source, counts: Counter[str]) -> Iterator[Tokens | Refused]:
        """What a row gives: a row of numbers, several of a long document, or why there is none.

        counts: of what was given up or passed over. source.root must be set, or pictures are sought from here.
        """
        value = parse(raw)
        if isinstance(value, Bad):
            yield Refused("bad", value.reason)
            return
        counts["documents_cut"] += raw.cut
        try:
            if self.config.stage == "pt":
                yield from self.document(to_text(value, self.config.column), counts)
            else:
                yield self.conversation(value, source, raw.number, counts)
        except ValueError as error:
            yield Refused("bad", str(error))

    def document(self, text: str, counts: Counter[str]) -> Iterator[Tokens | Refused]:
        """BOS text EOS in rows of at most cutoff_len, every token learned once.

        Where a document is cut, the next row begins with the last token of the row before, whose successor it predicts.
        """
        ids = self.tokenizer.encode(text) if text.strip() else []
        if not ids:
            yield Refused("without_labels", "is an empty text")
            return
        bos = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        ids = [*bos, *ids, *eos]
        pieces = cut(len(ids), self.config.cutoff_len)
        if not pieces:
            yield Refused("without_labels", "is one token, which nothing predicts")
        counts["documents_cut"] += len(pieces) > 1
        for begin, end in pieces:
            yield Tokens(ids[begin:end])

    def conversation(self, value: object, source: Source, number: int, counts: Counter[str]) -> Tokens | Refused:
        """A conversation whose answers are learned."""
        config = self.config
        sample = to_sample(value, source, seed=config.seed, number=number).begun(config.default_system, source)
        pictures = [locate(name, source.root) for name in sample.pictures]
        if pictures and not config.pictures:
            raise ValueError(
                f"got {len(pictures)} pictures, expected none since the model does not see; train one that does"
            )
        if len(pictures) > 1 and not config.slots:
            raise ValueError(f"got {len(pictures)} pictures, expected one for a model that takes it into its prompt")
        for name in pictures:
            try:
                self.scout.look(name)
            except OSError as error:
                return Refused("bad", str(error), missing=name)
        template = source.prompt_type or ("caption" if source.preprocess == "caption" else config.template)
        sizes = self.sizes(pictures)
        slots = config.geometry.count(sizes or [(1, 1)] * len(pictures)) if pictures else []
        fitted = self.fitter.fit(sample.turns, template, slots)
        if fitted is None:
            whole = len(self.fitter.encode(sample.turns, get_template(template), slots).ids)
            told = f": {whole}, {sum(slots)} of them pictures" if sum(slots) else ""
            return Refused("dropped_overlong", f"has more than cutoff_len {config.cutoff_len} positions{told}")
        encoded = fitted.encoded
        if not any(encoded.supervised[1:]):
            return Refused("without_labels", "has no token to learn")
        counts.update({name: count for name, count in sample.notes.items() if count})
        if fitted.positions > len(encoded.ids):
            counts["truncated"] += 1
            counts["truncated_positions"] += fitted.positions - len(encoded.ids)
        starts = [-1] * len(pictures)
        if config.slots:
            places = {slot: at for at, slot in enumerate(encoded.slots)}
            starts = [places[row] for row in accumulate(slots[:-1], initial=0)] if slots else []
        return Tokens(encoded.ids, encoded.supervised, starts, pictures, sizes)

    def sizes(self, pictures: list[str]) -> list[tuple[int, int]]:
        """Sizes by the pictures' headers, where they decide how many slots there are. ValueError names the picture."""
        if not pictures or not self.config.geometry.varies:
            return []
        from accessory.data.image import picture_size

        how = {"allow_private_urls": self.config.allow_private_urls, "cache": self.config.picture_cache}
        try:
            return [picture_size(name, orientation=self.config.orientation, **how) for name in pictures]
        except OSError as error:
            raise ValueError(str(error)) from error

    def stretch(self, stretch: Stretch) -> Tokenised:
        """All rows of a stretch as arrays."""
        path = Path(stretch.survey.path)
        check_unchanged(path, stretch.survey.size, stretch.survey.changed)
        rows = _Rows(stretch.file, ids_dtype(self.tokenizer.size))
        done = rows.done
        used = ((raw, stretch.source) for raw in read_rows(path, stretch.span) if stretch.times(raw.number))
        for raw, _ in self.scout.ahead(used):
            ordinal = done.counts["read"]
            done.counts["read"] += 1
            for found in self.row(raw, stretch.source, done.counts):
                if isinstance(found, Tokens):
                    for _ in range(stretch.times(raw.number)):
                        rows.add(found, raw, ordinal)
                    continue
                done.counts[found.kind] += 1
                if stops(found, self.config):
                    done.stopped = (raw.number, found.kind, found.reason)
                    break
                if len(done.refused) < SHOWN:
                    done.refused.append((raw.number, found.kind, found.reason))
                if found.missing and len(done.missing) < MISSING:
                    done.missing.append(found.missing)
            if done.stopped:
                break
        check_unchanged(path, stretch.survey.size, stretch.survey.changed)
        rows.finish()
        return done


def cut(length: int, limit: int) -> list[tuple[int, int]]:
    """(begin, end) of the rows of a document: each token but the first is predicted in exactly one of them."""
    return [(begin, min(begin + limit, length)) for begin in range(0, length - 1, limit - 1)]


def stops(refused: Refused, config: FeedConfig) -> bool:
    """Whether such a row ends the run."""
    if refused.kind == "bad":
        return config.on_bad_row == "error"
    return refused.kind == "dropped_overlong" and config.overlong == "error"


def remedy(kind: str) -> str:
    """What to do about a row that ended the run."""
    return "mend or drop the row, or set on_bad_row skip" if kind == "bad" else "set overlong truncate or drop"


def _tail(name: str) -> str:
    """What of a picture's name enters a fingerprint: not the folder of a file, and of pixels in it their hash."""
    kind = kind_of(name)
    if kind == "path":
        return os.path.basename(name)
    return name if kind == "url" else hashlib.sha256(name.encode()).hexdigest()


class _Rows:
    """Rows of a stretch on their way into arrays."""

    def __init__(self, file: int, dtype: type[np.generic]) -> None:
        self.file, self.dtype = file, dtype
        self.ids: list[np.ndarray] = []
        self.learn: list[np.ndarray] = []
        self.table: list[tuple[int, ...]] = []  # length, targets, number, place, pictures, ordinal
        self.slots: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.names: list[bytes] = []
        self.tails: list[bytes] = []
        self.done = Tokenised({}, Counter())

    def add(self, tokens: Tokens, raw: Raw, ordinal: int) -> None:
        """Take one row in. ordinal: its number among the rows that were read."""
        length, targets = len(tokens.ids), tokens.targets
        self.ids.append(np.asarray(tokens.ids, self.dtype))
        if tokens.learn is not None:
            self.learn.append(np.asarray(tokens.learn, np.uint8))
        self.table.append((length, targets, raw.number, raw.place, len(tokens.pictures), ordinal))
        self.slots += tokens.slots
        self.sizes += tokens.sizes
        self.names += [os.fsencode(name) for name in tokens.pictures]
        self.tails += [os.fsencode(_tail(name)) for name in tokens.pictures]
        counts = self.done.counts
        counts["used"] += 1
        counts["positions"] += length
        counts["targets"] += targets
        counts["pictures"] += len(tokens.pictures)

    def finish(self) -> None:
        """Make the arrays."""
        table = np.asarray(self.table, np.int64).reshape(-1, 6)
        sizes = np.asarray(self.sizes, np.int32).reshape(-1, 2)
        none = np.zeros(0, np.uint8)
        self.done.tails = b"\0".join([*self.tails, b""])
        self.done.arrays = {
            "ids": np.concatenate(self.ids) if self.ids else none.astype(self.dtype),
            **({"learn": np.concatenate(self.learn)} if self.learn else {}),
            "lengths": table[:, 0],
            "targets": table[:, 1].astype(np.int32),
            "files": np.full(len(table), self.file, np.int32),
            "numbers": table[:, 2],
            "places": table[:, 3],
            "picture_counts": table[:, 4],
            "ordinals": table[:, 5].copy(),
            "slots": np.asarray(self.slots, np.int32),
            **({"widths": sizes[:, 0].copy(), "heights": sizes[:, 1].copy()} if self.sizes else {}),
            "names": np.frombuffer(b"".join(self.names), np.uint8),
            "name_lengths": np.asarray([len(name) for name in self.names], np.int64),
        }

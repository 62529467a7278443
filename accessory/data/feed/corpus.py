"""All rows of a run as numbers, mapped from disk, and views of them; built once by several processes and then cached.

Must not know batches, ranks or torch. Who opens first builds; a cache appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from accessory.data.feed.build import Inputs, open_inputs, read_or_build
from accessory.data.feed.files import Bad, Span, parse, read_rows
from accessory.data.feed.records import to_sample
from accessory.data.feed.share import Beginnings, find_beginnings
from accessory.data.feed.sources import FeedConfig
from accessory.data.feed.split import held_out
from accessory.data.feed.store import Store
from accessory.data.feed.survey import check_unchanged
from accessory.data.feed.tokenise import cut
from accessory.data.template import Turn
from accessory.data.tiles import lay
from accessory.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One row as numbers; the arrays are int32 and bool, one entry per position unless said otherwise."""

    ids: np.ndarray
    supervised: np.ndarray
    slots: np.ndarray
    """-1, or the row of the features of this row's pictures."""
    pictures: tuple[str, ...]
    where: str
    """file:row number."""
    documents: np.ndarray
    """int64, positions at which its documents begin: 0, and more in packed files."""
    index: int
    """In the whole corpus, whatever the view."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of its pictures; (1, 1) where these decide nothing."""
    shared: int = 0
    """Positions at its beginning that the rows behind it in its sequence see too; of a row behind, which is given
    without them: positions of the beginning that it goes on from."""


@dataclass(frozen=True)
class Conversation:
    """A row before it became numbers."""

    turns: tuple[Turn, ...]
    pictures: tuple[str, ...]
    template: str
    where: str


class Corpus:
    """Rows of all sources, in the order of their files; `split` gives views of some of them.

    lengths, targets: int32 [rows], positions and supervised targets of each. report: counts of the pass over the data,
    of all sources together. fingerprint: SHA-256 of the numbers and of which rows are chosen; paths do not enter it.
    """

    def __init__(self, inputs: Inputs, stores: Sequence[Store], chosen: np.ndarray | None = None) -> None:
        self._inputs, self._stores = inputs, list(stores)
        self._tables = [_table(store, inputs.config, inputs.keep.get(store.path)) for store in self._stores]
        self._ends = np.cumsum([len(table) for table in self._tables])
        self._chosen = chosen
        lengths = _joined([(table.ends - table.begins).astype(np.int32) for table in self._tables])
        targets = _joined([_targets(*pair) for pair in zip(self._stores, self._tables, strict=True)])
        self.lengths = lengths if chosen is None else lengths[chosen]
        self.targets = targets if chosen is None else targets[chosen]
        self.report = dict(inputs.report)
        self.picture_count = self._count_pictures()

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def tile_count(self) -> int:
        """Tiles of all pictures."""
        geometry = self._inputs.config.geometry
        return self._count_pictures(lambda size: geometry.tiles(*size)) if geometry.varies else self.picture_count

    @property
    def has_pictures(self) -> bool:
        """Whether any row has one."""
        return self.picture_count > 0

    @cached_property
    def fingerprint(self) -> str:
        """Of the numbers of all rows, and of which of them are here."""
        total = hashlib.sha256(" ".join(store.metadata.get("content", store.sha256) for store in self._stores).encode())
        total.update(f"cutoff_len {self._inputs.config.cutoff_len} rows {len(self)}".encode())
        if self._chosen is not None:
            total.update(self._chosen.tobytes())
        return total.hexdigest()

    def row(self, index: int) -> Row:
        """The row at a place of this view; its arrays are copies."""
        whole, store, at = self._find(index)
        table, config = self._tables[store], self._inputs.config
        begin, end, row = int(table.begins[at]), int(table.ends[at]), table.row(at)
        arrays = self._stores[store].arrays
        learn = arrays["learn"][begin:end].astype(bool) if "learn" in arrays else np.ones(end - begin, bool)
        names = self._stores[store].names(row)
        sizes, starts, counts = self._stores[store].sizes(row), (), ()
        if names and config.slots:
            first, last = arrays["pictures"][row : row + 2]
            starts, counts = arrays["slots"][first:last].tolist(), config.geometry.count(sizes)
        documents = self._stores[store].documents(row) if table.whole else np.zeros(1, np.int64)
        learn[documents] = False  # nothing stands before them
        return Row(
            ids=arrays["ids"][begin:end].astype(np.int32),
            supervised=learn,
            slots=lay(end - begin, starts, counts),
            pictures=tuple(names),
            where=self._where(store, row),
            documents=documents,
            index=whole,
            sizes=tuple(sizes),
        )

    def where(self, index: int) -> str:
        """file:row number of a row."""
        _, store, place = self._find(index)
        return self._where(store, self._tables[store].row(place))

    def beginnings(self) -> Beginnings:
        """Which rows of this view begin alike, with one picture."""
        parts = [(store, table.rows, table.begins) for store, table in zip(self._stores, self._tables, strict=True)]
        geometry = self._inputs.config.geometry
        found = find_beginnings(parts, counts=lambda store: geometry.count(store.sizes()) if geometry.each else [])
        return found if self._chosen is None else Beginnings(found.groups[self._chosen], found.lengths[self._chosen])

    def split(self, amount: float, seed: int) -> tuple[Corpus, Corpus]:
        """(training, validation): of the rows that were read, `held_out` draws those for validation.

        amount: rows, or below 1 a share of them; those that gave nothing (bad, too long) count. Rows that come from one
        row of a file, as parts of a long document, stay together. `rows.open_rows` finds the same rows again.
        """
        held = np.isin(self._ordinals(), held_out(self.report["read"], amount, seed))
        if held.all() or not held.any():
            side = "validation" if held.any() else "training"
            raise ValueError(
                f"val_size: got {amount:g} of {self.report['read']} rows, of which only those for {side} can be used;"
                " name an eval_dataset"
            )
        return self._view(np.flatnonzero(~held)), self._view(np.flatnonzero(held))

    def example(self, index: int, tokenizer: Tokenizer) -> str:
        """A row for human eyes: control tokens by name, pictures as <picture 0>, what is learned between [[ and ]]."""
        row = self.row(index)
        return show(row, tokenizer, counts=self._inputs.config.geometry.count(row.sizes))

    def conversation(self, index: int, config: FeedConfig | None = None) -> Conversation:
        """The turns of a row, read from its file again; nothing is shortened. ValueError for plain text."""
        config = config or self._inputs.config
        _, store, place = self._find(index)
        arrays, row = self._stores[store].arrays, self._tables[store].row(place)
        if config.stage != "sft" or "files" not in arrays:
            raise ValueError(f"{self.where(index)}: is plain text, expected a conversation; set stage to sft")
        file = self._inputs.files[int(arrays["files"][row])]
        check_unchanged(file.path, file.survey.size, file.survey.changed)
        span = Span(int(arrays["places"][row]), int(arrays["numbers"][row]), None)
        value = parse(next(read_rows(file.path, span)))
        if isinstance(value, Bad):
            raise ValueError(f"{self.where(index)}: {value.reason}; the file was changed since it was tokenised")
        sample = to_sample(value, file.source, seed=config.seed, number=span.number)
        sample = sample.begun(config.default_system, file.source)
        template = file.source.prompt_type or ("caption" if file.source.preprocess == "caption" else config.template)
        return Conversation(tuple(sample.turns), tuple(self._stores[store].names(row)), template, self.where(index))

    def conversations(self, indexes: Iterable[int]) -> list[Conversation]:
        """`conversation` of several rows."""
        return [self.conversation(index) for index in indexes]

    def _find(self, index: int) -> tuple[int, int, int]:
        """A row of this view: its place in the corpus, its store, and its place in that store's table."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}, of {len(self)}")
        whole = int(index if self._chosen is None else self._chosen[index])
        store = int(np.searchsorted(self._ends, whole, side="right"))
        return whole, store, whole - (int(self._ends[store - 1]) if store else 0)

    def _where(self, store: int, row: int) -> str:
        """file:row number, of a row of a store."""
        arrays = self._stores[store].arrays
        if "files" not in arrays:
            return f"{self._stores[store].path}:{row + 1}"
        return f"{self._inputs.files[int(arrays['files'][row])].path}:{arrays['numbers'][row]}"

    def _ordinals(self) -> np.ndarray:
        """For each row of this view its number among the rows that were read, over all sources."""
        found, read = [np.zeros(0, np.int64)], self.report["read"]
        packed = [store for store in self._stores if "ordinals" not in store.arrays]
        tables = {store.path: table for store, table in zip(self._stores, self._tables, strict=True)}
        first = read - sum(len(np.unique(tables[store.path].rows)) for store in packed)
        for store, table in zip(self._stores, self._tables, strict=True):
            if "ordinals" in store.arrays:
                found.append(np.asarray(store.arrays["ordinals"])[table.rows])
                continue
            _, own = np.unique(table.rows, return_inverse=True)
            found.append(own + first)
            first += int(own[-1]) + 1 if len(own) else 0
        joined = np.concatenate(found)
        return joined if self._chosen is None else joined[self._chosen]

    def _view(self, places: np.ndarray) -> Corpus:
        """Some rows of this view, by their places in it."""
        return Corpus(self._inputs, self._stores, places if self._chosen is None else self._chosen[places])

    def _count_pictures(self, weight: Callable[[tuple[int, int]], int] | None = None) -> int:
        """Pictures of all rows of this view, or the sum of their weights by their sizes."""
        counts = [np.zeros(0, np.int64)]
        for store, table in zip(self._stores, self._tables, strict=True):
            ends = store.arrays.get("pictures", np.zeros(len(store) + 1, np.int64))
            if weight is not None:
                ends = np.cumsum([0, *map(weight, store.sizes())])[ends]
            counts.append(np.diff(ends)[table.rows])
        joined = _joined(counts)
        return int((joined if self._chosen is None else joined[self._chosen]).sum())


@dataclass(frozen=True)
class _Table:
    """Where the rows that are fed lie in a store: int64 positions, and the store's rows that they are of."""

    begins: np.ndarray
    ends: np.ndarray
    owners: np.ndarray | None = None
    """None: all rows of the store, in order."""
    whole: bool = True
    """Whether they are whole rows of the store."""

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def rows(self) -> np.ndarray:
        """The store's rows."""
        return np.arange(len(self)) if self.owners is None else self.owners

    def row(self, place: int) -> int:
        """The store's row at a place."""
        return place if self.owners is None else int(self.owners[place])


def _table(store: Store, config: FeedConfig, keep: np.ndarray | None) -> _Table:
    """The rows of a store, without those that `keep` leaves out; parts of them where they were packed for a longer
    cutoff_len."""
    if int(store.metadata.get("max_len", 0)) <= config.cutoff_len:
        bounds = store.bounds()
        if keep is None:
            return _Table(bounds[:-1], bounds[1:])
        owners = np.flatnonzero(keep)
        return _Table(bounds[owners], bounds[owners + 1], owners)
    starts = store.arrays["starts"]
    owners = np.repeat(np.arange(len(store)), np.diff(store.arrays["rows"]))
    pieces = [
        (int(begin) + first, int(begin) + last, int(owner))
        for begin, end, owner in zip(starts[:-1], starts[1:], owners, strict=True)
        if keep is None or keep[owner]
        for first, last in cut(int(end - begin), config.cutoff_len)
    ]
    begins, ends, owners = np.asarray(pieces, np.int64).reshape(-1, 3).T
    return _Table(begins, ends, owners, whole=False)


def _targets(store: Store, table: _Table) -> np.ndarray:
    """Supervised targets of each row."""
    if "targets" in store.arrays:
        return np.asarray(store.arrays["targets"])[table.rows]
    documents = np.diff(store.arrays["rows"])[table.rows] if table.whole and "rows" in store.arrays else 1
    return (table.ends - table.begins - documents).astype(np.int32)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays one behind the other."""
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def show(row: Row, tokenizer: Tokenizer, *, counts: Sequence[int]) -> str:
    """A row for human eyes (see `Corpus.example`); counts: slots of each of its pictures."""
    firsts = {first: number for number, first in enumerate(accumulate([0, *counts[:-1]]))}
    shown, run = "", list[int]()
    learned, fresh = False, True
    for at, token in enumerate(row.ids.tolist()):
        name = tokenizer.control_name(token)
        if row.slots[at] >= 0:
            name = f"<picture {firsts[row.slots[at]]}>" if row.slots[at] in firsts else ""
        if run and (name is not None or row.supervised[at] != learned):
            shown, run, fresh = shown + tokenizer.decode(run, opening=fresh), [], name is not None
        if row.supervised[at] != learned:
            shown, learned = shown + ("]]" if learned else "[["), not learned
        if name is None:
            run.append(token)
        else:
            shown, fresh = shown + name, True
    return shown + tokenizer.decode(run, opening=fresh) + ("]]" if learned else "")


def open_corpus(config: FeedConfig, tokenizer: Tokenizer) -> Corpus:
    """The rows of a config: mapped from the cache, or tokenised now by `config.workers` processes.

    The cache's name is a hash of all that decides the numbers: contents of the files, settings, template, tokenizer and
    this code. Raises ValueError naming file and row for bad rows (unless on_bad_row is skip) and overlong ones (where
    `overlong` is error), and where no row is left; OSError for files that are not there.
    """
    config = replace(config, sources=tuple(config.sources))
    inputs, stores = open_inputs(config, tokenizer)
    built = read_or_build(inputs, tokenizer)
    corpus = Corpus(inputs, [*([] if built is None else [built]), *stores])
    if not len(corpus):
        raise ValueError(f"dataset: got {inputs.told()}, expected at least one row to learn from; see the rows above")
    log.info("data: %s", inputs.told())
    return corpus

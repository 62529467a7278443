"""Rows before they become numbers, for whoever asks a model instead of training it: all, or those a run held out.

Must not know tokenizers, templates' texts or torch. Files, draws and the split are those of training, so that its saved
settings are enough to find its validation rows again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from accessory.data.feed.choose import File, stretches
from accessory.data.feed.files import Bad, Raw, parse, read_rows
from accessory.data.feed.named import read_sources
from accessory.data.feed.records import to_sample
from accessory.data.feed.sources import FeedConfig, Source, files_of
from accessory.data.feed.split import held_out
from accessory.data.feed.survey import Stretch, check_unchanged, survey
from accessory.data.picture import locate
from accessory.data.template import Turn

SHOWN = 20  # refused rows that are named


@dataclass(frozen=True)
class RawRow:
    """One row: what is asked, and what was answered."""

    id: str
    """The same in every run over the same files, and no other row's: file:number, with folders where names repeat."""
    where: str
    """path:number, for people."""
    turns: tuple[Turn, ...]
    """What is asked: system, tools, earlier exchanges, and the last question, with the places of its pictures."""
    query: str
    """The last question as the row has it, marks of pictures included; where calls were answered last, the results."""
    history: list[list[str]]
    """Earlier questions and answers as the row has them; calls are answers, as JSON, and results questions."""
    system: str | None
    """None: the row has none."""
    label: str | None
    """The last answer, calls as JSON; None where the row ends with a question."""
    pictures: tuple[str, ...]
    """Paths, http(s) URLs and data: URLs in the order of their places."""
    template: str | None
    """The name that META gives these rows; None: the run's."""


class Rows:
    """Rows of data sets in their order. report: counts of what iterating read and refused; refused: the first reasons.

    `len` counts the rows that will be read, bad ones included.
    """

    def __init__(self, config: FeedConfig, files: list[File], held: float | None) -> None:
        self._config, self._files, self._held = config, files, held
        self._ids = _prefixes([file.path for file in files])
        self.report: Counter[str] = Counter()
        self.refused: list[str] = []

    def __len__(self) -> int:
        return self._total if self._chosen is None else len(self._chosen)

    def __iter__(self) -> Iterator[RawRow]:
        self.report, self.refused = Counter(), []
        chosen = self._chosen
        for ordinal, (stretch, raw) in enumerate(self._raws()):
            if chosen is not None and ordinal not in chosen:
                continue
            self.report["read"] += 1
            where = f"{self._files[stretch.file].path}:{raw.number}"
            try:
                row = self._row(stretch, raw, where)
            except ValueError as error:
                if self._config.on_bad_row == "error":
                    raise ValueError(f"{where}: {error}; mend or drop the row, or set on_bad_row skip") from error
                self.report["bad"] += 1
                self.refused += [f"{where}: {error}"] if len(self.refused) < SHOWN else []
                continue
            self.report["used"] += 1
            yield row

    @cached_property
    def _total(self) -> int:
        """How many rows the files have."""
        return sum(1 for _ in self._raws())

    @cached_property
    def _chosen(self) -> frozenset[int] | None:
        """Numbers of the rows that are given; None: all."""
        if self._held is None:
            return None
        return frozenset(held_out(self._total, self._held, self._config.seed).tolist())

    def _raws(self) -> Iterator[tuple[Stretch, Raw]]:
        """Rows as they lie in the files, in the order in which training reads them."""
        for stretch in stretches(self._files, self._config):
            path = Path(stretch.survey.path)
            check_unchanged(path, stretch.survey.size, stretch.survey.changed)
            for raw in read_rows(path, stretch.span):
                if stretch.times(raw.number):
                    yield stretch, raw

    def _row(self, stretch: Stretch, raw: Raw, where: str) -> RawRow:
        """Make one row. ValueError for one that makes no sense."""
        value, source = parse(raw), stretch.source
        if isinstance(value, Bad):
            raise ValueError(value.reason)
        sample = to_sample(value, source, seed=self._config.seed, number=raw.number, answered=False)
        self.report.update({name: count for name, count in sample.notes.items() if count})
        turns, said = list(sample.turns), list(sample.said)
        label = _whole(said[-1]) if said[-1].role in ("assistant", "function") else None
        if label is not None:
            turns, said = turns[:-1], said[:-1]
        system = said[0].text if said[0].role == "system" else None
        said = _taken_turns([turn for turn in said if turn.role not in ("system", "tools")])
        asked = [_whole(turn) for turn in said]
        for number, turn in enumerate(said):
            if turn.role not in (("user", "tool"), ("assistant", "function"))[number % 2]:
                raise ValueError(f"conversations: got a turn of {turn.role!r} where the other one is to speak")
        return RawRow(
            id=f"{self._ids[stretch.file]}:{raw.number}",
            where=where,
            turns=tuple(turns),
            query=asked[-1],
            history=[list(pair) for pair in zip(asked[:-1:2], asked[1::2], strict=True)],
            system=system,
            label=label,
            pictures=tuple(locate(name, source.root) for name in sample.pictures),
            template=source.prompt_type or ("caption" if source.preprocess == "caption" else None),
        )


def open_rows(
    datasets: Sequence[str],
    *,
    dataset_dir: str | None = None,
    media_dir: str | None = None,
    seed: int = 0,
    max_samples: int | None = None,
    held: float | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    fill: Mapping[str, str] | None = None,
) -> Rows:
    """The rows of data sets, named as `read_sources` has them.

    seed: of the run whose rows these are; it draws name#N, ratios, captions and the split. held: none: all rows; else
    the run's val_size, and the rows are those it kept for validation. Whether pictures are there is not looked at.
    Raises ValueError or OSError for names that stand for nothing and for files that cannot be read; while iterating,
    ValueError that names file and row for a bad one, unless on_bad_row is skip.
    """
    sources = tuple(read_sources(datasets, root=media_dir, dataset_dir=dataset_dir, fill=fill))
    config = FeedConfig(sources, on_bad_row=on_bad_row, max_samples=max_samples, seed=seed)
    files = []
    for number, source in enumerate(sources):
        for path in files_of(source):
            look = survey(path, None)
            if look.kind == "packed":
                raise ValueError(f"{path}: holds packed text, expected rows of questions and answers; name another set")
            files.append(File(path, _rooted(source, path), look, number))
    if not files:
        raise ValueError("dataset: got no source, expected at least one data file")
    return Rows(config, files, held)


def _rooted(source: Source, path: Path) -> Source:
    """A source whose pictures are relative to some folder."""
    return replace(source, root=source.root or str(path.parent))


def _taken_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Turns with the results of several calls as one."""
    done: list[Turn] = []
    for turn in turns:
        if turn.role == "tool" and done and done[-1].role == "tool":
            done[-1] = replace(done[-1], text=f"{done[-1].text}\n{turn.text}")
        else:
            done.append(turn)
    return done


def _whole(turn: Turn) -> str:
    """A turn in one text, its input behind it, calls behind what is said before them."""
    if turn.preface:
        return f"{turn.preface}\n{turn.text}"
    return f"{turn.text}\n{turn.input}" if turn.input else turn.text


def _prefixes(paths: Sequence[Path]) -> list[str]:
    """For each file its name, with as many folders in front as tell it from the other files."""
    parts = [path.resolve().parts for path in paths]
    shorts = ["/".join(own[-1:]) for own in parts]
    depth = 1
    while len(set(shorts)) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
        shorts = ["/".join(own[-depth:]) for own in parts]
    times: Counter[str] = Counter()
    named = []
    for short in shorts:
        times[short] += 1
        named.append(short if times[short] == 1 else f"{short}({times[short]})")  # the same file once more
    return named

"""From settings to batches: which sources, which numbers decide them, training and validation apart.

Must not know weights; of the model it asks how a picture is to be given and how many slots it fills.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
from torch.distributed import ProcessGroup

from accessory.assemble import geometry
from accessory.data.feed import Batch, Corpus, Feed, FeedConfig, Source, Stream, open_corpus, read_sources
from accessory.data.picture import kind_of, read_picture
from accessory.data.tokenizer import Tokenizer
from accessory.dist import Ranks
from accessory.train.agree import first_alone, gather
from accessory.train.evaluate import Question
from accessory.train.settings import Settings
from accessory.vision import VisionConfig

log = logging.getLogger(__name__)

PATIENCE = timedelta(days=30)  # tokenising may take hours; a rank that dies is noticed at once


@dataclass
class Data:
    """What a run learns from and is judged by."""

    config: FeedConfig
    corpus: Corpus | None
    """None when streaming."""
    validation: Corpus | None

    @property
    def pictures(self) -> bool:
        """Whether micro-batches may bring pictures."""
        may = self.config.pictures and self.config.stage == "sft"
        return may and (self.corpus is None or self.corpus.has_pictures)

    def check_equal(self, group: ProcessGroup | None) -> None:
        """ValueError on all ranks where hosts read other rows: each deals its own part of what it sees."""
        mine = [part.fingerprint for part in (self.corpus, self.validation) if part is not None]
        if any(other != mine for other in gather(mine, group)):
            raise ValueError(
                "dataset: the ranks read different rows, expected the same files on every host, which nobody writes to;"
                " copy them again, or start again"
            )

    def describe(self, tokenizer: Tokenizer) -> list[str]:
        """Lines for people: how much there is, and one example as the model sees it."""
        if self.corpus is None:
            return ["data: a stream, whose rows are counted as they come and told at the end"]
        held = "" if self.validation is None else f", {len(self.validation)} more for validation"
        lines = [
            f"{len(self.corpus)} rows, {int(self.corpus.lengths.sum()):,} positions, "
            f"{int(self.corpus.targets.sum()):,} of them learned{held}"
        ]
        return [
            *lines,
            f"the first row ({self.corpus.row(0).where}), what is learned in [[ ]]:",
            self.corpus.example(0, tokenizer),
        ]

    def counts(self) -> dict[str, int | None]:
        """Rows by purpose; None for a stream."""
        parts = {"train_dataset": self.corpus, "val_dataset": self.validation}
        return {name: None if part is None else len(part) for name, part in parts.items()}

    @property
    def own_length(self) -> float:
        """Positions of a token's own row, on average: what its attention costs. cutoff_len for a stream."""
        if self.corpus is None:
            return float(self.config.cutoff_len)
        lengths = self.corpus.lengths.astype(np.float64)
        return float((lengths**2).sum() / lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Of the training rows; of the sources' names alone when streaming."""
        return "stream" if self.corpus is None else self.corpus.fingerprint


def feed_config(settings: Settings, template: str, vision: VisionConfig | None, slots: int) -> FeedConfig:
    """Everything that decides the numbers. ValueError where no data is named."""
    if not settings.dataset:
        raise ValueError("dataset: missing, expected data files or YAML files with a META list; name at least one")
    return FeedConfig(
        sources=_sources(settings, settings.dataset),
        stage=settings.stage,
        template=template,
        default_system=settings.default_system,
        cutoff_len=settings.cutoff_len,
        overlong=settings.overlong,
        on_bad_row=settings.on_bad_row,
        packing=settings.packing,
        share_pictures=settings.share_pictures,
        max_samples=settings.max_samples,
        seed=data_seed(settings),
        slots=slots,
        tiles=None if vision is None else geometry(vision, slots, image_transform=settings.image_transform),
        before_bos=vision is not None and vision.before_bos,
        pictures=vision is not None,
        orientation=settings.orientation,
        allow_private_urls=settings.allow_private_urls,
        cache_dir=settings.cache_dir,
        workers=settings.preprocessing_num_workers,
    )


def data_seed(settings: Settings) -> int:
    """Of the rows that are drawn and of those kept for validation."""
    return settings.seed if settings.dataset_seed is None else settings.dataset_seed


def _sources(settings: Settings, names: Sequence[str]) -> tuple[Source, ...]:
    """What names of data sets stand for."""
    return tuple(read_sources(names, root=settings.media_dir, dataset_dir=settings.dataset_dir))


def open_data(
    settings: Settings, config: FeedConfig, tokenizer: Tokenizer, ranks: Ranks, patient: ProcessGroup | None
) -> Data:
    """Tokenise on the first rank of each host, or find it done; split off validation rows."""
    corpus = None
    if not settings.streaming:
        corpus = first_alone(lambda: open_corpus(config, tokenizer), ranks, patient)
    validation = None
    if settings.eval_dataset:
        judged = replace(config, sources=_sources(settings, settings.eval_dataset))
        validation = first_alone(lambda: open_corpus(judged, tokenizer), ranks, patient)
    elif settings.val_size and corpus is not None:
        corpus, validation = corpus.split(settings.val_size, data_seed(settings))
    return Data(config, corpus, validation)


def make_feed(settings: Settings, data: Data, tokenizer: Tokenizer, ranks: Ranks) -> Feed | Stream:
    """The sampler of this rank's data-parallel place."""
    common = {
        "batch": settings.per_device_train_batch_size,
        "accumulation": settings.gradient_accumulation_steps,
        "dp_rank": ranks.dp_rank,
        "dp_size": ranks.dp_size,
        "seed": settings.seed,
        "shuffle": not settings.disable_shuffling,
        "workers": settings.dataloader_num_workers,
        "pin": ranks.device.type == "cuda",
    }
    if data.corpus is None:
        return Stream(data.config, tokenizer, buffer=settings.buffer_size, **common)
    return Feed(data.corpus, data.config, **common)


def validation_batches(settings: Settings, data: Data, ranks: Ranks) -> Sequence[Batch]:
    """This rank's share of the validation rows in their order; the same number on every rank. Made as they are read."""
    if data.validation is None:
        return ()
    feed = Feed(
        data.validation,
        replace(data.config, packing=False),
        batch=settings.per_device_eval_batch_size or settings.per_device_train_batch_size,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        seed=settings.seed,
        shuffle=False,
    )
    return _Once(feed)


class _Once(Sequence[Batch]):
    """The batches of one epoch by number, so that no more than one of them is in memory."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __len__(self) -> int:
        return self._feed.steps_per_epoch

    def __getitem__(self, index: int) -> Batch:
        self._feed.restore({"epoch": 0, "taken": index * self._feed.global_batch, "skipped": 0})
        return self._feed.first()[0]


def questions(settings: Settings, data: Data) -> list[Question]:
    """The first rows of the validation data as questions: up to their last answer, which is expected."""
    if data.validation is None or settings.stage != "sft":
        return []
    count = min(settings.eval_answers, len(data.validation))
    return [
        Question(
            example.turns[:-1],
            example.turns[-1].text,
            tuple(_picture(name, data.config) for name in example.pictures),
            template=example.template,
            where=data.validation.row(index).where,
        )
        for index, example in enumerate(data.validation.conversations(range(count)))
    ]


def _picture(name: str, config: FeedConfig) -> str | bytes:
    """What the engine reads: the bytes of a URL, which were fetched before as the settings allow it."""
    if kind_of(name) != "url":
        return name
    return read_picture(name, allow_private_urls=config.allow_private_urls, cache=config.picture_cache)

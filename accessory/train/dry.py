"""`dry_run: true`: what a run would be, without weights, ranks or GPUs; its data is read where it is there.

Must not train anything.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from accessory.dist import Ranks, Shard, cpu_has_bf16, pick_device
from accessory.dist.place import read_nodes, read_nproc, read_place
from accessory.train.feeding import Data, feed_config, make_feed, open_data
from accessory.train.plan import DataFacts, plan, render, shape_spec
from accessory.train.settings import Settings
from accessory.train.start import Start, open_start

log = logging.getLogger(__name__)


def describe(settings: Settings) -> str:
    """The plan as text. Raises ValueError or OSError as the run itself would, but data need not be there."""
    here = settings.nproc_per_node or read_nproc(os.environ) or 1
    place = read_place(os.environ)
    world = settings.world_size or (place.world if place.world > 1 else here * read_nodes(os.environ).count)
    if settings.shape is not None:
        settings.settle(max(1, world // settings.tensor_parallel_size))
        return render(plan(settings, shape_spec(settings), world=world))
    if settings.tensor_parallel_size < 1 or world % settings.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size: got {settings.tensor_parallel_size} with {world} rank(s), expected a divisor of the"
            " number of ranks; set world_size"
        )
    device = pick_device(settings.device)
    dp = world // settings.tensor_parallel_size
    settings.settle(dp)
    ranks = Ranks(0, world, 0, Shard(0, settings.tensor_parallel_size), 0, dp, device)
    start = open_start(settings, ranks)
    text = render(
        plan(
            settings,
            start.spec,
            world=world,
            device="cuda" if device.type == "cuda" else "cpu",
            dtype=start.dtype if device.type == "cuda" or cpu_has_bf16() else torch.float32,
            data=_look(settings, start, ranks),
        )
    )
    return text if text.endswith("\n") else text + "\n"


def _look(settings: Settings, start: Start, ranks: Ranks) -> DataFacts | None:
    """What the data says; None, with a word, where it is not there."""
    missing = [name for name in settings.dataset if not Path(name).exists()]
    if missing or not settings.dataset:
        log.info("data: %s not there, so that steps are not known", ", ".join(missing) or "none named,")
        return None
    config = feed_config(settings, start.template, start.spec.vision, start.slots)
    data = open_data(settings, config, start.tokenizer, ranks, None)
    return data_facts(settings, data, start, ranks)


def data_facts(settings: Settings, data: Data, start: Start, ranks: Ranks) -> DataFacts:
    """Rows, steps and the first micro-batch of opened data."""
    feed = make_feed(replace(settings, dataloader_num_workers=0), data, start.tokenizer, ranks)
    first = next(iter(feed))[0] if data.corpus is None else feed.first()[0]
    shapes = {
        name: tuple(value.shape) for name, value in first.tensors(torch.device("cpu")).items() if value is not None
    }
    if data.corpus is None:
        return DataFacts(rows=0, steps_per_epoch=None, batch=shapes)
    return DataFacts(
        rows=len(data.corpus),
        steps_per_epoch=feed.steps_per_epoch,
        tokens=int(data.corpus.lengths.sum()),
        batch=shapes,
        pictures=data.corpus.tile_count / feed.sequences,
        length=data.own_length,
    )

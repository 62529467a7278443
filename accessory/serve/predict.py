"""`accessory predict`, and `train` with do_predict: a dataset through a model, scored; gone on with after any end.

Must not know models, data files or how answers are kept: it brings together those who do.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory import dist, metrics
from accessory.config import parse
from accessory.dialect.translate import translator
from accessory.dist.place import read_place
from accessory.serve import predictions
from accessory.serve.asking import look, name_of
from accessory.serve.journal import Journal
from accessory.serve.opening import (
    check_words,
    describe,
    open_bundle,
    open_engine,
    resolved,
    sampling_of,
    start_ranks,
    template_of,
)
from accessory.serve.predict_settings import PredictSettings

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.data.feed import RawRow, Rows
    from accessory.data.template import Turn
    from accessory.data.tokenizer import Tokenizer
    from accessory.dist import Ranks
    from accessory.engine import Engine, Request, Result

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accessory predict`. Raises ValueError or OSError for settings, models and rows that cannot be."""
    run(
        parse(
            PredictSettings,
            argv,
            prog="accessory predict",
            description=PredictSettings.__doc__ or "",
            translate=translator("predict"),
        )
    )
    return 0


def run(settings: PredictSettings, *, argv: Sequence[str] | None = None) -> dict[str, float]:
    """Answer and score as the settings say; the results on rank 0, nothing elsewhere. argv: what followers run."""
    settings.check()
    check_words(settings, settings)
    if settings.dry_run:
        sys.stdout.write(resolved(settings))
        return {}
    if read_place(os.environ).rank == 0:
        metrics.words("")  # a package that is missing is said before hours of work
    rows = open_dataset(settings)
    ranks = start_ranks(settings, argv=argv, timeout=settings.ddp_timeout)
    results = ask(settings, rows, ranks)
    dist.close()
    return results


def open_dataset(settings: PredictSettings) -> Rows:
    """The rows to answer."""
    from accessory.data.feed import open_rows

    if settings.eval_dataset and settings.dataset:
        log.info("dataset: not read, the rows of eval_dataset are answered")
    rows = open_rows(
        settings.answered,
        dataset_dir=settings.dataset_dir,
        media_dir=settings.media_dir,
        seed=settings.seed,
        max_samples=settings.max_samples,
        held=settings.val_size or None,
        on_bad_row=settings.on_bad_row,
    )
    if not len(rows):
        raise ValueError(f"dataset: got no row in {', '.join(settings.answered)}, expected at least one; give others")
    return rows


def ask(settings: PredictSettings, rows: Rows, ranks: Ranks) -> dict[str, float]:
    """The same on ranks that have met."""
    chosen = list(rows)
    if rows.refused and ranks.rank == 0:
        log.warning("%d rows were skipped: %s", rows.report["bad"], "; ".join(rows.refused[:5]))
    plan = _plan(settings, chosen, ranks)
    folder, report = Path(settings.output_dir), dict[str, float]()
    if len(plan.known) < len(chosen):
        report = _answer_all(settings, plan, ranks)
    report["refused"] = report.get("refused", 0) + rows.report["bad"]
    if ranks.rank:
        return {}
    results = predictions.conclude(folder, chosen, report)
    width = max(map(len, results))
    sys.stdout.write("".join(f"{name:<{width}} = {value:g}\n" for name, value in sorted(results.items())))
    sys.stdout.flush()
    log.info("answers: %s, results: %s", folder / predictions.ANSWERS, folder / predictions.RESULTS)
    return results


@dataclass
class _Plan:
    """What all ranks know before they begin."""

    rows: list[RawRow]
    """All, in order."""
    known: set[str]
    """Ids of those that were answered before."""
    group: Any = None
    """Of all ranks, which waits for days; None where there is one."""


def _plan(settings: PredictSettings, rows: list[RawRow], ranks: Ranks) -> _Plan:
    """What is left to do: rank 0 looks, and tells the others."""
    told: list[Any] = [predictions.enter(settings, rows) if ranks.rank == 0 else None]
    if ranks.world == 1:
        return _Plan(rows, told[0])
    import torch

    from accessory.dist.ranks import IDLE, host_group

    torch.distributed.broadcast_object_list(told, group=ranks.host_group, group_src=0)
    return _Plan(rows, told[0], host_group(IDLE))


def _answer_all(settings: PredictSettings, plan: _Plan, ranks: Ranks) -> dict[str, float]:
    """Answer what is left, on all ranks; on rank 0 what that took."""
    from accessory.serve.rows import STEADY

    began = time.monotonic()
    bundle = open_bundle(settings, ranks)
    longest, most = bundle.config.max_seq_len, settings.cutoff_len + settings.max_new_tokens
    window = longest if settings.max_seq_len else min(longest, most)
    at_once, counted = settings.per_device_eval_batch_size, [0, 0]
    with open_engine(settings, bundle, ranks, rows=at_once, orientation="keep", window=window, **STEADY) as engine:
        ready = time.monotonic()
        if ranks.leader:
            counted = _answer(settings, bundle, engine, plan, ranks)
        else:
            engine.follow()
    if plan.group is not None:
        import torch

        everyone: list[Any] = [None] * ranks.world
        torch.distributed.all_gather_object(everyone, counted, group=plan.group)
        counted = [sum(column) for column in zip(*everyone, strict=True)]
    took = time.monotonic() - ready
    steps = -(-counted[0] // (at_once * ranks.dp_size))
    return {
        "runtime": round(took, 4),
        "samples_per_second": round(counted[0] / took, 3),
        "steps_per_second": round(steps / took, 3),
        "model_preparation_time": round(ready - began, 4),
        "refused": counted[1],
    }


def _answer(settings: PredictSettings, bundle: Bundle, engine: Engine, plan: _Plan, ranks: Ranks) -> list[int]:
    """This data-parallel rank's share of the rows: how many it answered, and how many it could not ask."""
    from accessory.serve.rows import Batch, deal

    folder = Path(settings.output_dir)
    template = template_of(settings, bundle)
    log.info("model: %s", describe(bundle, template, engine))
    file = Journal(folder / predictions.ANSWERS, rank=ranks.dp_rank)
    at_once = settings.per_device_eval_batch_size * ranks.dp_size
    place = folder / predictions.PROGRESS
    progress = predictions.Progress(place, rows=len(plan.rows), known=len(plan.known), at_once=at_once)
    answered = 0

    def write(record: dict[str, Any]) -> None:
        nonlocal answered
        file.append(record)
        answered += 1
        if ranks.rank == 0:
            progress.show(answered * ranks.dp_size)

    batch = Batch(
        engine,
        _asker(settings, template, engine.window),
        functools.partial(
            look, orientation=settings.orientation or "keep", allow_private_urls=settings.allow_private_urls
        ),
        _noter(bundle.tokenizer),
        write,
        width=settings.per_device_eval_batch_size,
        default_system=settings.default_system,
        skip_bad=settings.on_bad_row == "skip",
    )
    try:
        batch.run(deal([row for row in plan.rows if row.id not in plan.known], ranks.dp_rank, ranks.dp_size))
    finally:
        file.close()
    batch.tell()
    return [batch.report["answered"], batch.report["refused"]]


def _asker(settings: PredictSettings, template: str, window: int) -> Callable[..., Request]:
    """Makes the request of a row."""
    from accessory.engine import Request

    sampling = sampling_of(settings)
    longest = min(settings.max_new_tokens, max(window - settings.cutoff_len, window // 2))
    if longest < settings.max_new_tokens:
        text = "max_new_tokens: got %d in a window of %d tokens, answers have at most %d; raise max_seq_len"
        log.warning(text, settings.max_new_tokens, window, longest)

    def ask(row: RawRow, turns: Sequence[Turn], pictures: Sequence[Any]) -> Request:
        return Request(
            turns,
            pictures=pictures,
            template=settings.template or row.template or template,
            sampling=replace(sampling, seed=seed_of(settings.seed, row.id)),
            max_gen_len=longest,
            stops=settings.stop_words,
            overlong=settings.overlong,
            max_prompt=settings.cutoff_len,
        )

    return ask


def seed_of(seed: int, row: str) -> int:
    """The seed of a row's answer: of the run's seed and the row's id alone, so that order and ranks do not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:6], "big")


def _noter(tokenizer: Tokenizer) -> Callable[[RawRow, Request, Result], dict[str, Any]]:
    """Makes the line of an answered row."""

    def note(row: RawRow, request: Request, result: Result) -> dict[str, Any]:
        images = [name_of(name) for name in row.pictures]
        prompt = written(request, tokenizer)
        return predictions.line(row, prompt, result.text, finish=result.finish, dropped=result.dropped, images=images)

    return note


def written(request: Request, tokenizer: Tokenizer) -> str:
    """The whole prompt of a request as text: control tokens as the tokenizer calls them, pictures as <image>."""
    from accessory.data.encode import settle
    from accessory.data.template import Control, Text, get_template, render

    form = request.template
    assert form is not None and not isinstance(request.turns, str), request
    names = {token: name for name, token in tokenizer.backend.names.items()}
    told = []
    for part in settle(render(get_template(form) if isinstance(form, str) else form, request.turns), tokenizer):
        if isinstance(part, Text):
            told.append(part.text)
        else:
            told.append(names[tokenizer.control(part.name)] if isinstance(part, Control) else "<image>")
    return "".join(told)

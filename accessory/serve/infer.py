"""`accessory infer`: ms-swift's interactive protocol, or a dataset through a checkpoint.

Must not know models, terminals or data files: it brings together those who do.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory import dist
from accessory.config import dump, parse
from accessory.dialect.translate import translator
from accessory.serve import journal
from accessory.serve.asking import look, name_of
from accessory.serve.infer_settings import InferSettings
from accessory.serve.journal import Journal
from accessory.serve.keyboard import Keyboard
from accessory.serve.noted import take_over
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
from accessory.serve.repl import Media, Repl
from accessory.serve.speaker import Speaker

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.data.feed import RawRow, Rows
    from accessory.dist import Ranks
    from accessory.engine import Engine, Request, Result
    from accessory.serve.rows import Batch

log = logging.getLogger(__name__)

FEW = 100  # fewer rows are printed unless told otherwise
# what may differ between a run and the one that goes on with its results
_FREE = (
    "dialect device tensor_parallel_size nproc_per_node infer_batch_size show_dataset_sample resume stream verbose "
    "dry_run save_result result_dir eval_human load_args_from_ckpt_dir on_bad_row"
).split()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accessory infer`. Raises ValueError or OSError for settings, models and rows that cannot be."""
    run(
        parse(
            InferSettings,
            argv,
            prog="accessory infer",
            description=InferSettings.__doc__ or "",
            translate=translator("infer"),
        )
    )
    return 0


@dataclass
class Done:
    """What was answered: on rank 0, elsewhere nothing."""

    records: list[dict[str, Any]] = field(default_factory=list)
    path: str | None = None
    """The file of the records."""


def run(settings: InferSettings, *, argv: Sequence[str] | None = None) -> Done:
    """Ask as the settings say. argv: what followers run; none: this command."""
    settings.check()
    check_words(settings, settings)
    settings = take_over(settings)
    if settings.dry_run:
        sys.stdout.write(resolved(settings))
        return Done()
    rows = None if settings.interactive else open_dataset(settings)  # before minutes of loading
    ranks = start_ranks(settings, argv=argv)
    done = ask(settings, rows, ranks)
    dist.close()
    return done


def ask(settings: InferSettings, rows: Rows | None, ranks: Ranks) -> Done:
    """The same on ranks that have met. rows: None: a person asks."""
    from accessory.serve.rows import STEADY

    plan = _plan(settings, rows, ranks)
    if plan.path is not None and plan.rows and len(plan.known) == len(plan.rows):
        return Done(_finished(plan) if ranks.rank == 0 else [], str(plan.path))
    bundle = open_bundle(settings, ranks)
    width = 1 if rows is None else settings.infer_batch_size
    records: list[dict[str, Any]] = []
    how = STEADY if rows is not None and settings.resume else {}
    with open_engine(settings, bundle, ranks, rows=width, orientation="keep", **how) as engine:
        if not ranks.leader:
            engine.follow()
        elif rows is None:
            records = _talk(settings, bundle, engine, plan.path)
        else:
            records = _answer(settings, bundle, engine, plan, ranks)
            _tell(rows.refused)
    if rows is not None and ranks.dp_size > 1:
        records = _gather(plan, ranks)
    written = ranks.rank == 0 and plan.path is not None and plan.path.exists()
    if written:
        log.info("save_result_path: %s", plan.path)
    return Done(records, str(plan.path) if written else None)


@dataclass
class _Plan:
    """What all ranks know before they begin."""

    path: Path | None
    """Of the answers; none: they are not kept."""
    rows: list[RawRow]
    """All that are to be answered, in order."""
    known: set[str]
    """Ids of those that were answered before."""
    loud: bool
    """Whether rows are printed."""
    group: Any = None
    """Of all ranks, which waits for days; None where there is one."""


def _plan(settings: InferSettings, rows: Rows | None, ranks: Ranks) -> _Plan:
    """Decide what is answered and where it is kept: rank 0 looks, and tells the others."""
    chosen = [] if rows is None else _chosen(rows, settings)
    told: list[Any] = [None, set()]
    if ranks.rank == 0 and settings.save_result:
        told = list(_result_path(settings, chosen))
    group = None
    if ranks.world > 1:
        import torch

        from accessory.dist.ranks import IDLE, host_group

        torch.distributed.broadcast_object_list(told, group=ranks.host_group, group_src=0)
        group = host_group(IDLE)
    if rows is None and ranks.dp_size > 1:
        raise ValueError(
            f"tensor_parallel_size: got {ranks.shard.size} in a job of {ranks.world} ranks, expected {ranks.world}, as"
            " one person asks one model; leave it out"
        )
    if told[0] is None and ranks.dp_size > 1:
        raise ValueError(f"save_result: got false on {ranks.dp_size} data-parallel ranks, expected true; set it so")
    loud = settings.verbose if settings.verbose is not None else len(chosen) < FEW
    return _Plan(told[0], chosen, told[1], loud, group)


def open_dataset(settings: InferSettings) -> Rows:
    """The rows to answer."""
    from accessory.data.feed import open_rows

    rows = open_rows(
        settings.dataset,
        dataset_dir=settings.dataset_dir,
        media_dir=settings.media_dir,
        seed=settings.dataset_seed,
        max_samples=settings.max_samples,
        held=settings.val_size or None,
        on_bad_row=settings.on_bad_row,
    )
    if not len(rows):
        raise ValueError(f"dataset: got no row in {', '.join(settings.dataset)}, expected at least one; give others")
    return rows


def _result_path(settings: InferSettings, rows: Sequence[RawRow]) -> tuple[Path, set[str]]:
    """Where answers go, and the ids of those that are there from a run of the same settings that is gone on with."""
    if settings.result_dir is not None:
        folder = Path(settings.result_dir)
    elif settings.ckpt_dir is not None:
        folder = Path(settings.ckpt_dir) / "infer_result"
    else:
        named = settings.model_name_or_path[:1] or [settings.model_type or "tiny"]
        folder = Path("output/infer") / Path(named[0]).name / "infer_result"
    wanted = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    found = journal.newest(folder, wanted) if settings.resume and not settings.interactive else None
    if found is not None:
        known = _known(found, rows)
        log.info("%s: going on, %d of %d rows were answered before", found, len(known), len(rows))
        return found, known
    path = journal.new_path(folder)
    if settings.interactive:
        return path, set()
    folder.mkdir(parents=True, exist_ok=True)
    dump(settings, path.with_suffix(".yaml"))
    if settings.resume:
        log.info("%s: no results of these settings, beginning anew", folder)
    return path, set()


def _asker(settings: InferSettings, bundle: Bundle, engine: Engine) -> str:
    """The template, after a line on what runs."""
    template = template_of(settings, bundle)
    log.info("model: %s", describe(bundle, template, engine))
    return template


def _look(settings: InferSettings) -> Callable[[str], Any]:
    """Opens pictures as the settings say."""
    return functools.partial(
        look, orientation=settings.orientation or "keep", allow_private_urls=settings.allow_private_urls
    )


def _talk(settings: InferSettings, bundle: Bundle, engine: Engine, path: Path | None) -> list[dict[str, Any]]:
    """The interactive protocol."""
    speaker = Speaker(
        engine,
        sampling_of(settings),
        _asker(settings, bundle, engine),
        max_gen_len=settings.max_new_tokens,
        stops=settings.stop_words,
        steady=True,
        stream=settings.stream,
        bounds=("--max_seq_len", "--max_new_tokens"),
    )
    media: Media = "none" if bundle.vision is None else "round" if bundle.model.vision.slots else "dialogue"
    with Keyboard(prompts=True) as keyboard:
        repl = Repl(speaker, keyboard, _look(settings), media=media, system=settings.default_system)
        if path is not None:
            repl.journal = Journal(path)
        repl.run()
    return repl.results


def _answer(settings: InferSettings, bundle: Bundle, engine: Engine, plan: _Plan, ranks: Ranks) -> list[dict[str, Any]]:
    """This data-parallel rank's share of the rows; all records where there is one such rank."""
    from accessory.serve.rows import Printer, deal

    order = {row.id: number for number, row in enumerate(plan.rows)}
    printer = Printer(list(order)) if plan.loud and ranks.dp_size == 1 else None
    file = Journal(plan.path, rank=ranks.dp_rank) if plan.path is not None else None
    records: list[dict[str, Any]] = []

    def write(record: dict[str, Any]) -> None:
        if file is not None:
            file.append(record)
        records.append(record)
        if printer is not None:
            printer.show(record)

    if plan.known and printer is not None and plan.path is not None:
        for record in journal.read_lines(plan.path):
            if record.get("id") in plan.known:
                printer.show(record)
    batch = _batch(settings, bundle, engine, write)
    try:
        batch.run(deal([row for row in plan.rows if row.id not in plan.known], ranks.dp_rank, ranks.dp_size))
    finally:
        if file is not None:
            file.close()
    if printer is not None:
        printer.flush()
    batch.tell()
    if ranks.dp_size > 1:
        return []
    return journal.finish(plan.path, list(order)) if plan.path else sorted(records, key=lambda r: order[r["id"]])


def _gather(plan: _Plan, ranks: Ranks) -> list[dict[str, Any]]:
    """When all data-parallel ranks are done: rank 0 puts their lines into one file, and prints them."""
    import torch

    torch.distributed.barrier(plan.group)
    return _finished(plan) if ranks.rank == 0 else []


def _finished(plan: _Plan) -> list[dict[str, Any]]:
    """Put the lines of all rows into one file, and print them."""
    from accessory.serve.rows import block

    assert plan.path is not None, "answers that are gone on with or gathered are kept"
    records = journal.finish(plan.path, [row.id for row in plan.rows])
    if plan.loud:
        sys.stdout.write("".join(block(record) for record in records))
        sys.stdout.flush()
    return records


def _batch(settings: InferSettings, bundle: Bundle, engine: Engine, write: Callable[[dict[str, Any]], None]) -> Batch:
    """Who answers the rows."""
    from accessory.engine import Request
    from accessory.serve.rows import Batch

    template, sampling = _asker(settings, bundle, engine), sampling_of(settings)

    def ask(row: RawRow, turns: Sequence[Any], pictures: Sequence[Any]) -> Request:
        return Request(
            turns,
            pictures=pictures,
            template=settings.template or row.template or template,
            sampling=sampling,
            max_gen_len=settings.max_new_tokens,
            stops=settings.stop_words,
        )

    return Batch(
        engine,
        ask,
        _look(settings),
        functools.partial(_record, default_system=settings.default_system),
        write,
        width=settings.infer_batch_size,
        default_system=settings.default_system,
        skip_bad=settings.on_bad_row == "skip",
    )


def _record(row: RawRow, request: Request, result: Result, *, default_system: str | None) -> dict[str, Any]:
    """An answered row."""
    return {
        "id": row.id,
        "system": row.system if row.system is not None else default_system,
        "query": row.query,
        "response": result.text,
        "label": row.label,
        "history": row.history,
        "images": [name_of(name) for name in row.pictures],
        "finish": result.finish,
    }


def _chosen(rows: Rows, settings: InferSettings) -> list[RawRow]:
    """The rows that are answered this time."""
    most, chosen = settings.show_dataset_sample, list[Any]()
    for row in rows:
        if len(chosen) == most:
            log.info(
                "%d of %d rows: You can set `--show_dataset_sample -1` to perform inference on the entire dataset.",
                most,
                len(rows),
            )
            break
        chosen.append(row)
    return chosen


def _known(path: Path, rows: Sequence[RawRow]) -> set[str]:
    """Ids of the rows that a file has answers to. ValueError where a row has changed since."""
    told = {record["id"]: record for record in journal.read_lines(path, mend=True) if "id" in record}
    for row in rows:
        if row.id in told and told[row.id].get("query") != row.query:
            raise ValueError(
                f"{row.where}: asks {row.query!r:.60}, but {path} answered {told[row.id].get('query')!r:.60} under this"
                " id, as the data has changed since; begin anew without resume"
            )
    return {row.id for row in rows if row.id in told}


def _tell(refused: Sequence[str]) -> None:
    """Rows that could not be read."""
    if refused:
        log.warning("%d rows were skipped: %s", len(refused), "; ".join(refused[:5]))

"""`accessory train`: settings, ranks, and either a plan of the run (dry_run) or the run itself.

Must not import torch before the ranks of this host are started.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from accessory import dist
from accessory.config import parse
from accessory.dialect.translate import translator
from accessory.dist.place import CREW, read_nodes, read_nproc, read_place
from accessory.train.settings import Settings

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the settings say. The exit code is 0, or RESUMABLE (75) when a signal ended a run that can go on."""
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = parse(
        Settings, argv, prog="accessory train", description=Settings.__doc__ or "", translate=translator("train")
    )
    settings.check()
    for name in ("dataset", "eval_dataset", "llama_config"):
        setattr(settings, name, [_from_checkout(path) for path in getattr(settings, name)])
    if settings.dry_run:
        return _dry_run(settings)
    _record_flights(settings.output_dir)
    alone = read_place(os.environ).world == 1
    dist.launch(_ranks_here(settings), nodes=read_nodes(os.environ) if alone else None)
    ranks = dist.init(tp=settings.tensor_parallel_size, device=settings.device, timeout=settings.ddp_timeout)
    dist.setup_logging(ranks.rank)
    settings.settle(ranks.dp_size)
    from accessory.train.run import run

    code = run(settings, ranks)
    dist.close()
    return _exit_code(code, rank=ranks.rank, local_rank=ranks.local_rank)


def _record_flights(folder: str) -> None:
    """Have NCCL keep its last collectives and write them into the run's folder when one of them takes too long."""
    place = str(Path(folder).absolute() / "flight-rank-")
    wanted = {"FR_BUFFER_SIZE": "2000", "NCCL_DUMP_ON_TIMEOUT": "1", "NCCL_DEBUG_INFO_TEMP_FILE": place}
    for name, value in wanted.items():
        os.environ.setdefault(f"TORCH_{name}", value)


def _from_checkout(path: str) -> str:
    """A file of configs/ from any working directory; other paths as they are."""
    there = Path(__file__).resolve().parents[2] / path
    return str(there) if there.is_file() and not Path(path).exists() else path


def _exit_code(code: int, *, rank: int, local_rank: int) -> int:
    """What this process ends with, 0 where its parent would take another code for a crash.

    torchrun makes 1 of any code, and srun may kill the ranks that still write when one has left: exps/launch.sh
    has the code written to ACCESSORY_EXIT_FILE instead. A leader (`dist.launch`) asks its followers for nothing but 0.
    """
    note = os.environ.get("ACCESSORY_EXIT_FILE")
    if note and local_rank == 0:
        Path(note).write_text(str(code))
    followers = rank if "ACCESSORY_STORE" in os.environ else local_rank if CREW in os.environ else 0
    return 0 if note or followers else code


def _ranks_here(settings: Settings) -> int:
    """How many ranks this process should start: what was asked for, else one per visible GPU."""
    world = read_place(os.environ).world
    if world > 1:
        return world if settings.nproc_per_node is None else settings.nproc_per_node
    if settings.nproc_per_node is not None:
        return settings.nproc_per_node
    if told := read_nproc(os.environ):
        return told
    if settings.device == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    return 1


def _dry_run(settings: Settings) -> int:
    """Print what the run would be."""
    dist.setup_logging()
    from accessory.train.dry import describe

    sys.stdout.write(describe(settings))
    return 0

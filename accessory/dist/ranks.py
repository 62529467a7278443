"""The groups of a job: tensor- and data-parallel ranks, device, dtype and logging of this process.

Must not know how the ranks were started, nor models, tokens or files of weights; it never touches seeds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from accessory.dist import crew
from accessory.dist.place import CREW, Place, read_place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IDLE = timedelta(days=30)  # followers wait on the control group while a person thinks; death is seen as a closed socket


@dataclass(frozen=True)
class Shard:
    """Where a tensor-parallel rank stands. Any rank of any size can be built in one process."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Cut:
    """What one rank holds of one tensor of a checkpoint: rows [start, stop) of `dim`, then `pad` zero rows."""

    shape: tuple[int, ...]
    """Full shape, without padding."""
    dim: int | None = None
    """The dim that is cut; None: every rank holds all of it."""
    start: int = 0
    stop: int = 0
    pad: int = 0
    """Zero rows appended on `dim` (a vocabulary padded to a multiple of tp)."""
    replicas: int = 1
    """Ranks that hold this same slice (kv heads, when tp exceeds them)."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's tensor, padding included."""
        if self.dim is None:
            return self.shape
        rows = self.stop - self.start + self.pad
        return (*self.shape[: self.dim], rows, *self.shape[self.dim + 1 :])


@dataclass
class Ranks:
    """The result of `init`: this process's place. Global rank = dp_rank * shard.size + shard.rank."""

    rank: int
    world: int
    local_rank: int
    shard: Shard
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    control: ProcessGroup | None = None
    """A gloo group over the tp ranks for objects and CPU tensors, with a timeout of days; None when tp is 1."""
    host_group: ProcessGroup | None = None
    """A gloo group over all ranks for objects and CPU tensors; None when there is one rank."""

    @property
    def leader(self) -> bool:
        """True on tp rank 0, which leads its tensor-parallel group."""
        return self.shard.rank == 0


def init(*, tp: int | None = None, device: str = "auto", timeout: float = 600.0) -> Ranks:
    """Join the job that torchrun, srun or `launch` started, or stand alone: one process without any process group.

    tp: ranks per tensor-parallel group, None for all of them; neighbouring ranks share a group (fairscale's order).
    device: auto, cpu, cuda or cuda:N. timeout: seconds a collective may take before it fails.
    Raises ValueError for a launch environment, tp or device that cannot work.
    """
    place = read_place(os.environ)
    size = place.world if tp is None else tp
    if size < 1 or size > place.world or place.world % size:
        raise ValueError(f"tp: got {size} with {place.world} rank(s), expected a divisor of the number of ranks")
    chosen = pick_device(device, place.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dp_rank, tp_rank = divmod(place.rank, size)
    ranks = Ranks(
        rank=place.rank,
        world=place.world,
        local_rank=place.local_rank,
        shard=Shard(tp_rank, size),
        dp_rank=dp_rank,
        dp_size=place.world // size,
        device=chosen,
    )
    if place.world > 1:
        crew.follow()
        _share_cores()
        _join(ranks, place, timedelta(seconds=timeout))
    return ranks


def close() -> None:
    """Leave the job: destroy the groups, and wait for the ranks that `launch` started. A second call does nothing.

    Raises ChildProcessError when one of those ranks ended with an error.
    """
    crew.closing()
    if torch.distributed.is_initialized():
        from fairscale.nn.model_parallel import initialize

        initialize.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    crew.dismiss()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names, for a rank of this host; ranks beyond the number of GPUs share them."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device: got {name}, but torch {torch.__version__} sees no CUDA device here; use --device cpu"
        )
    count = torch.cuda.device_count()
    index = int(name[5:]) if ":" in name else local_rank % count
    if index >= count:
        raise ValueError(f"device: got {name}, expected cuda:0 to cuda:{count - 1}, the {count} device(s) visible here")
    return torch.device("cuda", index)


def dtype_from_name(name: str) -> torch.dtype:
    """The torch dtype that `--dtype` names: fp32, bf16 or fp16."""
    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def default_dtype(device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """The dtype to compute in when nobody named one: on a GPU the checkpoint's, on a CPU what it multiplies fast."""
    if device.type == "cuda":
        return torch.bfloat16 if stored is None else stored
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    return any(probe() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if (probe := _probe(name)))


def _probe(name: str) -> Callable[[], bool] | None:
    """One of torch's private CPU probes, None where this torch has lost it."""
    return getattr(torch.cpu, name, None)


def setup_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Send the `accessory` loggers to stderr: from `level` on rank 0, only warnings and errors on the others."""
    root = logging.getLogger("accessory")
    for old in [h for h in root.handlers if h.get_name() == "accessory"]:
        root.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name("accessory")
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    root.addHandler(handler)
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))


def _join(ranks: Ranks, place: Place, timeout: timedelta) -> None:
    """Meet the other ranks and build default, tp, dp and control groups."""
    if torch.distributed.is_initialized():
        raise RuntimeError("dist.init: this process already is in a process group; call dist.close first")
    if place.one_host and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that resolves to nothing must not matter
    try:
        store = _meet(place, timeout)
        backend = _backend(ranks, store)
        torch.distributed.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
        )
    except RuntimeError as error:  # what stores and backends raise, some as a DistError
        raise ValueError(_why_not_met(place, error)) from error
    size = ranks.shard.size
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints when it builds groups
        from fairscale.nn.model_parallel import initialize

        initialize.initialize_model_parallel(size)
    ranks.tp_group, ranks.dp_group = initialize.get_model_parallel_group(), initialize.get_data_parallel_group()
    for group in (ranks.tp_group, ranks.dp_group, initialize.get_pipeline_parallel_group()):
        _set_timeout(group, timeout)
    for first in range(0, place.world if size > 1 else 0, size):  # every rank takes part in building every group
        members = list(range(first, first + size))
        group = torch.distributed.new_group(members, backend="gloo", timeout=timeout)
        if place.rank in members:
            _set_timeout(group, IDLE)
            ranks.control = group
    ranks.host_group = host_group(timeout)
    log.info("%d ranks: tp %d x dp %d, %s over %s", place.world, size, ranks.dp_size, backend, ranks.device.type)


def host_group(timeout: timedelta) -> ProcessGroup:
    """A further gloo group over all ranks, for a thread or a kind of message of its own; all ranks call it at once."""
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def _meet(place: Place, timeout: timedelta) -> Store:
    """The store through which the ranks find each other."""
    if place.meeting.startswith("file://"):
        store = torch.distributed.FileStore(place.meeting[len("file://") :], place.world)
        store.set_timeout(timeout)
        return store
    if place.meeting.startswith("tcp://") and place.rank == 0:
        log.info("waiting for the %d tasks of srun at %s", place.world, place.meeting)
    return next(iter(torch.distributed.rendezvous(place.meeting, place.rank, place.world, timeout=timeout)))[0]


def _why_not_met(place: Place, error: Exception) -> str:
    """One sentence for ranks that could not meet: where, why, and what to do."""
    where = place.meeting
    if where == "env://":
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return f"{where}: this port is in use by another job; set MASTER_PORT to a free one"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "start a script inside sbatch with srun" if where.startswith("tcp") else "check that all ranks started"
    return f"{where}: rank {place.rank} could not meet the {place.world} ranks of this job ({reason}); {remedy}"


def _backend(ranks: Ranks, store: Store) -> str:
    """nccl where every rank has a GPU of its own; gloo on CPUs, and where ranks share a GPU, which NCCL refuses."""
    mine = ranks.device.type
    if mine == "cuda":
        mine = f"{socket.gethostname()} {torch.cuda.get_device_properties(ranks.device).uuid}"
    store.set(f"accessory/device/{ranks.rank}", mine)
    devices = [store.get(f"accessory/device/{rank}").decode() for rank in range(ranks.world)]
    gpus = {name for name in devices if name != "cpu"}
    if gpus and "cpu" in devices:
        raise ValueError(f"device: got {', '.join(devices)}, expected cpu on all ranks or a GPU on all; pass --device")
    if 0 < len(gpus) < ranks.world and ranks.rank == 0:
        log.warning("%d ranks share %d GPU(s): slower than one rank per GPU, over gloo", ranks.world, len(gpus))
    return "nccl" if len(gpus) == ranks.world else "gloo"


def _share_cores() -> None:
    """Divide the host's cores among ranks that `launch` started; torchrun and srun set OMP_NUM_THREADS themselves."""
    if CREW in os.environ and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ[CREW])))


def _set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """Change a group's timeout: fairscale cannot be told one, and newer versions of torch renamed the call."""
    change = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout
    change(timeout, group)

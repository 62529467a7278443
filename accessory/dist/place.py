"""The place of this process in its job, as torchrun, srun or `launch` state it in the environment.

Must not know devices, groups or torch: it reads variables and says what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_PORT, _PORTS = 15000, 16384  # below Linux's ephemeral ports
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
CREW = "ACCESSORY_CREW"
"""Set in every rank that `launch` started, to how many there are on this host."""


@dataclass(frozen=True)
class Place:
    """Rank, world, and how the ranks meet: env:// (torchrun), tcp:// (srun) or file:// (`launch`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    meeting: str = "env://"
    one_host: bool = False


def read_place(env: Mapping[str, str]) -> Place:
    """The place that `env` describes; one lone process where it says nothing. ValueError where it contradicts itself.

    torchrun's variables count before SLURM's, since torchrun is itself often started by srun.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        place = _torchrun(env)
    elif "SLURM_PROCID" in env and ("SLURM_STEP_NUM_TASKS" in env or "SLURM_NTASKS" in env):
        place = _slurm(env)
    else:
        return Place()
    if place.rank >= place.world:
        raise ValueError(f"rank: got {place.rank} of {place.world}, expected less than the world; check the launcher")
    return place


def read_nproc(env: Mapping[str, str]) -> int | None:
    """The ranks that NPROC_PER_NODE asks for on this host; None where it says nothing, or gpu or auto as to torchrun.

    Raises ValueError for anything else than a number above 0.
    """
    told = env.get("NPROC_PER_NODE", "").strip()
    if told in ("", "gpu", "auto"):
        return None
    count = _number(env, "NPROC_PER_NODE")
    if count < 1:
        raise ValueError(f"NPROC_PER_NODE: got {told}, expected at least 1 rank; correct or unset it")
    return count


@dataclass(frozen=True)
class Nodes:
    """The hosts of a job whose ranks each host starts by itself."""

    count: int = 1
    number: int = 0
    """Of this host."""


def read_nodes(env: Mapping[str, str]) -> Nodes:
    """What NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say; one host where they say nothing.

    Raises ValueError where one of them is missing beside NNODES, or makes no sense.
    """
    count = _number(env, "NNODES", 1)
    if count <= 1:
        return Nodes()
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise ValueError(
                f"{name}: not set beside NNODES={count}, expected it on every host; set it"
            )
    number, port = _number(env, "NODE_RANK"), _number(env, "MASTER_PORT")
    if number >= count:
        raise ValueError(f"NODE_RANK: got {number} with NNODES={count}, expected 0 to {count - 1}; correct it")
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT: got {port}, expected 1 to 65535; correct it")
    return Nodes(count, number)


def _torchrun(env: Mapping[str, str]) -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR and MASTER_PORT or the file of `launch`."""
    store = env.get("ACCESSORY_STORE")
    alone = store is not None or env.get("WORLD_SIZE") == "1"
    for name in ("RANK", "WORLD_SIZE") if alone else ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            found = ", ".join(f"{key}={env[key]}" for key in _OURS if key in env)
            raise ValueError(f"{name}: not set, but {found} is; start with torchrun, or unset these for one process")
    rank = _number(env, "RANK")
    return Place(
        rank=rank,
        world=_number(env, "WORLD_SIZE"),
        local_rank=_number(env, "LOCAL_RANK", rank),
        meeting="env://" if store is None else f"file://{store}",
        one_host=store is not None or env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"],
    )


def _slurm(env: Mapping[str, str]) -> Place:
    """The task's number and its step's tasks. In a batch script outside srun only SLURM_NTASKS is there."""
    rank = _number(env, "SLURM_PROCID")
    return Place(
        rank=rank,
        world=_number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"),
        local_rank=_number(env, "SLURM_LOCALID", rank),
        meeting=f"tcp://{_slurm_host(env)}:{_slurm_port(env)}",
    )


def _slurm_host(env: Mapping[str, str]) -> str:
    """The host of rank 0: MASTER_ADDR, else the first of the step's hosts ("gpu[07-09,12]-ib,cpu1": gpu07-ib)."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not hosts:
        return env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+", hosts)
    if first is None:
        raise ValueError(f"SLURM_JOB_NODELIST: got {hosts!r}, expected host names; set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _slurm_port(env: Mapping[str, str]) -> int:
    """MASTER_PORT, else one that every rank derives from job and step."""
    if "MASTER_PORT" in env:
        return _number(env, "MASTER_PORT")
    job, step = (_number(env, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST_PORT + (31 * job + step) % _PORTS


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number from the environment."""
    if default is not None and name not in env:
        return default
    if not re.fullmatch(r"\d+", env[name].strip(), re.ASCII):
        raise ValueError(f"{name}: got {env[name]!r}, expected a whole number; correct or unset it")
    return int(env[name])

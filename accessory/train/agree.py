"""What all ranks must know before they go on, agreed over the hosts' CPUs: one small sum per step.

Must not know what the numbers mean to a model; no device is touched, so nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed import ProcessGroup

from accessory.dist import Ranks

T = TypeVar("T")


def total(values: Sequence[float], group: ProcessGroup | None) -> list[float]:
    """The sums of numbers over all ranks, exact for whole numbers; the values themselves where there is one rank."""
    if group is None:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    torch_dist.all_reduce(tensor, group=group)
    return tensor.tolist()


def gather(value: Any, group: ProcessGroup | None) -> list[Any]:
    """One object of every rank, on every rank."""
    if group is None:
        return [value]
    everyone: list[Any] = [None] * torch_dist.get_world_size(group)
    torch_dist.all_gather_object(everyone, value, group=group)
    return everyone


def share(value: T, group: ProcessGroup | None) -> T:
    """Rank 0's object, on every rank."""
    if group is None:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def first_alone(make: Callable[[], T], ranks: Ranks, group: ProcessGroup | None) -> T:
    """make() on the first rank of every host, then on the others, which find what it left on the disk.

    `group` should be patient: making may take hours, while a rank that dies is noticed at once.
    """
    made = make() if ranks.local_rank == 0 else None
    if group is not None:
        torch_dist.barrier(group=group)
    return make() if made is None else made

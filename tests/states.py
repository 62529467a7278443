"""Small states of training runs, in full and as ranks hold them, and disks to write them to; helpers of the tests.

Must not know a model: the tensors are a few numbers under names.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from accessory.checkpoint.boxes import Box, Piece, read_boxes
from accessory.checkpoint.operate import same_bits
from accessory.dist import Ranks, Shard
from accessory.dist.ranks import host_group
from accessory.train.resume import checkpoints

ALONE = Ranks(0, 1, 0, Shard(), 0, 1, torch.device("cpu"))
# name -> (shape, dim that tensor parallelism cuts); 33 and 5 are even for nobody
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "model/tok_embeddings.weight": ((33, 6), 1),
    "model/output.weight": ((33, 6), 0),
    "model/norm.weight": ((5,), None),
    "optimizer/exp_avg/output.weight": ((33, 6), 0),
    "optimizer/step": ((), None),
}


def values(step: int) -> dict[str, Tensor]:
    """Every tensor of a state, in full."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}


def pieces_of(tensors: dict[str, Tensor]) -> dict[str, Piece]:
    """One rank that holds everything."""
    return {name: Piece(Box.whole(tensor.shape), tensor) for name, tensor in tensors.items()}


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, in full."""
    return dict(read_boxes(folder, {name: Box.whole(shape) for name, (shape, _) in SHAPES.items()}))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit by bit."""
    return set(one) == set(other) and all(same_bits(one[name], other[name]) for name in one)


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return [step for step, _ in checkpoints(folder)]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs; skips where mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def local(ranks: Ranks, step: int) -> dict[str, Piece]:
    """What a rank of a tensor-parallel x FSDP run holds of a state: dim 0 of its cut in runs of ceil(n / dp)."""
    pieces = {}
    for name, tensor in values(step).items():
        box, dim = Box.whole(tensor.shape), SHAPES[name][1]
        if dim is not None:
            size = -(-tensor.shape[dim] // ranks.shard.size)
            box = box.rows(ranks.shard.rank * size, (ranks.shard.rank + 1) * size, dim=dim)
        if tensor.dim():
            size = -(-box.size[0] // ranks.dp_size)
            box = box.rows(ranks.dp_rank * size, (ranks.dp_rank + 1) * size)
        mine = (dim is not None or ranks.leader) and (tensor.dim() > 0 or ranks.dp_rank == 0)
        pieces[name] = Piece(box, tensor[box.inside(Box.whole(tensor.shape))].clone(), mine)
    return pieces


def group_of(ranks: Ranks) -> ProcessGroup | None:
    """A group for the saver's threads."""
    return host_group(timedelta(seconds=60)) if ranks.world > 1 else None


def in_a_process(code: str, *args: str) -> str:
    """What a script of its own prints, which may import the tests' modules and may fork; AssertionError if it fails."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Run a function on n gloo ranks, in fresh processes that meet through a file; helper of the parity tests.

Must not know what the function does. The processes come from a fork server that has imported torch once: a fork of
pytest itself would inherit used autograd and OpenMP threads, a spawn would import torch again on every rank.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "fairscale.nn.model_parallel.initialize",
        "fairscale.nn.model_parallel.layers",
        "timm",
        "pytest",
    ]
)


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, tp: int | None = None, timeout: float = 120.0) -> list[Any]:
    """Call fn(ranks, *args) on n CPU ranks (tp = n unless said otherwise); return the picklable results by rank.

    `fn` is a module-level function of a test module; import slow peers (transformers) inside the tests and not at the
    top of that module, since every rank imports it. The first rank that raises fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(n):
            ours, theirs = _context.Pipe(duplex=False)
            job = pickle.dumps((fn, args))  # plain bytes: tensors must outlive the process that sends them
            process = _context.Process(
                target=_rank_main, args=(theirs, job, rank, n, tp, f"{folder}/store", timeout), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], processes: list[Any], deadline: float) -> list[Any]:
    """One result per rank, or an AssertionError with the traceback of the rank that failed first."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {[r for r in range(len(pipes)) if r not in results]} did not answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not ok:
                raise AssertionError(f"rank {rank} of {len(pipes)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(pipe: Any, job: bytes, rank: int, n: int, tp: int | None, store: str, timeout: float) -> None:
    """The life of one rank: join, work, report, leave together."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), ACCESSORY_STORE=store)
    try:
        import torch

        torch.set_num_threads(1)
        from accessory import dist

        fn, args = pickle.loads(job)
        ranks = dist.init(tp=tp, device="cpu", timeout=timeout)
        answer = (True, fn(ranks, *args))
        if n > 1:
            torch.distributed.barrier()  # a rank that leaves early would break a slower one's last collective
        dist.close()
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()

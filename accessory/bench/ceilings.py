"""What the machine can do at best: bytes read per second, bf16 multiply-adds per second.

Must not know models.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from accessory.native import widen, zeros

READ_BYTES = 2 << 30
SIDE = 4096


class Ceilings:
    """Memory read and bf16 matmul of one device, to be measured again and again beside what is compared with them.

    The memory of shared machines is twice as fast at one minute as at another, so a ceiling counts for its own round.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._numbers = zeros([READ_BYTES // 4], dtype=torch.float32, device=device).fill_(0.5)
        widen(self._numbers)  # as our weights are
        self._matrix = torch.randn(SIDE, SIDE, device=device).bfloat16()

    def memory_read(self, times: int = 5) -> float:
        """Bytes per second: the best of `times` fp32 sums over 2 GiB."""
        return READ_BYTES / min(timed(self._numbers.sum, self.device) for _ in range(times))

    def matmul(self, times: int = 5) -> float:
        """Floating-point operations per second: the best of `times` bf16 products of 4096 x 4096 matrices."""
        return 2 * SIDE**3 / min(timed(lambda: self._matrix @ self._matrix, self.device) for _ in range(times))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, its kernels included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

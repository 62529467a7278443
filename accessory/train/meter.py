"""How fast and how large a run is: tokens per second, the share of the devices' peak (MFU), memory, time left.

Must not know losses, files or screens. Time comes from a monotonic clock: setting the wall clock changes nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from accessory.model import Llama
from accessory.peft import part_of
from accessory.vision import build_vision

# dense bf16 TFLOP/s of one device, from the makers' data sheets; the first pattern that is found counts
PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500),
    (r"\bB200\b", 2250),
    (r"\bB100\b", 1750),
    (r"\bH100\b.*\bPCIe\b", 756),
    (r"\bH100\b.*\bNVL\b", 835),
    (r"\b(H100|H200|H800|GH200)\b", 989.4),
    (r"\bH20\b", 148),
    (r"\b(A100|A800)\b", 312),
    (r"\bA30\b", 165),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125),
    (r"\bA10G\b", 70),
    (r"\bL40S\b", 362),
    (r"\bL40\b", 181),
    (r"\bL4\b", 121),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71),
    (r"\bMI300X\b", 1307.4),
)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training, forward and backward: of one token, and of one picture beside its rows."""

    token: float
    picture: float = 0.0


def count_flops(model: Llama, trained: Collection[str], *, length: float) -> Flops:
    """What training the parameters `trained` of a model costs, all ranks together; names as in the state dict.

    Of a token: 2 N forward over the N parameters it is multiplied with (the seven linears, LoRA's factors, the head;
    not the embedding), 2 N' for gradients by inputs, N' counting the layers from the first trained one on, and 2 per
    trained parameter for its own gradient: 6 N for full training, 4 x frozen + 6 x trained for LoRA. Attention adds
    2 x layers x dim x length forward, causal (half of the keys), and twice that backward. What activation
    checkpointing computes again is not counted: this is for MFU, not HFU.
    length: positions that a token's own row has on average; documents, where they are packed.
    """
    low = _first_trained(model, trained)
    total = 0.0
    for name, linear in model.linears().items():
        back = int(name.split(".")[1]) >= low
        sizes = {f"{name}.weight": prod(linear.cuts["weight"].shape)}
        for factor in ("lora_a", "lora_b"):
            if hasattr(linear, factor):
                sizes[f"{name}.{factor}.weight"] = prod(getattr(linear, factor).cuts["weight"].shape)
        for key, size in sizes.items():
            total += 2.0 * size * (1 + back + (key in trained))
    head = prod(model.output.slice.shape)
    tied = "tok_embeddings.weight" if model.config.tied else "output.weight"
    total += 2.0 * head * (1 + (low <= model.config.n_layers) + (tied in trained))
    layers, width = model.config.n_layers, model.config.dim
    total += 2.0 * width * length * (layers + 2 * max(0, layers - low))
    return Flops(total, _picture_flops(model, trained))


def _first_trained(model: Llama, trained: Collection[str]) -> int:
    """The first layer that gradients reach: 0 from embedding or pictures, n_layers from the last norm, then none."""
    layers = [int(name.split(".")[1]) for name in trained if name.startswith("layers.")]
    if any(name.startswith(("vision.", "tok_embeddings.")) for name in trained):
        return 0
    if "prefix" in trained or "prefix_gate" in trained:
        layers.append(model.prompt.first)
    rest = model.config.n_layers if "norm.weight" in trained else model.config.n_layers + 1
    return min(layers, default=rest)


def _picture_flops(model: Llama, trained: Collection[str]) -> float:
    """The vision part on one picture, counted on the meta device: x 3 where weights train, x 2 where gradients pass."""
    vision = getattr(model, "vision", None)
    if vision is None:
        return 0.0
    copy = build_vision(vision.config, model.config.dim).requires_grad_(False)
    side = vision.config.image_size
    pixels = torch.empty(1, 3, side, side, device="meta")
    whole, tower = _counted(lambda: copy(pixels)), _counted(lambda: copy.tokens(pixels))
    names = {part: [name for name in trained if part_of(name) == part] for part in ("vision", "projector")}
    back = {part: bool(own) + any(".lora_" not in name for name in own) for part, own in names.items()}
    projector = max(back["projector"], bool(names["vision"]))
    return tower * (1 + back["vision"]) + (whole - tower) * (1 + projector)


def _counted(run: Callable[[], object]) -> float:
    """The operations of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most operations per second of a device in 16 bits, dense; None for other dtypes and unknown devices."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The same by the device's name; a slice of a GPU (MIG) has no peak that anyone states."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((1e12 * peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use: of a GPU by torch's tensors, elsewhere of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:  # ru_maxrss is inherited from the parent process through exec, VmHWM is not
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Meter:
    """Speed over the last `window` steps; evaluation and other pauses count for the time left, not for the speed.

    MFU = (tokens/s x flops.token + pictures/s x flops.picture) / (world x peak).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        flops: Flops | None = None,
        peak: float | None = None,
        world: int = 1,
        window: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """flops and peak (of one device, per second): None where they are not known, which leaves MFU out."""
        self._device, self._flops, self._clock = device, flops, clock
        self._peak = None if peak is None else peak * world
        self._began = clock()
        self._paused = 0.0
        self._steps = 0
        self._marks: deque[tuple[float, int, int]] = deque([(0.0, 0, 0)], maxlen=window + 1)

    def step(self, tokens: int, pictures: int = 0) -> None:
        """A step of so many tokens and pictures, of all ranks, has just ended."""
        _, before, seen = self._marks[-1]
        self._marks.append((self.seconds - self._paused, before + tokens, seen + pictures))
        self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done meanwhile is no training."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return self._clock() - self._began

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks; None before the first step."""
        return self._rate(1)

    @property
    def mfu(self) -> float | None:
        """0 to 1; None where flops or peak are not known."""
        rate = self._rate(1)
        if self._flops is None or self._peak is None or rate is None:
            return None
        return (rate * self._flops.token + (self._rate(2) or 0.0) * self._flops.picture) / self._peak

    @property
    def memory_gb(self) -> float:
        """Peak memory of this rank in GB of 1e9 bytes."""
        return peak_memory(self._device) / 1e9

    def flops(self, tokens: int, pictures: int = 0) -> float | None:
        """Operations of so much work."""
        return None if self._flops is None else tokens * self._flops.token + pictures * self._flops.picture

    def left(self, steps: int) -> float | None:
        """Seconds that so many further steps will take, pauses included, at the mean pace so far."""
        return None if not self._steps else self.seconds / self._steps * steps

    def _rate(self, column: int) -> float | None:
        """Per second of training, over the window."""
        first, last = self._marks[0], self._marks[-1]
        spent = last[0] - first[0]
        return None if spent <= 0 else (last[column] - first[column]) / spent

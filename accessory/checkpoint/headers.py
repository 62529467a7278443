"""Headers of safetensors files: names, shapes, dtypes and offsets, read with suspicion and written for streaming.

Must not know what the names mean, nor which files belong together.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

MAX_HEADER = 100 << 20  # bytes, the format's own limit
DATA_ALIGN = 64  # the first tensor starts on a cache line; the others follow by falling item size

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds: specs and byte offsets (from the start of the file) by name."""

    specs: dict[str, Spec]
    offsets: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is touched.

    Raises ValueError naming the file for a truncated file, trailing bytes, and a header that is too long, not JSON, has
    duplicate names, unknown dtypes, negative or overlapping ranges, or bytes that belong to no tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > size - 8:
            raise ValueError(
                f"{path}: truncated or not a safetensors file ({size} bytes, its header alone should take"
                f" {8 + length}); fetch or write it again"
            )
        if length > MAX_HEADER:
            raise ValueError(f"{path}: its header claims {length} bytes, the format allows {MAX_HEADER}; do not use it")
        text = file.read(length)
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is not valid ({_line(error)}); fetch or write the file again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: its header is a {type(table).__name__}, expected an object; write the file again")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ of its header is not a map of strings; fetch or write the file again")
    specs, spans = {}, {}
    for name, entry in table.items():
        specs[name], spans[name] = _entry(path, name, entry)
    _check_cover(path, spans, size - 8 - length)
    return Header(specs, {name: 8 + length + begin for name, (begin, _) in spans.items()}, metadata)


def lay_out(specs: Mapping[str, Spec], metadata: Mapping[str, str], *, room: int = 0) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a safetensors file (length, header, padding) and where each tensor's bytes go.

    Tensors follow each other by falling item size, so that each is aligned to its own; `room` pads the header further.
    """
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)  # stable: otherwise the order given
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in order:
        spec = specs[name]
        if spec.dtype not in CODES:
            raise ValueError(f"{name}: dtype {spec.dtype} cannot be stored, expected one of {', '.join(DTYPES)}")
        offsets[name], end = end, end + spec.nbytes
        table[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    start = max(-(-(8 + len(text)) // DATA_ALIGN) * DATA_ALIGN, room)
    text = text.ljust(start - 8)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file; a single call may stop short."""
    while data:
        done = os.pwrite(handle, data[: 1 << 30], offset)
        data, offset = data[done:], offset + done


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous already."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refusing a name that comes twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} comes twice")
    return table


def _entry(path: Path, name: str, entry: Any) -> tuple[Spec, tuple[int, int]]:
    """Spec and byte range of one entry of the header."""

    def numbers(field: str, count: int | None = None) -> list[int]:
        value = entry.get(field) if isinstance(entry, dict) else None
        sane = isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
        if not sane or (count is not None and len(value) != count):
            raise ValueError(f"{path}: {name}: {field} is {value!r}, expected whole numbers; write the file again")
        return value

    shape, (begin, end) = tuple(numbers("shape")), numbers("data_offsets", 2)
    code = entry.get("dtype")
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{path}: {name}: dtype {code!r} is not one of {', '.join(DTYPES)}; convert it")
    spec = Spec(shape, DTYPES[code])
    if end - begin != spec.nbytes:
        raise ValueError(
            f"{path}: {name}: its bytes {begin} to {end} do not hold {code} of shape {shape}"
            f" ({spec.nbytes} bytes); fetch or write the file again"
        )
    return spec, (begin, end)


def _check_cover(path: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Check that the ranges follow each other without hole or overlap and end where the file ends."""
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            fault = "overlaps the one before it" if begin < reached else f"leaves {begin - reached} bytes unused"
            raise ValueError(f"{path}: {name}: its byte range {fault}; fetch or write the file again")
        reached = end
    if reached != size:
        gap = abs(reached - size)
        fault = f"truncated, {gap} bytes are missing" if reached > size else f"{gap} bytes too long"
        raise ValueError(f"{path}: {fault} ({reached} bytes of tensors promised, {size} there); fetch it again")


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

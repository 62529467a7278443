"""Tokenised rows in one memory-mapped file: the cache of the pass over the data, and the `packed` files of our tool.

Must not know where rows came from. The file is a safetensors file: any reader of these can open it.

ids u16 or u32 [positions]; starts i64 [documents + 1]; rows i64 [rows + 1] (documents of each row; absent: one each);
learn u8 [positions] (whether a token is learned; absent: all); targets i32 [rows]; files i32, numbers and places i64
[rows] (where each row came from); pictures i64 [rows + 1] (its pictures), slots i32 [pictures] (position of the first
slot of each), widths and heights i32 [pictures] (absent: these decide nothing), names u8 and name_ends i64 [pictures]
(their paths).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = "accessory-rows-1"
BLOCK = 4 << 20
_DTYPES = {"I64": np.int64, "U32": np.uint32, "I32": np.int32, "U16": np.uint16, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def ids_dtype(vocabulary: int) -> type[np.generic]:
    """The smallest type that ids of this many tokens fit in."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class Store:
    """Arrays of a file, mapped and not read, and what its writer said."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    def __len__(self) -> int:
        bounds = self.arrays.get("rows", self.arrays["starts"])
        return len(bounds) - 1

    @property
    def sha256(self) -> str:
        """Of all bytes behind the header, as its writer said."""
        return self.metadata["sha256"]

    def bounds(self) -> np.ndarray:
        """Positions at which rows begin, and the end: int64 [rows + 1]."""
        starts = self.arrays["starts"]
        return starts[self.arrays["rows"]] if "rows" in self.arrays else starts

    def documents(self, row: int) -> np.ndarray:
        """Positions, within the row, at which its documents begin."""
        starts = self.arrays["starts"]
        if "rows" not in self.arrays:
            return np.zeros(1, np.int64)
        first, last = self.arrays["rows"][row : row + 2]
        return starts[first:last] - starts[first]

    def sizes(self, row: int | None = None) -> list[tuple[int, int]]:
        """Width and height of the row's pictures, or of all; (1, 1) where they decide nothing."""
        if "pictures" not in self.arrays:
            return []
        ends = self.arrays["pictures"]
        first, last = (0, int(ends[-1])) if row is None else (int(at) for at in ends[row : row + 2])
        if "widths" not in self.arrays:
            return [(1, 1)] * (last - first)
        widths, heights = (self.arrays[name][first:last].tolist() for name in ("widths", "heights"))
        return list(zip(widths, heights, strict=True))

    def names(self, row: int) -> list[str]:
        """Paths of the row's pictures."""
        if "pictures" not in self.arrays:
            return []
        first, last = (int(at) for at in self.arrays["pictures"][row : row + 2])
        ends = self.arrays["name_ends"]
        begins = [0 if number == 0 else int(ends[number - 1]) for number in range(first, last)]
        return [
            bytes(self.arrays["names"][begin : int(end)]).decode("utf-8", "surrogateescape")
            for begin, end in zip(begins, ends[first:last], strict=True)
        ]


def open_store(path: Path, *, verify: bool) -> Store:
    """Map a file. verify: read it all and compare with its SHA-256.

    Raises ValueError for what is no such file, is cut short or changed, and OSError where it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 64 << 20):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']}")
            arrays = _map(path, header, 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: is no file of rows ({error}); write it again with tools/generate_packed_data.py"
            ) from error
        if verify and _sum(file) != metadata["sha256"]:
            raise ValueError(f"{path}: its bytes are not those that were written (SHA-256 differs); write it again")
    store = Store(path, arrays, metadata)
    positions = int(arrays["starts"][-1])
    if positions != len(arrays["ids"]) or ("rows" in arrays and int(arrays["rows"][-1]) != len(arrays["starts"]) - 1):
        raise ValueError(f"{path}: its rows end at {positions}, its tokens at {len(arrays['ids'])}; write it again")
    return store


def _map(path: Path, header: dict[str, Any], offset: int, size: int) -> dict[str, np.ndarray]:
    """The arrays of a header, each inside of the file."""
    whole = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays, end = {}, offset
    for name, entry in header.items():
        begin, stop = (offset + int(at) for at in entry["data_offsets"])
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        (count,) = entry["shape"]
        if not offset <= begin <= stop <= size or stop - begin != count * dtype.itemsize:
            raise ValueError(f"{name} lies outside of it")
        arrays[name] = whole[begin:stop].view(dtype)
        end = max(end, stop)
    if end != size:
        raise ValueError(f"it has {size} bytes and should have {end}")
    for name in ("ids", "starts"):
        if name not in arrays:
            raise ValueError(f"it has no {name}")
    return arrays


def _sum(file: BinaryIO) -> str:
    """SHA-256 of the rest of a file."""
    total = hashlib.sha256()
    while block := file.read(BLOCK):
        total.update(block)
    return total.hexdigest()


class StoreWriter:
    """Gathers arrays piece by piece in a folder of its own, then writes them as one file, whole or not at all."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, Any] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add to the end of an array; its first piece decides the type."""
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb")
            self._dtypes[name], self._counts[name] = values.dtype, 0
            self._sums[name] = hashlib.sha256()
        assert values.dtype == self._dtypes[name], (name, values.dtype, self._dtypes[name])
        data = np.ascontiguousarray(values).data
        self._files[name].write(data)
        self._sums[name].update(data)
        self._counts[name] += len(values)

    def digest(self, *names: str) -> str:
        """SHA-256 over the named arrays, as far as they were given."""
        sums = {name: self._sums[name].hexdigest() for name in names if name in self._sums}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def drop(self, *names: str) -> None:
        """Forget arrays."""
        for name in names:
            if name in self._files:
                self._files.pop(name).close()
                (self.folder / name).unlink()

    def finish(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write all arrays, widest type first so that each is aligned, and put the file in its place."""
        for file in self._files.values():
            file.close()
        names = sorted(self._files, key=lambda name: (-self._dtypes[name].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {**metadata, "format": FORMAT, "sha256": "0" * 64}}
        offset = 0
        for name in names:
            end = offset + self._counts[name] * self._dtypes[name].itemsize
            shape, dtype = [self._counts[name]], _NAMES[self._dtypes[name]]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        temporary = self.folder / "whole"
        total = hashlib.sha256()
        with temporary.open("wb") as out:
            out.write(_header(header))
            for name in names:
                with (self.folder / name).open("rb") as part:
                    while block := part.read(BLOCK):
                        total.update(block)
                        out.write(block)
            header["__metadata__"]["sha256"] = total.hexdigest()
            out.seek(0)
            out.write(_header(header))
            out.flush()
            os.fsync(out.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
        self.discard()

    def discard(self) -> None:
        """Remove what was gathered."""
        for name, file in self._files.items():
            with contextlib.suppress(OSError):  # a full disk refuses what is still to be written
                file.close()
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "whole").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _header(content: dict[str, Any]) -> bytes:
    """A safetensors header; its length depends on nothing but names and numbers."""
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

"""Files of weights written tensor by tensor, in any order, with the memory of one tensor.

Must not know what the tensors are, nor that other files belong to this one.
"""

from __future__ import annotations

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.headers import DATA_ALIGN, Spec, bytes_of, lay_out, write_at

WRITER = "accessory"  # in safetensors metadata and in meta.json: this folder is ours and has a manifest
METADATA = {"format": "pt", "writer": WRITER}
_LOCAL, _CENTRAL = struct.Struct("<26xHH"), struct.Struct("<16xI8xHHH12x")  # of zip: lengths; CRC and lengths


class SafetensorsWriter:
    """A safetensors file of known tensors: the header goes first, each tensor then to its place."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] = METADATA) -> None:
        """Write the header."""
        start, self._offsets = lay_out(specs, metadata)
        ends = [self._offsets[name] + spec.nbytes for name, spec in specs.items()]
        self._file = open(path, "wb", buffering=0)
        write_at(self._file.fileno(), memoryview(start), 0)
        os.truncate(self._file.fileno(), max(ends, default=len(start)))

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's bytes into its place."""
        write_at(self._file.fileno(), bytes_of(tensor), self._offsets[name])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    abandon = close


class GrowingWriter:
    """A safetensors file of tensors of one item size, counted only at its end: the header comes last, into its room."""

    def __init__(self, path: Path, *, room: int) -> None:
        """`room`: bytes that the header will surely not exceed."""
        self._file = open(path, "wb", buffering=0)
        self._room = -(-room // DATA_ALIGN) * DATA_ALIGN
        self._specs: dict[str, Spec] = {}
        self._end = self._room

    def put(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        self._specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        write_at(self._file.fileno(), bytes_of(tensor), self._end)
        self._end += tensor.nbytes

    def close(self) -> None:
        """Write the header and close the file."""
        start, _ = lay_out(self._specs, METADATA, room=self._room)
        assert len(start) == self._room, f"a header of {len(start)} bytes does not fit its room of {self._room}"
        write_at(self._file.fileno(), memoryview(start), 0)
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


class PthWriter:
    """A torch file of {"model": {...}}: torch.save lays it out from shapes alone, with holes that `put` fills."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], *, flat: bool = False) -> None:
        """Lay the file out; flat: the tensors without "model" around them. OSError when there is no room for it."""
        self.path = path
        # never touched, so this is address space and no memory
        model = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        try:
            with torch.serialization.skip_data():
                torch.save(model if flat else {"model": model}, path)
        except RuntimeError as error:
            raise OSError(errno.ENOSPC, f"torch.save: {str(error).splitlines()[0]}") from error
        with zipfile.ZipFile(path) as archive:
            found = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            self._directory = archive.start_dir
        self._file = open(path, "r+b", buffering=0)
        self._records = {}
        for index, name in enumerate(specs):  # torch numbers storages in the order in which it pickles them
            info = found[f"data/{index}"]
            assert info.file_size == specs[name].nbytes, f"{name}: record of {info.file_size} bytes, not {specs[name]}"
            header = os.pread(self._file.fileno(), 30, info.header_offset)
            start = info.header_offset + 30 + sum(_LOCAL.unpack(header))
            self._records[name] = (info.filename, info.header_offset, start, info.file_size)
        self._sums: dict[str, int] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's bytes into its place."""
        filename, header, start, size = self._records[name]
        data = bytes_of(tensor)
        assert len(data) == size, f"{name}: got {len(data)} bytes for a record of {size}"
        self._sums[filename] = zlib.crc32(data)
        write_at(self._file.fileno(), data, start)
        after = os.pread(self._file.fileno(), 4, start + size)
        where = start + size + 4 if after == b"PK\x07\x08" else header + 14
        os.pwrite(self._file.fileno(), struct.pack("<I", self._sums[filename]), where)

    def close(self) -> None:
        """Enter the checksums into the archive's directory, which torch.save wrote with zeros, and close the file."""
        handle, at = self._file.fileno(), self._directory
        while os.pread(handle, 4, at) == b"PK\x01\x02":
            _, name, extra, comment = _CENTRAL.unpack(os.pread(handle, _CENTRAL.size, at))
            filename = os.pread(handle, name, at + 46).decode()
            if filename in self._sums:
                os.pwrite(handle, struct.pack("<I", self._sums[filename]), at + 16)
            at += 46 + name + extra + comment
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

"""One rank's state file in the host's memory, byte by byte as it will lie on the disk, used again for every save.

Must not know what the tensors are, nor the files of other ranks.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.boxes import Piece, describe
from accessory.checkpoint.headers import Spec, lay_out, write_at
from accessory.checkpoint.manifest import Entry
from accessory.checkpoint.streams import METADATA

log = logging.getLogger(__name__)

Form = tuple[dict[str, Spec], dict[str, str]]  # specs, and the metadata that says which boxes they are
BLOCK = 8 << 20  # bytes that are written and hashed at a time, without the interpreter's lock


class Staging:
    """Tensors are copied in by `fill`, after which they may change; `write` puts the bytes into a file, in any thread.

    Where tensors come from a GPU the memory is registered with it, so that copies run at the bus's speed.
    """

    def __init__(self) -> None:
        """Take no memory yet."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}
        self._form: Form | None = None
        self._registered = False

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._bytes.numel()

    def fill(self, pieces: Mapping[str, Piece]) -> None:
        """Copy the pieces, and wait for the copies alone; the memory is taken once and kept for the next ones."""
        for name, piece in pieces.items():
            got = tuple(piece.tensor.shape)
            assert got == piece.box.size, f"{name}: a tensor of {got} for the box {piece.box}"
        form = ({name: Spec(piece.box.size, piece.tensor.dtype) for name, piece in pieces.items()}, describe(pieces))
        if form != self._form:
            self._take(form, register=any(piece.tensor.is_cuda for piece in pieces.values()))
        for name, piece in pieces.items():
            self._views[name].copy_(piece.tensor.detach(), non_blocking=True)
        for device in {piece.tensor.device for piece in pieces.values() if piece.tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def write(self, path: Path) -> Entry:
        """Write a new file, flush it to the disk, and return its size and SHA-256."""
        digest, content = hashlib.sha256(), memoryview(self._bytes.numpy())
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for start in range(0, len(content), BLOCK):
                block = content[start : start + BLOCK]
                write_at(handle, block, start)
                digest.update(block)
            os.fsync(handle)
        finally:
            os.close(handle)
        return Entry(len(content), digest.hexdigest())

    def free(self) -> None:
        """Give the memory back."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes, self._views, self._form, self._registered = self._bytes[:0].clone(), {}, None, False

    def _take(self, form: Form, *, register: bool) -> None:
        """Lay the file out in memory."""
        self.free()
        specs, boxes = form
        head, offsets = lay_out(specs, {**METADATA, **boxes})
        nbytes = max((offsets[name] + spec.nbytes for name, spec in specs.items()), default=len(head))
        self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        self._bytes[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        for name, spec in specs.items():
            part = self._bytes[offsets[name] : offsets[name] + spec.nbytes]
            self._views[name] = part.view(spec.dtype).view(spec.shape)
        if register:
            # not pin_memory: torch's allocator takes up to twice as much, the next power of two
            self._registered = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), nbytes, 0)) == 0
            if not self._registered:
                log.warning("%d bytes of host memory could not be pinned: copies for checkpoints take longer", nbytes)
        self._form = form

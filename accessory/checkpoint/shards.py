"""One file of weights, opened without reading it: specs by name, and views of the bytes on disk.

Must not know which tensor is which, nor cuts, nor which files belong together.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accessory.checkpoint.headers import Spec, read_header

log = logging.getLogger(__name__)

RELEASE_AFTER = 256 << 20  # bytes looked at before the mapping is dropped, so that touched pages do not pile up


class ShardFile:
    """A `.safetensors` or `.pth` file; `rows` gives views of its mapped bytes, which the caller copies at once."""

    def __init__(self, path: Path) -> None:
        """Read names, shapes and dtypes. ValueError, naming the file, when it is damaged or holds other things."""
        self.path = path
        self.metadata: dict[str, str] = {}
        self._open: Any = None
        self._seen = 0
        try:
            if path.suffix == ".safetensors":
                header = read_header(path)
                self.specs, self.metadata = header.specs, header.metadata
            else:
                tensors = load_pth(path)
                self.specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error}); fetch or link it again") from error

    def rows(self, name: str, *, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Rows [start, stop) of `dim` of a tensor, all of it when dim is None: a view of the file's bytes."""
        spec = self.specs[name]
        whole = max(spec.shape[dim], 1) if dim is not None else 1
        self._seen += spec.nbytes * (stop - start if dim is not None else 1) // whole
        if self._seen > RELEASE_AFTER:
            self.release()
        if self.path.suffix != ".safetensors":
            self._open = load_pth(self.path) if self._open is None else self._open
            tensor = self._open[name]
            return tensor if dim is None else tensor.narrow(dim, start, stop - start)
        try:
            self._open = safe_open(self.path, framework="pt") if self._open is None else self._open
            if dim is None or not spec.numel:
                tensor = self._open.get_tensor(name)
                return tensor if dim is None else tensor.narrow(dim, start, stop - start)
            return self._open.get_slice(name)[(*[slice(None)] * dim, slice(start, stop))]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: {name}: cannot be read ({error}); fetch or write the file again") from error

    def release(self) -> None:
        """Forget the mapping; the next read opens the file again."""
        self._open, self._seen = None, 0


def load_pth(path: Path) -> Mapping[str, Tensor]:
    """Map the tensors of a torch file, {"model": {...}} or flat, without reading them and without running a pickle.

    A file of torch before 1.6 is no zip and cannot be mapped: it is read whole, still as plain tensors only. Raises
    ValueError naming the file when it is truncated or damaged, or holds anything but tensors; there is no other way in.
    """
    mapped = zipfile.is_zipfile(path)
    if not mapped:
        _check_old_form(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects besides tensors{_culprit(error)}, which could run code and are never loaded;"
            " where you trust it, load it there with torch and save a plain dict of its tensors as safetensors"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, AssertionError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged or truncated ({reason}); fetch or write it again") from error
    tensors = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path}: holds a {type(tensors).__name__}, expected a dict of tensors; convert it first")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {name}: is a {kind}, expected a plain tensor; keep the model's weights only")
    return tensors


def _check_old_form(path: Path) -> None:
    """Say what a file that is no zip archive is, or that it will be read whole."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        raise ValueError(
            f"{path}: truncated ({path.stat().st_size} bytes, the end is missing); fetch or write it again"
        )
    if start[:1] != b"\x80":
        raise ValueError(f"{path}: not a torch file ({path.stat().st_size} bytes); fetch or write it again")
    log.warning("%s is in the form of torch before 1.6, which cannot be mapped: it is read whole into memory", path)


def _culprit(error: pickle.UnpicklingError) -> str:
    """The Python name that torch refused, where its message tells it."""
    found = re.search(r"GLOBAL ([\w.]+\.[\w]+)", str(error))
    return f" ({found[1]})" if found else ""

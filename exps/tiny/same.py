"""Compares the weights of two folders bit by bit; exit status 1 where they differ."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of one or more files."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def main() -> int:
    """Compare names, types, shapes and bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs=2)
    one, other = (tensors(folder) for folder in parser.parse_args().folder)
    if not one or one.keys() != other.keys():
        print(f"{len(one)} tensors and {len(other)}, {len(one.keys() ^ other.keys())} of them in one folder only")
        return 1
    differ = [
        name
        for name, tensor in one.items()
        if tensor.dtype != other[name].dtype
        or tensor.shape != other[name].shape
        or not torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
    ]
    print(f"{len(one)} tensors, {len(differ)} differ{': ' + ', '.join(differ[:5]) if differ else ''}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())

"""The checkpoint of a training run as a folder of weights: what was trained, under canonical names, joined from boxes.

Must not know an optimiser, whose state lies in the same files and is passed over here, nor the folders before this one.
"""

from __future__ import annotations

from torch import Tensor

from accessory.checkpoint.boxes import Box, StateFiles
from accessory.checkpoint.files import Folder, check_written, few
from accessory.checkpoint.headers import Spec
from accessory.checkpoint.reshard import Join, Shape
from accessory.dist import Cut

MODEL = "model/"  # stands before the canonical names of weights in state files


class TrainingSource:
    """One opened checkpoint with the surface of `Source`: weights as stored (fp32 masters), at any cut."""

    is_delta = False

    def __init__(self, folder: Folder) -> None:
        """Read the headers. Raises ValueError for damage and for a checkpoint that was not written to its end."""
        self.folder = folder
        check_written(folder, ours=True)
        self._files = StateFiles(folder.shards)
        specs = self._files.specs
        self.stored: dict[str, Spec] = {n.removeprefix(MODEL): s for n, s in specs.items() if n.startswith(MODEL)}
        self.state: dict[str, Spec] = {name: spec for name, spec in specs.items() if not name.startswith(MODEL)}
        """What is no weight: the optimiser's state."""
        self.discarded: list[str] = []
        self.restores: dict[str, object] = {}

    def find(self, key: str, full: Shape) -> Join | None:
        """How a tensor whose full shape is known is stored: as one; None where it has another shape or is not whole."""
        return self.guess(key) if self.stored[key].shape == full else None

    def guess(self, key: str) -> Join | None:
        """The tensor's full shape; None where no file holds some of it."""
        shape = self.stored[key].shape
        return None if self._files.gaps(MODEL + key, Box.whole(shape)) else Join(shape)

    def read(self, key: str, join: Join, piece: Cut, *, out: Tensor) -> Tensor:
        """Fill `out` (the cut's local shape, any dtype) with what `piece` holds of a tensor."""
        kept = out
        if piece.dim is not None:
            kept = out.narrow(piece.dim, 0, piece.stop - piece.start)
            out.narrow(piece.dim, piece.stop - piece.start, piece.pad).zero_()
        self._files.read(MODEL + key, Box.of(piece), out=kept)
        return out

    def exceptions(self, key: str) -> Tensor | None:
        """Only deltas have some."""
        return None

    def release(self) -> None:
        """Forget all mappings of files."""
        self._files.release()

    def where(self, key: str) -> str:
        """A tensor's shape and what lacks of it, for an error message."""
        shape = self.stored[key].shape
        gaps = self._files.gaps(MODEL + key, Box.whole(shape))
        return f"{key} is {shape}" + (f" and lacks {few(map(str, gaps), ';', most=2)}" if gaps else "")

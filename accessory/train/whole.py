"""All weights of a model in Hugging Face's form, beside the states of a checkpoint: joined from these and the base.

Must not know when a checkpoint is due; it runs in the thread that writes one, and one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.checkpoint import Checkpoint, Spec
from accessory.checkpoint.boxes import Box, StateFiles
from accessory.checkpoint.huggingface.writer import HuggingFaceForm, HuggingFaceWriter
from accessory.checkpoint.operate import check_range
from accessory.checkpoint.stage import Stage
from accessory.checkpoint.training import MODEL
from accessory.dist import Cut
from accessory.release import Release


@dataclass(frozen=True)
class Whole:
    """What `Saver` writes beside the states so that other tools open a checkpoint."""

    form: HuggingFaceForm
    release: Release
    specs: Mapping[str, Spec]
    """Every tensor of the model, in full, by canonical names."""
    base: Checkpoint | None
    """Holds what is not trained, which no state does."""

    @property
    def nbytes(self) -> int:
        """About what it takes."""
        return sum(Spec(spec.shape, self.form.dtype or spec.dtype).nbytes for spec in self.specs.values())

    def write(self, stage: Stage, states: Sequence[str]) -> None:
        """Write weights and small files into the folder of a checkpoint whose state files lie there.

        Raises ValueError for a value that fp16 cannot hold, and where the base's folders have changed meanwhile.
        """
        assert stage.fresh, f"{stage.target} is there already"
        state = StateFiles([stage.path(name) for name in states])
        try:
            with HuggingFaceWriter(stage.target, self.specs, form=self.form, stage=stage) as writer:
                for key, tensor in self._tensors(state):
                    check_range(key, tensor, self.form.dtype)
                    writer.put(key, tensor)
                writer.finish(**self.release.words())
        finally:
            state.release()

    def _tensors(self, state: StateFiles) -> Iterator[tuple[str, Tensor]]:
        """All of them: first what was trained, then what was not."""
        frozen: dict[str, Cut] = {}
        for key, spec in self.specs.items():
            held = state.specs.get(MODEL + key)
            if held is None:
                frozen[key] = Cut(spec.shape)
                continue
            yield key, state.read(MODEL + key, Box.whole(spec.shape), out=torch.empty(spec.shape, dtype=held.dtype))
        if frozen:
            assert self.base is not None, f"nobody holds {[*frozen][:3]}"
            yield from self.base.some(frozen, dtype=torch.float32)

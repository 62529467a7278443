"""The form in which a run leaves its weights: that of the folder it began with, or what save_format says.

Must not write anything, nor know a layout of folders.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from accessory.checkpoint import Form, Spec
from accessory.checkpoint.boxes import Piece
from accessory.checkpoint.files import few
from accessory.checkpoint.huggingface.adapter_writer import AdapterForm
from accessory.checkpoint.huggingface.papers import family_of
from accessory.checkpoint.huggingface.writer import HuggingFaceForm
from accessory.checkpoint.write import Papers
from accessory.dist import dtype_from_name
from accessory.model import cuts_of
from accessory.release import Release, Subject, additions, release, tokenizer_texts
from accessory.train.adapter import adapter_form
from accessory.train.settings import Settings
from accessory.train.start import Start, papers
from accessory.train.trainee import Trainee
from accessory.train.whole import Whole

log = logging.getLogger(__name__)

NATIVE = {"accessory": "safetensors", "safetensors": "safetensors", "pth": "pth"}


@dataclass(frozen=True)
class Leaving:
    """What the trained model becomes when it is written."""

    form: AdapterForm | HuggingFaceForm | Form
    papers: Papers
    """Beside states, adapters and Accessory's form."""
    subject: Subject
    release: Release | None = None
    """Beside Hugging Face's form."""
    complete: bool = True
    """Whether all weights are written, and not only those that were trained."""
    whole: Whole | None = None
    """What checkpoints hold beside their states."""

    @property
    def adapter(self) -> AdapterForm | None:
        """The form, where it is an adapter's."""
        return self.form if isinstance(self.form, AdapterForm) else None

    @property
    def last(self) -> bool:
        """Whether the last checkpoint holds the trained model as other tools open it."""
        return self.adapter is not None or self.whole is not None

    def pieces(self, trainee: Trainee) -> dict[str, Piece]:
        """What is written at the end."""
        return {**trainee.pieces(), **(trainee.frozen_pieces() if self.complete else {})}


def leaving(start: Start, settings: Settings, trained: Collection[str]) -> Leaving:
    """Choose the form. trained: names of all tensors that are.

    Raises ValueError for a save_format that cannot hold the model, and as `adapter_form` does.
    """
    adapter = adapter_form(start, settings, trained)
    subject = subject_of(start)
    beside = papers(start)
    dialect = settings.output_layout != "accessory"
    if adapter is not None:
        if dialect:  # with the chat template, as these tools write it
            beside = replace(beside, more=tokenizer_texts(subject))
        return Leaving(adapter, beside, subject, complete=False)
    complete = not settings.only_save_trainable
    dtype = dtype_from_name(settings.save_dtype) if settings.save_dtype else start.dtype
    if not _is_hugging(start, settings, complete=complete):
        form = Form(
            shards=settings.save_shards or settings.tensor_parallel_size,
            fmt=NATIVE[settings.save_format or "accessory"],
            dtype=dtype,
            tied=start.spec.llama.tied,
        )
        return Leaving(form, beside, subject, complete=complete)
    if settings.save_shards is not None:
        raise ValueError(
            f"save_shards: got {settings.save_shards} for a Hugging Face folder, whose shards end at 5 GB; leave it"
            " out, or set save_format accessory"
        )
    family = family_of(subject.flat, subject.told)
    released = release(subject, family=family, dtype=str(dtype).removeprefix("torch."))
    form = HuggingFaceForm(family=family, head_dim=start.spec.llama.head_dim, dtype=dtype)
    whole = _whole(start, form, released, trained) if dialect else None
    return Leaving(form, beside, subject, released, complete, whole)


def subject_of(start: Start) -> Subject:
    """The model of a run, as its small files describe it."""
    llama, vision = start.spec.llama, start.spec.vision
    flat = {**asdict(llama), "hidden_dim": llama.ffn_dim, "n_kv_heads": llama.kv_heads}
    flat |= {} if vision is None else {"vision": vision.to_dict()}
    return Subject(flat, start.tokenizer, start.template, start.stop_ids, start.checkpoint)


def _is_hugging(start: Start, settings: Settings, *, complete: bool) -> bool:
    """Whether the model is left as a Hugging Face folder. ValueError where it should be and cannot."""
    wanted, checkpoint = settings.save_format, start.checkpoint
    if wanted not in (None, "hf"):
        return False
    names = [name for name, _ in start.model.named_parameters()]
    added = additions(names, qkv_bias=start.spec.llama.qkv_bias)
    if wanted is None:
        return checkpoint is not None and checkpoint.folders[0].form == "huggingface" and complete and not added
    if not complete:
        raise ValueError(
            "save_format: got hf with only_save_trainable true, expected accessory, since a Hugging Face folder holds"
            " all weights; set only_save_trainable false"
        )
    if added:
        raise ValueError(
            f"save_format: got hf for a model with {few(added, most=2)}, which plain LLaMA has not; set it accessory"
        )
    return True


def _whole(start: Start, form: HuggingFaceForm, released: Release, trained: Collection[str]) -> Whole | None:
    """All weights, for checkpoints; None, with a word, where some lie neither in states nor in the base."""
    specs = {key: Spec(cut.shape, form.dtype or start.dtype) for key, cut in cuts_of(start.model).items()}
    held = set() if start.checkpoint is None else {key for source in start.checkpoint.sources for key in source.stored}
    if lost := sorted(specs.keys() - held - {*trained}):
        log.info("checkpoints hold states alone, since %s is neither trained nor in the base", few(lost, most=2))
        return None
    return Whole(form, released, specs, start.checkpoint)

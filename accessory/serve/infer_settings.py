"""The settings of `accessory infer`.

Must not import torch: they are read before the first rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from accessory.dialect.words import GenerationWords, ModelWords


@dataclass
class InferSettings(ModelWords, GenerationWords):
    """Ask a model in a terminal, or let it answer a dataset."""

    ckpt_dir: str | None = None
    """A checkpoint of a training run (checkpoint-N, a merged one, or a run's final folder): the model, and what its run
    noted beside it of base, template and data."""
    load_args_from_ckpt_dir: bool = True
    """Take base model, template and the like from what the run of ckpt_dir noted, where they are not given here."""
    load_dataset_config: bool = False
    """Answer the rows that the run of ckpt_dir kept for validation."""
    dataset: list[str] = field(default_factory=list)
    """Answer these rows: names of dataset_info.json, data files or folders; name#N takes N rows."""
    dataset_dir: str | None = None
    """Folder of dataset_info.json; none: data."""
    media_dir: str | None = None
    """Pictures are relative to this folder; none: to the data file's."""
    max_samples: int | None = None
    """Use only the first so many rows of each dataset."""
    val_size: float = 0.0
    """Answer only the rows that a run with this val_size and dataset_seed keeps for validation; 0: all rows."""
    dataset_seed: int = 42
    """Of that split, and of the rows that name#N draws."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read or asked; skipped ones are counted and named."""
    eval_human: bool | None = None
    """Ask in the terminal; none: where there is no dataset."""
    infer_batch_size: int = 8
    """Rows that are answered at once on each data-parallel rank."""
    show_dataset_sample: int = -1
    """Answer only the first so many rows; -1: all."""
    save_result: bool = True
    """Append every answer to a jsonl file."""
    result_dir: str | None = None
    """Folder of that file; none: infer_result in ckpt_dir, else output/infer/NAME/infer_result."""
    resume: bool = False
    """Go on with the newest results of the same settings in that folder: no row is answered twice, none is lost. Where
    it is set from the first run on, the answers equal those of an unbroken one, bit by bit."""
    stream: bool = True
    """In a terminal: show an answer while it is made."""
    verbose: bool | None = None
    """Print question, answer and label of each row; none: for fewer than 100 rows."""
    num_beams: int = 1
    """Only 1 is there."""
    dry_run: bool = False
    """Print the settings as they are understood, and stop."""

    def check(self) -> None:
        """ValueError for values that contradict each other."""
        if self.infer_batch_size < 1:
            raise ValueError(f"infer_batch_size: got {self.infer_batch_size}, expected at least 1")
        if self.show_dataset_sample < 1 and self.show_dataset_sample != -1:
            raise ValueError(f"show_dataset_sample: got {self.show_dataset_sample}, expected -1 (all) or at least 1")
        if self.num_beams != 1:
            raise ValueError(f"num_beams: got {self.num_beams}, expected 1, since there is no beam search")
        if self.load_dataset_config and self.ckpt_dir is None:
            raise ValueError("load_dataset_config: got true without ckpt_dir, which says where to look; give it")
        if self.eval_human and (self.dataset or self.load_dataset_config):
            raise ValueError("eval_human: got true together with a dataset, expected one of them; drop one")
        if self.eval_human is False and not (self.dataset or self.load_dataset_config):
            raise ValueError("eval_human: got false without a dataset, expected rows to answer; give dataset")
        if not self.val_size >= 0:
            raise ValueError(f"val_size: got {self.val_size}, expected 0 or more")

    @property
    def interactive(self) -> bool:
        """Whether a person asks."""
        return not (self.dataset or self.load_dataset_config)

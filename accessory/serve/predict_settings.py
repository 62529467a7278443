"""The settings of `accessory predict`.

Must not import torch: they are read before the first rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from accessory.dialect.words import GenerationWords, ModelWords


@dataclass
class PredictSettings(ModelWords, GenerationWords):
    """Answer a dataset, score the answers, and keep both."""

    eval_dataset: list[str] = field(default_factory=list)
    """Answer these rows: names of dataset_info.json, data files or folders; name#N takes N rows."""
    dataset: list[str] = field(default_factory=list)
    """With val_size: the data of a run, of which the rows are answered that it keeps for validation."""
    dataset_dir: str | None = None
    """Folder of dataset_info.json; none: data."""
    media_dir: str | None = None
    """Pictures are relative to this folder; none: to the data file's."""
    val_size: float = 0.0
    """Rows of dataset that are answered, those that a run with this val_size and seed keeps: a number, or a share."""
    max_samples: int | None = None
    """Use only the first so many rows of each dataset."""
    cutoff_len: int = 2048
    """Most positions of a question."""
    overlong: Literal["truncate", "error"] = "truncate"
    """A longer one loses its oldest text, never BOS or pictures, and its line says how much; or it is a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read or asked; skipped ones are counted and named."""
    per_device_eval_batch_size: int = 8
    """Rows that are answered at once on each data-parallel rank."""
    output_dir: str = "output/predict"
    """Folder of generated_predictions.jsonl and predict_results.json, which all hosts see. Answers of the same settings
    that are there are gone on with: no row is answered twice, none is lost."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that holds answers."""
    ddp_timeout: float = 1800.0
    """Seconds that a collective may take before the job fails."""
    dry_run: bool = False
    """Print the settings as they are understood, and stop."""

    def check(self) -> None:
        """ValueError for values that contradict each other."""
        for name, least in (("per_device_eval_batch_size", 1), ("cutoff_len", 2), ("max_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if not self.val_size >= 0:
            raise ValueError(f"val_size: got {self.val_size}, expected 0 or more")
        if self.eval_dataset and self.val_size:
            raise ValueError("val_size: got it together with eval_dataset, expected one of them; drop one")
        if not self.eval_dataset and not (self.dataset and self.val_size):
            got = "dataset without val_size" if self.dataset else "no rows"
            raise ValueError(f"eval_dataset: got {got}, expected rows to answer; give eval_dataset")
        if not self.ddp_timeout > 0:
            raise ValueError(f"ddp_timeout: got {self.ddp_timeout}, expected more than 0 seconds")

    @property
    def answered(self) -> list[str]:
        """The data sets whose rows are answered."""
        return self.eval_dataset or self.dataset

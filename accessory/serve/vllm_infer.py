"""`tools/vllm_infer.py`: LLaMA-Factory's script of that name, a dataset through vLLM, as a case of `accessory predict`.

Must not know models or rows: it says in predict's words what the script's words mean.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accessory.config import parse


@dataclass
class ScriptWords:
    """Answer a dataset through vLLM; answers and scores go into files."""

    model_name_or_path: str
    """Folder or hub id of the model."""
    adapter_name_or_path: str | None = None
    """Folders of adapters on top of it, with commas between them; they are merged into a folder that is kept."""
    dataset: list[str] = field(default_factory=lambda: ["alpaca_en_demo"])
    """Rows to answer: names of dataset_info.json, data files or folders, with commas between them."""
    dataset_dir: str = "data"
    """Folder of dataset_info.json."""
    template: str = ""
    """How conversations are written, by LLaMA-Factory's names; without it the model's own."""
    cutoff_len: int = 2048
    """Most positions of a question; a longer one loses its oldest text, and its line says how much."""
    max_samples: int | None = None
    """Use only the first so many rows of each dataset."""
    vllm_config: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine."""
    save_name: str = "generated_predictions.jsonl"
    """The file of answers. What a run has done so far lies beside it, in a folder that ends in .run; a run of the same
    settings goes on with it."""
    matrix_save_name: str | None = None
    """Also write the scores, as JSON."""
    temperature: float = 0.95
    """The higher, the more even; 0: always the likeliest token."""
    top_p: float = 0.7
    """Choose among the likeliest tokens whose probabilities reach this sum."""
    top_k: int = 50
    """Choose among this many likeliest tokens; 0: all."""
    max_new_tokens: int = 1024
    """Most tokens of an answer."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were already said become less likely."""
    skip_special_tokens: bool = True
    """Only true: control tokens are no part of an answer's text."""
    default_system: str | None = None
    """System text of conversations that bring none; without it the template's."""
    enable_thinking: bool = True
    """Nothing to do: the template decides."""
    seed: int = 42
    """The same seed draws the same answers."""
    pipeline_parallel_size: int = 1
    """Only 1: all GPUs share each layer."""
    image_max_pixels: int | None = None
    """Nothing to do: pictures are made as the model's folder says; the next three too, and there are no videos."""
    image_min_pixels: int | None = None
    """Nothing to do."""
    video_fps: float | None = None
    """Nothing to do."""
    video_maxlen: int | None = None
    """Nothing to do."""
    batch_size: int = 256
    """Rows that vLLM has at once."""

    def check(self) -> None:
        """ValueError for what is not offered."""
        if not self.skip_special_tokens:
            raise ValueError("skip_special_tokens: got false, expected true; leave it out")
        if self.pipeline_parallel_size != 1:
            raise ValueError(f"pipeline_parallel_size: got {self.pipeline_parallel_size}, expected 1; leave it out")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script. Raises ModuleNotFoundError without vLLM, ValueError and OSError as `accessory predict` does."""
    words = parse(ScriptWords, argv, prog="vllm_infer.py", description=ScriptWords.__doc__ or "")
    words.check()
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "vllm_infer: got no vllm in this Python, expected the package; pip install vllm, or run accessory predict"
            f" --model_name_or_path {words.model_name_or_path} --eval_dataset {','.join(words.dataset)} without it"
        )
    from accessory.serve import predict, predictions

    folder = Path(words.save_name).with_suffix(".run")
    predict.run(predict.PredictSettings(**predicted(words, folder)))
    shutil.copyfile(folder / predictions.ANSWERS, words.save_name)
    if words.matrix_save_name is not None:
        shutil.copyfile(folder / predictions.RESULTS, words.matrix_save_name)
    return 0


def predicted(words: ScriptWords, folder: Path) -> dict[str, Any]:
    """The same in the words of `accessory predict`, which keeps its files in `folder`."""
    adapters = [part for part in (words.adapter_name_or_path or "").split(",") if part]
    plain = words.template and "/" not in words.template and "{" not in words.template
    return {
        "model_name_or_path": [words.model_name_or_path],
        "adapter_name_or_path": adapters,
        "template": f"llamafactory/{words.template}" if plain else words.template,
        "infer_backend": "vllm",
        "vllm_config": words.vllm_config,
        "eval_dataset": [part for name in words.dataset for part in name.split(",") if part],
        "dataset_dir": words.dataset_dir,
        "cutoff_len": words.cutoff_len,
        "max_samples": words.max_samples,
        "max_new_tokens": words.max_new_tokens,
        "do_sample": words.temperature > 0,
        "temperature": words.temperature,
        "top_p": words.top_p,
        "top_k": words.top_k,
        "repetition_penalty": words.repetition_penalty,
        "seed": words.seed,
        "default_system": words.default_system,
        "per_device_eval_batch_size": words.batch_size,
        "output_dir": str(folder),
    }

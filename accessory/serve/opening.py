"""From the shared words of the verbs to a model that answers: ranks, weights, engine, sampling.

Must not import torch before the ranks of this host are started, nor know what is asked.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from accessory import dist
from accessory.dialect.models import find_model
from accessory.dialect.words import GenerationWords, ModelWords
from accessory.dist.place import read_place

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.data.image import Orientation
    from accessory.dist import Ranks
    from accessory.engine import Engine
    from accessory.model import Sampling

log = logging.getLogger(__name__)

WINDOW = 4096  # tokens, where nobody asks for more: a cache of a long-context model's whole window may not fit
TINY = str(Path(__file__).parents[1] / "tiny")
_HEADS = ("n_heads", "num_attention_heads")


def check_words(model: ModelWords, generation: GenerationWords | None = None) -> None:
    """ValueError for values of the shared words that cannot be, before anything is started."""
    from accessory.data.template import get_template

    if model.template:
        get_template(model.template)
    if model.model_type is not None and not model.model_name_or_path:
        find_model(model.model_type)
    if model.infer_backend == "vllm":
        from accessory.serve.vllm_folder import check_vllm

        check_vllm(model)
    if model.max_seq_len is not None and model.max_seq_len < 2:
        raise ValueError(f"max_seq_len: got {model.max_seq_len}, expected at least 2 tokens")
    for name in ("tensor_parallel_size", "nproc_per_node"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1 rank")
    if generation is None:
        return
    sampling_of(generation)
    if generation.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {generation.max_new_tokens}, expected at least 1")
    if "" in generation.stop_words:
        raise ValueError("stop_words: got an empty string, expected strings of at least one character; drop it")


def start_ranks(words: ModelWords, *, argv: Sequence[str] | None = None, timeout: float = 600.0) -> Ranks:
    """Start or join the ranks of this host, and set up logging.

    argv: what followers run; none: this command. timeout: seconds that a collective may take.
    """
    if words.infer_backend == "vllm":
        return _alone(words)
    dist.launch(ranks_here(words), argv=argv)
    dist.setup_logging(read_place(os.environ).rank)  # before `init`, which may wait for other ranks and says so
    return dist.init(tp=words.tensor_parallel_size, device=words.device, timeout=timeout)


def _alone(words: ModelWords) -> Ranks:
    """This process, without weights: vLLM starts its own. Raises where it is missing, or others run beside this one."""
    from accessory.serve.vllm_folder import need_vllm

    need_vllm()
    world = read_place(os.environ).world
    if world > 1:
        raise ValueError(
            f"infer_backend: got vllm in a job of {world} ranks, expected one process, as vLLM starts its own; set "
            "tensor_parallel_size and start one"
        )
    dist.setup_logging(0)
    return dist.init(device="cpu")


def ranks_here(words: ModelWords) -> int:
    """How many ranks this process should start: what was asked for, else one per visible GPU that the heads allow."""
    world = read_place(os.environ).world
    if world > 1:
        return world if words.nproc_per_node is None else words.nproc_per_node
    if words.nproc_per_node is not None:
        return words.nproc_per_node
    if os.environ.get("NPROC_PER_NODE", "").isdecimal():
        return int(os.environ["NPROC_PER_NODE"])
    gpus = 0
    if words.device in ("auto", "cuda"):
        import torch

        gpus = torch.cuda.device_count()
    if words.tensor_parallel_size is not None:
        return max(gpus // words.tensor_parallel_size, 1) * words.tensor_parallel_size
    heads = _heads(words.model_name_or_path)
    return max((n for n in range(1, gpus + 1) if heads is None or heads % n == 0), default=1)


def _heads(paths: Sequence[str]) -> int | None:
    """The attention heads of a folder's model, which a rank count must divide; None where no small file says."""
    for name in ("config.json", "params.json"):
        file = Path(paths[0]) / name if paths else None
        if file is not None and file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                return None  # whoever opens the folder says what is wrong with it
            inner = config.get("text_config")
            for told in (config, inner if isinstance(inner, dict) else {}):
                if heads := next((told[key] for key in _HEADS if isinstance(told.get(key), int)), None):
                    return heads
    return None


def open_bundle(words: ModelWords, ranks: Ranks, *, for_good: bool = True) -> Bundle:
    """This rank's model, for `open_engine`, which says what `for_good` is.

    Raises ValueError or OSError for anything that does not fit.
    """
    from accessory.assemble import open_model

    return open_model(
        paths_of(words),
        ranks=ranks,
        llama_type=words.llama_type,
        llama_config=words.llama_config,
        tokenizer_path=words.tokenizer_path,
        dtype=dist.dtype_from_name(words.precision) if words.precision else None,
        quant=words.quantization_bit is not None,
        max_seq_len=words.max_seq_len,
        anyres_compat=words.anyres_compat,
        weights=words.infer_backend != "vllm",
        answers=for_good,
    )


def paths_of(words: ModelWords) -> list[str]:
    """The folders that make the model, adapters last; none for the tiny model."""
    paths = list(words.model_name_or_path)
    if not paths and words.model_type is not None:
        paths = [find_model(words.model_type).hub]
    return [*(paths or [TINY] * bool(words.adapter_name_or_path)), *words.adapter_name_or_path]


def open_engine(
    words: ModelWords,
    bundle: Bundle,
    ranks: Ranks,
    *,
    rows: int,
    orientation: Orientation,
    for_good: bool = True,
    **how: Any,
) -> Engine:
    """This rank's engine. orientation: of photographs, where the words leave it open. how: as `Engine` takes it.

    for_good: nobody else reads the model's weights, so that they may be reordered. ValueError as the engine raises it,
    and for speculate where vLLM is the engine.
    """
    longest = bundle.config.max_seq_len
    how = {"window": longest if words.max_seq_len else min(longest, WINDOW), **how}
    turned = words.orientation or orientation
    if words.infer_backend == "vllm":
        from accessory.serve.vllm import open_vllm

        if ahead := how.pop("speculate", 0):
            raise ValueError(
                f"speculate: got {ahead} with infer_backend vllm, which tries tokens in its own way; leave it out, or "
                "give vllm_config a speculative_config"
            )
        return open_vllm(words, bundle, rows=rows, orientation=turned, tensor_parallel=ranks_here(words), **how)
    from accessory.engine import Engine
    from accessory.quant import settle

    if for_good:
        settle(bundle.model, rows=rows)
    return Engine(bundle, ranks, rows=rows, image_transform=words.image_transform, orientation=turned, **how)


def sampling_of(words: GenerationWords) -> Sampling:
    """How tokens are chosen. ValueError for values that cannot be."""
    from accessory.model import Sampling

    if words.do_sample and not words.temperature:
        raise ValueError("temperature: got 0 with do_sample true, expected more than 0; give one")
    return Sampling(
        temperature=0.0 if words.do_sample is False else words.temperature,
        top_p=words.top_p,
        top_k=words.top_k,
        repetition_penalty=words.repetition_penalty,
        seed=words.seed,
    )


def template_of(words: ModelWords, bundle: Bundle) -> str:
    """How conversations are written: as the words say, as the model type wants it, or as the folder says."""
    typed = None if words.model_type is None else find_model(words.model_type).template
    return words.template or typed or bundle.template


def describe(bundle: Bundle, template: str, engine: Engine) -> str:
    """One line on what runs."""
    from accessory.data.template import label

    dtype = str(bundle.dtype).removeprefix("torch.")
    return f"{bundle.source} ({bundle.llama_type}, {dtype}, template {label(template)}, window {engine.window})"


def resolved(settings: Any) -> str:
    """A verb's settings as YAML, for --dry_run."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True, width=120)

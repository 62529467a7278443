"""ms-swift's functions for one model in a program, with its signatures, over `Model`.

Must not know how weights are opened or answers made.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from accessory.data.template import get_template as form_of
from accessory.data.template import qualify
from accessory.dialect.models import ALIASES, MODELS, find_model
from accessory.face.loaded import Model, load, model_words
from accessory.serve.opening import TINY
from accessory.serve.steady import safe_length

if TYPE_CHECKING:
    from accessory.data.tokenizer import Tokenizer
    from accessory.engine import Request
    from accessory.engine.request import PictureSource

log = logging.getLogger(__name__)

ModelType = SimpleNamespace(**{name.replace("-", "_").replace(".", "_"): name for name in [*MODELS, *ALIASES]})
"""Names of model types as attributes: ModelType.llava1d6_mistral_7b_instruct."""
History = list[list[str]]
Loose = Sequence["str | Sequence[int]"]


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written, and how long they may be."""

    template_type: str
    """A name that `data.template.get_template` knows."""
    default_system: str | None = None
    max_length: int | None = None
    truncation_strategy: Literal["delete", "truncation_left"] = "delete"


def get_default_template_type(model_type: str) -> str:
    """The template of a model type, or of a folder. ValueError for a name that there is not."""
    if model_type == "tiny" or Path(model_type).is_dir():
        from accessory.checkpoint import open_folders

        return open_folders(TINY if model_type == "tiny" else model_type).config.get("template") or "alpaca"
    return find_model(model_type).template.removeprefix("swift/")


def get_model_tokenizer(
    model_type: str | None,
    torch_dtype: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    load_model: bool = True,
    *,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple[Model | None, Tokenizer]:
    """A model and its tokenizer.

    model_type: a name of the table, "tiny", or a folder. model_kwargs: device_map (auto, cpu, cuda:N). kwargs: those of
    `accessory.load`. Photographs are seen as they are stored unless orientation says otherwise.
    Raises ValueError or OSError as `load` does.
    """
    if revision is not None:
        raise ValueError(f"revision: got {revision!r}, expected none; fetch that revision and name its folder")
    for name, value in (model_kwargs or {}).items():
        if name != "device_map" or not isinstance(value, str):
            raise ValueError(f"model_kwargs: got {name} {value!r}, expected device_map auto, cpu or cuda:N alone")
        kwargs["device"] = value
    if model_id_or_path is None and model_type is not None:
        if model_type == "tiny" or Path(model_type).is_dir():
            model_id_or_path, model_type = (TINY if model_type == "tiny" else model_type), None
    path = [] if model_id_or_path is None else [model_id_or_path]
    words = {"orientation": "keep", "model_type": None if model_type == "tiny" else model_type, **kwargs}
    if load_model:
        model = load(path, dtype=torch_dtype, **words)
        return model, model.tokenizer
    for name in ("tp", "rows"):
        words.pop(name, None)
    return None, _tokenizer(model_words(path, dtype=torch_dtype, **words))


def get_template(
    template_type: str,
    tokenizer: Tokenizer,
    default_system: str | None = None,
    max_length: int | None = None,
    truncation_strategy: Literal["delete", "truncation_left"] = "delete",
    **kwargs: Any,
) -> ChatTemplate:
    """How conversations are written: ms-swift's names first, then ours, or one with its dialect.

    A prompt of more than max_length positions is refused (delete) or loses its oldest text (truncation_left).
    Raises ValueError for a template that there is not, or whose control tokens the tokenizer lacks.
    """
    if kwargs:
        raise ValueError(f"get_template: got {', '.join(kwargs)}, expected no further setting; leave it out")
    if truncation_strategy not in ("delete", "truncation_left"):
        raise ValueError(
            f"truncation_strategy: got {truncation_strategy!r}, expected delete or truncation_left; choose one"
        )
    if max_length is not None and max_length < 1:
        max_length = None
    try:
        name = qualify(template_type, dialect="swift")
    except ValueError:
        name = qualify(template_type)
    if default_system and form_of(name).system is None:
        raise ValueError(
            f"default_system: got {default_system!r:.40}, but {template_type} has no place for it; drop it"
        )
    return ChatTemplate(name, default_system, max_length, truncation_strategy)


def inference(
    model: Model,
    template: ChatTemplate,
    query: str,
    history: Sequence[Sequence[str]] | None = None,
    system: str | None = None,
    *,
    generation_config: Any = None,
    stop_words: Loose | None = None,
    stream: bool = False,
    verbose: bool = False,
    prompt_prefix: str = "[PROMPT]",
    output_prefix: str = "[OUTPUT]",
    generation_info: dict[str, Any] | None = None,
    adapter_names: Sequence[str] | None = None,
    images: Sequence[PictureSource] = (),
) -> tuple[str, History]:
    """(the answer, the history with it). images: of the whole conversation, for `<image>` in its questions; those
    without a place open the first one. verbose: prints prompt and answer, with stream as it comes.

    generation_info gets num_prompt_tokens and num_generated_tokens. Raises ValueError or OSError for what cannot be.
    """
    if adapter_names:
        raise ValueError(f"adapter_names: got {list(adapter_names)}, expected none; load the model with its adapter")
    request = _request(model, template, query, history, system, generation_config, stop_words, images)
    if verbose:
        prompt = model.engine.describe(request)
        sys.stdout.write(f"{prompt_prefix}{prompt}{output_prefix}")
    shown, text = 0, ""
    for text, _ in _answered(model, request, query, history, generation_info):
        if verbose and stream:
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
    if verbose:
        sys.stdout.write(f"{text[shown:]}\n")
        sys.stdout.flush()
    return text, _with(history, query, text)


def inference_stream(
    model: Model,
    template: ChatTemplate,
    query: str,
    history: Sequence[Sequence[str]] | None = None,
    system: str | None = None,
    *,
    generation_config: Any = None,
    stop_words: Loose | None = None,
    generation_info: dict[str, Any] | None = None,
    adapter_names: Sequence[str] | None = None,
    images: Sequence[PictureSource] = (),
) -> Iterator[tuple[str, History]]:
    """The same, as the answer so far and the history with it, again and again: print response[print_idx:].

    What is shown ends with a whole word, and is never taken back. Settings and pictures that cannot be are said at
    once, a prompt that is too long when the first piece is asked for.
    """
    if adapter_names:
        raise ValueError(f"adapter_names: got {list(adapter_names)}, expected none; load the model with its adapter")
    request = _request(model, template, query, history, system, generation_config, stop_words, images)
    return _answered(model, request, query, history, generation_info)


def seed_everything(seed: int, full_determinism: bool = False) -> int:
    """Set the seeds of Python, numpy and torch, from which answers that are drawn take theirs; the seed."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    if full_determinism:
        torch.use_deterministic_algorithms(True)
    return seed


def _request(
    model: Model,
    template: ChatTemplate,
    query: str,
    history: Sequence[Sequence[str]] | None,
    system: str | None,
    generation_config: Any,
    stop_words: Loose | None,
    images: Sequence[PictureSource],
) -> Request:
    """What the engine is asked."""
    messages = []
    for question, answer in history or ():
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    request = model.request(
        [*messages, {"role": "user", "content": query}],
        images,
        system=template.default_system if system is None else system,
        generation_config=generation_config,
    )
    words = [stop for stop in stop_words or () if isinstance(stop, str)]
    ids = [list(stop) for stop in stop_words or () if not isinstance(stop, str)]
    if any(len(each) != 1 for each in ids):
        raise ValueError(f"stop_words: got the ids {ids}, expected one id each; write longer ones as text")
    return replace(
        request,
        template=template.template_type,
        stops=[*request.stops, *words],
        stop_ids=[each[0] for each in ids],
        max_prompt=template.max_length,
        overlong="truncate" if template.truncation_strategy == "truncation_left" else "error",
    )


def _answered(
    model: Model,
    request: Request,
    query: str,
    history: Sequence[Sequence[str]] | None,
    info: dict[str, Any] | None,
) -> Iterator[tuple[str, History]]:
    """The answer so far, as far as it may be shown; the last is the whole."""
    engine = model.engine
    answer = engine.submit(request)
    text, taken, shown = "", 0, 0
    try:
        while answer.result is None:
            engine.step()
            text, taken = text + "".join(answer.parts[taken:]), len(answer.parts)
            settled = shown + safe_length(text[shown:])
            if settled > shown and answer.result is None:
                shown = settled
                yield text[:shown], _with(history, query, text[:shown])
    finally:
        result = engine.cancel(answer)
    if info is not None:
        info.update(num_prompt_tokens=result.prompt_tokens, num_generated_tokens=len(result.ids))
    yield result.text, _with(history, query, result.text)


def _with(history: Sequence[Sequence[str]] | None, query: str, answer: str) -> History:
    """A history of one more exchange; the caller's own is not changed."""
    return [*[[str(q), str(a)] for q, a in history or ()], [query, answer]]


def _tokenizer(words: Any) -> Tokenizer:
    """A model's tokenizer alone."""
    from accessory.checkpoint import open_folders
    from accessory.data.tokenizer import open_tokenizer

    paths = words.model_name_or_path or [find_model(words.model_type).hub if words.model_type else TINY]
    where = words.tokenizer_path or open_folders(paths).tokenizer
    if where is None:
        raise ValueError(f"{paths[0]}: no tokenizer in it, expected tokenizer.model or tokenizer.json; give one")
    return open_tokenizer(where)

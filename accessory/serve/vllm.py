"""vLLM behind the surface of our engine: the verbs ask it as they ask ours, with the same rendered ids.

Must not know verbs, nor let vLLM read text: it gets token ids (and pictures), and gives token ids, which become text
here. Follows vLLM's LLMEngine of versions 0.11 and later (add_request, step, abort_request).
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accessory.engine.prompt import Prompt, Prompter
from accessory.engine.reading import Score
from accessory.engine.request import Answer, Event, Finish, Grammar, Odds, Request, Result
from accessory.engine.steps import Stats
from accessory.engine.waiting import QueueFull
from accessory.serve.vllm_folder import folder_of, need_vllm, picture_token

if TYPE_CHECKING:
    from PIL.Image import Image

    from accessory.assemble import Bundle
    from accessory.data.image import Orientation
    from accessory.dialect.words import ModelWords

log = logging.getLogger(__name__)

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", None: "auto"}


def open_vllm(
    words: ModelWords,
    bundle: Bundle,
    *,
    rows: int,
    window: int,
    orientation: Orientation,
    tensor_parallel: int,
    reuse: bool = True,
    deterministic: bool = False,
    queue: int | None = None,
    prefill_chunk: int | None = None,
    compiled: bool = False,
) -> VllmEngine:
    """vLLM on the model's Hugging Face folder, which is made where it is missing. The names are those of `Engine`.

    bundle: without weights. prefill_chunk and compiled are vLLM's own business (vllm_config, vllm_enforce_eager), and
    nothing makes its answers independent of their neighbours, which is said where deterministic asks for it.
    Raises ModuleNotFoundError without vLLM, ValueError and OSError as export and vLLM do.
    """
    need_vllm()
    import vllm

    from accessory.serve.opening import paths_of

    folder = folder_of(words, paths_of(words))
    told: dict[str, Any] = {
        "model": str(folder),
        "dtype": _DTYPES[words.precision],
        "max_model_len": window,
        "max_num_seqs": rows,
        "gpu_memory_utilization": words.vllm_gpu_util,
        "enforce_eager": words.vllm_enforce_eager,
        "tensor_parallel_size": tensor_parallel,
        "enable_prefix_caching": reuse,
        "disable_log_stats": True,
        **words.vllm_config,
    }
    try:
        arguments = vllm.EngineArgs(**told)
    except TypeError as error:
        raise ValueError(
            f"vllm_config: got {words.vllm_config}, expected arguments of vLLM's engine ({error})"
        ) from None
    if deterministic:
        log.info("vLLM: an answer may depend on which others are made beside it")
    log.info("vLLM %s runs %s", vllm.__version__, folder)
    window, rows = told["max_model_len"], told["max_num_seqs"]
    return VllmEngine(
        bundle,
        vllm.LLMEngine.from_engine_args(arguments),
        rows=rows,
        window=window,
        orientation=orientation,
        queue=queue,
        picture=picture_token(folder),
    )


@dataclass(eq=False)
class _Open:
    """A request that vLLM has."""

    name: str
    answer: Answer
    prompt: Prompt


class VllmEngine:
    """The surface of `engine.Engine` over vLLM's LLMEngine; what is not here, vLLM does not offer.

    picture: the id that stands for a picture. Prompts are made as our engine makes them, on any thread; everything else
    belongs to the thread that steps.
    """

    def __init__(
        self,
        bundle: Bundle,
        inner: Any,
        *,
        rows: int,
        window: int,
        orientation: Orientation,
        queue: int | None = None,
        picture: int | None = None,
    ) -> None:
        self.rows, self.window, self.stats, self.over = rows, window, Stats(), False
        self.cache_bytes = 0
        """vLLM takes vllm_gpu_util of each GPU, and does not say how much of it is keys and values."""
        self._prompter = Prompter(bundle, window=window, orientation=orientation)
        self._orientation, self._inner, self._queue, self._picture = orientation, inner, queue, picture
        self._numbers = itertools.count()
        self._open: dict[str, _Open] = {}
        self._early: list[Any] = []  # outputs that came while a score was waited for

    # ---- as our engine

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._open

    @property
    def running(self) -> int:
        """Requests that vLLM works on, as far as its rows reach."""
        return min(len(self._open), self.rows)

    @property
    def waiting(self) -> int:
        """Those beyond them."""
        return len(self._open) - self.running

    def length(self, request: Request) -> int:
        """As `Engine.length`."""
        return len(self._prompter.encode(request)[2].ids)

    def describe(self, request: Request) -> str:
        """As `Engine.describe`."""
        return self._prompter.encode(request)[2].text

    def prepare(self, request: Request) -> Prompt:
        """As `Engine.prepare`: the same ids, from the same template."""
        return self._prompter(request)

    def enqueue(self, request: Request, prompt: Prompt) -> Answer:
        """Hand a prepared request to vLLM. Raises QueueFull, and ValueError for what vLLM refuses."""
        if self._queue is not None and self.waiting >= self._queue:
            raise QueueFull(
                f"queue: got a request while {self.waiting} wait, expected at most {self._queue}; ask later"
            )
        answer = Answer(next(self._numbers), request)
        asked = _Open(str(answer.id), answer, prompt)
        self._inner.add_request(asked.name, self._asked(request, prompt), parameters(request, prompt))
        self._open[asked.name] = asked
        self.stats.prompt_tokens += len(prompt.ids)
        return answer

    def submit(self, request: Request) -> Answer:
        """Both at once."""
        return self.enqueue(request, self.prepare(request))

    def step(self) -> list[Event]:
        """Let vLLM do one step, and return what came of all requests."""
        outputs, self._early = self._early, []
        if not outputs and self._open:
            outputs = self._inner.step()
            self.stats.answer_steps += 1
        return [event for output in outputs for event in self._take(output)]

    def cancel(self, answer: Answer) -> Result:
        """End an answer where it is. The result of a finished one does not change."""
        if answer.result is not None:
            return answer.result
        asked = self._open.get(str(answer.id))
        if asked is None or asked.answer is not answer:
            raise ValueError(f"cancel: got answer {answer.id}, which is not of this engine")
        self._inner.abort_request([asked.name])
        self._say(answer, asked.prompt.text.finish(complete=False))
        return self._finish(asked, "cancelled")

    def score(self, asked: Request, continuations: Sequence[str]) -> list[Score]:
        """How likely each text is as the beginning of the answer. Raises as `Engine.score`."""
        prompt = self.prepare(replace(asked, max_gen_len=1, overlong="error"))
        scores = []
        for text in continuations:
            encoded = self._prompter.encode(asked, answer=text)[2]
            said = next((at for at, told in enumerate(encoded.supervised) if told), len(encoded.ids))
            if not said:
                raise ValueError("prompt: got no token before the continuation, expected at least one; say something")
            whole = replace(prompt, ids=encoded.ids, slots=encoded.slots)
            scores.append(self._score(asked, whole, encoded.ids[said:]))
        return scores

    def logits(self, asked: Request | Sequence[int]) -> Any:
        """ValueError: vLLM gives none."""
        raise ValueError("logits: got infer_backend vllm, which gives none, expected huggingface; leave it out")

    def follow(self) -> None:
        """Nobody follows: vLLM's ranks are its own."""
        raise AssertionError("vLLM's ranks are its own")

    def close(self) -> None:
        """Drop what is under way and let vLLM end. A second call does nothing."""
        inner, self._inner = self._inner, None
        if inner is None:
            return
        if self._open:
            inner.abort_request(list(self._open))
            self._open.clear()
        core = getattr(inner, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- to vLLM

    def _asked(self, request: Request, prompt: Prompt) -> dict[str, Any]:
        """A prompt as vLLM takes it: ids, and pictures that it transforms by itself, each one id in their place."""
        if not request.pictures:
            return {"prompt_token_ids": prompt.ids}
        if self._picture is None:
            raise ValueError(
                "pictures: got some for a model whose exported folder does not see; leave infer_backend out"
            )
        places = self._prompter.places(request)
        ids = collapse(prompt.ids, prompt.slots, places, token=self._picture)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": self._look(request)}}

    def _look(self, request: Request) -> list[Image]:
        """The pictures, opened."""
        from accessory.data.image import load_picture

        return [load_picture(picture, orientation=self._orientation) for picture in request.pictures]

    def _score(self, asked: Request, prompt: Prompt, said: Sequence[int]) -> Score:
        """Let vLLM read a prompt, and add up what it finds of its last tokens."""
        from vllm import SamplingParams

        if len(prompt.ids) >= self.window:
            raise ValueError(f"prompt: got {len(prompt.ids)} tokens, expected less than {self.window}; shorten it")
        name = f"score {next(self._numbers)}"
        how = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        self._inner.add_request(name, self._asked(asked, prompt), how)
        while True:
            outputs = self._inner.step()
            mine = [output for output in outputs if output.request_id == name]
            self._early += [output for output in outputs if output.request_id != name]
            if mine and mine[-1].finished:
                break
        found = mine[-1].prompt_logprobs[-len(said) :] if said else []
        told = [table[token] for table, token in zip(found, said, strict=True)]
        return Score(sum(each.logprob for each in told), len(said), all(each.rank == 1 for each in told))

    # ---- from vLLM

    def _take(self, output: Any) -> list[Event]:
        """What one output says: an event for each new token, the last one with the result."""
        asked = self._open.get(output.request_id)
        if asked is None:
            return []
        said, events = output.outputs[0], list[Event]()
        tables = said.logprobs or [None] * len(said.token_ids)
        for token, table in zip(said.token_ids, tables, strict=True):
            events.append(self._advance(asked, token, odds_of(token, table, asked.answer.request.logprobs)))
            if asked.answer.result is not None:
                if not output.finished:  # a stop string of ours, which vLLM does not know
                    self._inner.abort_request([asked.name])
                break
        self.stats.cached_tokens += (output.num_cached_tokens or 0) if output.finished else 0
        if output.finished and asked.answer.result is None:
            events.append(self._end(asked, said.finish_reason, output))
        return events

    def _advance(self, asked: _Open, token: int, odds: Odds | None) -> Event:
        """Add one token to an answer, or end it, as our engine does."""
        answer, prompt = asked.answer, asked.prompt
        if token in prompt.stop_ids:
            text = self._say(answer, prompt.text.finish(complete=True))
            return Event(answer, token, text, self._finish(asked, "stop"), odds)
        answer.ids.append(token)
        if odds is not None:
            answer.odds.append(odds)
        self.stats.generated_tokens += 1
        text = prompt.text.push(token)
        finish: Finish | None = "stop" if prompt.text.stopped else None
        if finish is None and len(answer.ids) == prompt.limit:
            text += prompt.text.finish(complete=False)
            finish = "stop" if prompt.text.stopped else "length"
        self._say(answer, text)
        return Event(answer, token, text, None if finish is None else self._finish(asked, finish), odds)

    def _end(self, asked: _Open, reason: str | None, output: Any) -> Event:
        """The end that vLLM saw and we did not: its grammar's, its window's, or that it gave up."""
        text = self._say(asked.answer, asked.prompt.text.finish(complete=reason == "stop"))
        if reason in ("stop", "length"):
            return Event(asked.answer, -1, text, self._finish(asked, "stop" if reason == "stop" else "length"))
        error = f"vLLM ended the answer ({reason or output})"
        return Event(asked.answer, -1, text, self._finish(asked, "error", error=error))

    def _say(self, answer: Answer, text: str) -> str:
        if text:
            answer.parts.append(text)
        return text

    def _finish(self, asked: _Open, finish: Finish, *, error: str = "") -> Result:
        """Make the result and forget the request."""
        answer, prompt = asked.answer, asked.prompt
        del self._open[asked.name]
        self.stats.finished[finish] += 1
        text = "".join(answer.parts)
        answer.result = Result(text, answer.ids, finish, len(prompt.ids), prompt.dropped, odds=answer.odds, error=error)
        return answer.result


def parameters(request: Request, prompt: Prompt) -> Any:
    """vLLM's SamplingParams of a request. Its idea of an end is off: our stop ids count, the tokenizer's among them.

    Text and stop strings are ours too (detokenize is off); each output brings what is new.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    how = request.sampling
    more: dict[str, Any] = {}
    if request.grammar is not None:
        more["structured_outputs"] = structured(request.grammar)
    return SamplingParams(
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        min_p=how.min_p,
        repetition_penalty=how.repetition_penalty,
        frequency_penalty=how.frequency_penalty,
        presence_penalty=how.presence_penalty,
        seed=how.seed,
        max_tokens=prompt.limit,
        stop_token_ids=sorted(prompt.stop_ids),
        ignore_eos=True,
        logprobs=request.logprobs,
        logit_bias=dict(request.logit_bias) or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **more,
    )


def structured(grammar: Grammar) -> Any:
    """A grammar as vLLM takes it. ValueError where this vLLM is too old for it."""
    try:
        from vllm.sampling_params import StructuredOutputsParams
    except ImportError:
        raise ValueError("response_format: got it with a vLLM that is older than 0.11, expected a newer one") from None
    told: Callable[[str], Any]
    name, told = {
        "json_object": ("json_object", lambda text: True),
        "json_schema": ("json", lambda text: text),
        "regex": ("regex", lambda text: text),
        "choice": ("choice", json.loads),
        "lark": ("grammar", lambda text: text),
    }[grammar.kind]
    return StructuredOutputsParams(**{name: told(grammar.text)})


def odds_of(token: int, table: Mapping[int, Any] | None, wanted: int | None) -> Odds | None:
    """How likely vLLM found a token, and the likeliest ones; None where nobody asked."""
    if table is None or wanted is None:
        return None
    likeliest = sorted(table.items(), key=lambda item: (item[1].rank, item[0]))[:wanted]
    return Odds(token, table[token].logprob, tuple((other, said.logprob) for other, said in likeliest))


def collapse(ids: Sequence[int], slots: Sequence[int], places: Sequence[int], *, token: int) -> list[int]:
    """Ids in which each picture is one token: its `places` positions stand side by side where slots are 0 or more."""
    told, at, waiting = list[int](), 0, list(places)
    while at < len(ids):
        seen = slots[at] >= 0
        told.append(token if seen else ids[at])
        at += waiting.pop(0) if seen else 1
    assert not waiting, f"{len(waiting)} pictures have no place among {len(ids)} positions"
    return told

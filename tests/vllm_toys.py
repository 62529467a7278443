"""A stand-in for the package vllm: what we use of its LLMEngine, strict about names, computed by our own model.

It follows vLLM 0.11 and later (v1 engine): EngineArgs, LLMEngine.from_engine_args, add_request(id, prompt, params),
step() -> RequestOutput with deltas, abort_request([ids]). Must not know what a test asks of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_toys import ONE

from accessory.assemble import open_model
from accessory.engine import Engine


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    json: str | dict | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None


@dataclass
class EngineArgs:
    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool | None = None
    disable_log_stats: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None


@dataclass
class _Asked:
    ids: list[int]
    params: SamplingParams
    prompt: list[int]
    said: int = 0


@dataclass
class LLMEngine:
    """Greedy answers of the folder's model, a token for each request and step."""

    args: EngineArgs
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """All that were asked."""
    params: list[SamplingParams] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    asked: dict[str, _Asked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.args.max_model_len is not None
        bundle = open_model([Path(self.args.model)], ranks=ONE, dtype=torch.float32)
        self.model = Engine(bundle, ONE, rows=1, window=self.args.max_model_len)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        STARTED.append(cls(engine_args))
        return STARTED[-1]

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        assert set(prompt) <= {"prompt_token_ids", "multi_modal_data"}, prompt
        ids = prompt["prompt_token_ids"]
        if len(ids) + 1 > self.args.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        assert request_id not in self.asked and params.output_kind in RequestOutputKind
        self.prompts.append(prompt)
        self.params.append(params)
        self.asked[request_id] = _Asked(list(ids), params, list(ids))

    def has_unfinished_requests(self) -> bool:
        return bool(self.asked)

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for name in request_ids:
            self.asked.pop(name, None)

    def step(self) -> list[RequestOutput]:
        return [self._one(name, asked) for name, asked in list(self.asked.items())]

    def _one(self, name: str, asked: _Asked) -> RequestOutput:
        params = asked.params
        told = self.model.logits(asked.ids).log_softmax(-1)
        token = int(told[-1].argmax())
        read = None
        if params.prompt_logprobs is not None:
            read = [None, *(table(told[at], asked.ids[at + 1], 0) for at in range(len(asked.ids) - 1))]
        asked.ids.append(token)
        asked.said += 1
        reason = "stop" if token in (params.stop_token_ids or ()) else None
        if reason is None and asked.said == params.max_tokens:
            reason = "length"
        if reason is not None:
            del self.asked[name]
        odds = None if params.logprobs is None else [table(told[-1], token, params.logprobs)]
        stop = token if reason == "stop" else None
        output = CompletionOutput(0, "", [token], None, odds, reason, stop)
        return RequestOutput(name, None, asked.prompt, read, [output], reason is not None, 0)


STARTED: list[LLMEngine] = []


def table(odds: torch.Tensor, token: int, most: int) -> dict[int, Logprob]:
    """The likeliest tokens and the chosen one, as vLLM tells them."""
    order = odds.argsort(descending=True, stable=True).tolist()
    return {each: Logprob(float(odds[each]), order.index(each) + 1) for each in {*order[:most], token}}


def install(monkeypatch: pytest.MonkeyPatch) -> list[LLMEngine]:
    """Put the stand-in where `import vllm` finds it; the engines that are started."""
    package, inner = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.__spec__, inner.__spec__ = ModuleSpec("vllm", None), ModuleSpec("vllm.sampling_params", None)
    told = {"SamplingParams": SamplingParams, "EngineArgs": EngineArgs, "LLMEngine": LLMEngine}
    package.__dict__.update(told, __version__="0.11.0", sampling_params=inner)
    inner.__dict__.update(
        SamplingParams=SamplingParams,
        RequestOutputKind=RequestOutputKind,
        StructuredOutputsParams=StructuredOutputsParams,
    )
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", inner)
    STARTED.clear()
    return STARTED

"""LLaMA-Factory's templates, by its names and in their newest form (v0.9.3 on), byte for byte.
Knows no conversation: data alone.

What differs from it: a run of text is tokenised whole here and piece by piece there; a picture opens its question here
where no place is told; and in `fewshot` only the last answer learns its EOS, as no token stands where the others end.
Tools are written as it writes them: in words, but for llama3, mistral and qwen and the LLaVA templates made of these;
chatml has a role of its own for results. The date in llama3 is not today's but one that stays; several results in a
row, which it refuses, stand as these formats have them; fewshot, without a place for a system text, has none for tools.
"""

from __future__ import annotations

from dataclasses import replace

from accessory.data.template.forms import BOS, EOS, LEARNED_EOS, Pictures, Template
from accessory.data.template.own import END_HEADER, END_INST, EOT, IM_END, IM_START, INST, OWN, START_HEADER
from accessory.data.template.tools import ACTION_BARE, ACTION_CHATML, LLAMA3_SYSTEM, MISTRAL_SYSTEM, QWEN_SYSTEM

_LLAMA2 = Template(
    start=(BOS, INST, " "),
    system=("<<SYS>>\n{text}\n<</SYS>>\n\n",),
    user=(Pictures(), "{text} ", END_INST),
    answer=("{text}", EOS),
    between=(BOS, INST, " "),
    tools=ACTION_BARE,
)
_MISTRAL = Template(
    start=(BOS, INST, " "),
    system=("{text}\n\n",),
    user=(Pictures(), "{text}", END_INST),
    answer=(" {text}", EOS),
    between=(INST, " "),
    tools=MISTRAL_SYSTEM,
)
_LLAMA3 = Template(
    system=(START_HEADER, "system", END_HEADER, "\n\n{text}", EOT),
    user=(START_HEADER, "user", END_HEADER, "\n\n", Pictures(), "{text}", EOT),
    opening=(START_HEADER, "assistant", END_HEADER, "\n\n"),
    answer=("{text}", EOT),
    stop_controls=("<|eot_id|>", "<|eom_id|>", "eos"),
    tools=LLAMA3_SYSTEM,
)
_VICUNA = Template(
    start=(),
    system=("{text}",),
    default_system=OWN["vicuna_v1"].default_system,
    user=("USER: ", Pictures(), "{text} ASSISTANT:"),
    answer=("{text}", EOS),
    tools=ACTION_BARE,
)
# The new line after an answer's end belongs to the answer and is learned.
_CHATML = Template(
    start=(),
    system=(IM_START, "system\n{text}", IM_END, "\n"),
    user=(IM_START, "user\n", Pictures(), "{text}", IM_END, "\n"),
    opening=(IM_START, "assistant\n"),
    answer=("{text}", IM_END, "\n"),
    stop_controls=("<|im_end|>", "<|im_start|>", "eos"),
    tools=ACTION_CHATML,
)
_ONE_STOP = replace(_CHATML, stop_controls=("<|im_end|>", "eos"), tools=ACTION_BARE)
_QWEN = replace(_ONE_STOP, tools=QWEN_SYSTEM)

LLAMAFACTORY = {
    "llama2": _LLAMA2,
    "llama2_zh": replace(
        _LLAMA2,
        default_system="You are a helpful assistant. "
        "\u4f60\u662f\u4e00\u4e2a\u4e50\u4e8e\u52a9\u4eba\u7684\u52a9\u624b\u3002",
    ),
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "vicuna": _VICUNA,
    "llava": _VICUNA,
    "llava_next": _VICUNA,
    "llava_next_llama3": _LLAMA3,
    "llava_next_mistral": _MISTRAL,
    "llava_next_qwen": replace(_QWEN, default_system="You are a helpful assistant."),
    "llava_next_yi": _ONE_STOP,
    "fewshot": Template(start=(), user=(Pictures(), "{text}"), answer=("{text}\n\n",), end=(LEARNED_EOS,)),
    "alpaca": Template(
        start=(),
        system=("{text}",),
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
        user=("### Instruction:\n", Pictures(), "{text}\n\n### Response:\n"),
        answer=("{text}", EOS, "\n\n"),
        tools=ACTION_BARE,
    ),
    "default": Template(
        start=(),
        system=("System: {text}", EOS, "\n"),
        user=("Human: ", Pictures(), "{text}", EOS, "\nAssistant:"),
        answer=("{text}", EOS, "\n"),
        tools=ACTION_BARE,
    ),
    "chatml": _CHATML,
    "chatml_de": replace(_CHATML, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "empty": Template(start=(), system=("{text}",), user=(Pictures(), "{text}"), answer=("{text}",), tools=ACTION_BARE),
    "qwen": replace(_QWEN, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "yi": _ONE_STOP,
}
LLAMAFACTORY_ALIASES: dict[str, str] = {}

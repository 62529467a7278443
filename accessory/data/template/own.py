"""Accessory's own templates: the reference's, Meta's, and LLaVA's exact prompts.
Knows no conversation: data alone.

Tools: LLaMA 3's and ChatML's models have learned to call them and are asked as they have; Mistral's since its third
tokenizer; Alpaca, Vicuna, LLaMA 2 and the dialog form have not, and get the format that is explained in words. What has
no place for a system text (qg, caption, plain, none, tiny) has none for tools.
"""

from __future__ import annotations

from dataclasses import replace

from accessory.data.template.forms import BOS, EOS, Control, Pictures, Template
from accessory.data.template.tools import ACTION, LLAMA3, MISTRAL, QWEN, QWEN_DIRECT

_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request"
_PAIRED = f"{_TASK}, paired with an input that provides further context. {_WRITE}."
_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
START_HEADER, END_HEADER, EOT = Control("<|start_header_id|>"), Control("<|end_header_id|>"), Control("<|eot_id|>")
IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
INST, END_INST = Control("[INST]", text=True), Control("[/INST]", text=True)
"""Text to LLaMA 2 and Mistral v0.1, v0.2; tokens of their own since v0.3."""

# Alpaca was trained on single exchanges. Here a later exchange starts after the EOS of the answer, with a blank line
# and without a second preamble: an answer ends as it always did, and training on dialogs writes the same.
_ALPACA = Template(
    start=(BOS, Pictures()),
    system=("{text}\n\n",),
    default_system=f"{_TASK}. {_WRITE}.",
    default_system_input=_PAIRED,
    user=("### Instruction:\n{text}\n\n### Response:",),
    user_input=("### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:",),
    answer=("{text}", EOS),
    between=(Pictures(), "\n\n"),
    tools=ACTION,
)
_VICUNA = Template(
    system=("{text} ",),
    default_system=_CURIOUS.format("user"),
    user=("USER: ", Pictures("\n"), "{text}"),
    opening=(" ASSISTANT:",),
    answer=(" {text}", EOS),
    tools=ACTION,
)
_LLAMA2 = Template(
    start=(BOS, INST, " "),
    system=("<<SYS>>\n{text}\n<</SYS>>\n\n",),
    user=(Pictures("\n"), "{strip} ", END_INST),
    user_system=(Pictures("\n"), "{rstrip} ", END_INST),
    answer=(" {strip} ", EOS),
    between=(BOS, INST, " "),
    tools=ACTION,
)
_LLAMA3 = Template(
    system=(START_HEADER, "system", END_HEADER, "\n\n{strip}", EOT),
    user=(START_HEADER, "user", END_HEADER, "\n\n", Pictures("\n"), "{strip}", EOT),
    opening=(START_HEADER, "assistant", END_HEADER, "\n\n"),
    answer=("{strip}", EOT),
    stop_controls=("<|eot_id|>", "<|eom_id|>", "eos"),
    tools=LLAMA3,
)
_CHATML = Template(
    start=(),
    system=(IM_START, "system\n{text}", IM_END, "\n"),
    user=(IM_START, "user\n", Pictures("\n"), "{text}", IM_END, "\n"),
    opening=(IM_START, "assistant\n"),
    answer=("{text}", IM_END),
    between=("\n",),
    end=("\n",),
    stop_controls=("<|im_end|>", "eos"),
    tools=QWEN,
)

OWN: dict[str, Template] = {
    "alpaca": _ALPACA,
    # The signal "\n###" that ends an answer is learned with it; EOS closes the conversation and is not.
    "dialog": Template(
        start=(BOS, Pictures()),
        system=("{text}\n\n",),
        default_system=_CURIOUS.format("human"),
        first=("###",),
        user=(" Human: ", Pictures(), "{text}\n###"),
        opening=(" Assistant:",),
        answer=(" {text}\n###",),
        end=(EOS,),
        stops=("\n###",),
        tools=ACTION,
    ),
    "shortqa": replace(
        _ALPACA,
        default_system=f"{_TASK}. {_WRITE} using a single word or phrase.",
        default_system_input=None,
        user_input=None,
    ),
    "qg": Template(
        start=(BOS, Pictures()),
        user=("Generate a question whose answer is:\n{text}\n\nQuestion:\n",),
        answer=("{text}", EOS),
        between=(Pictures(), "\n\n"),
    ),
    "caption": Template(start=(BOS, Pictures()), user=(), answer=("{text}", EOS), between=(Pictures(),)),
    "none": Template(start=(BOS, Pictures()), user=("{text}",), answer=("{text}", EOS), between=(Pictures(),)),
    # The model that ships with the package.
    "tiny": Template(
        start=(BOS, Pictures()),
        user=("Human: {text}\n",),
        opening=("Assistant:",),
        answer=(" {text}", EOS),
        between=(Pictures(),),
    ),
    "vicuna_v1": _VICUNA,
    "llava_v1": replace(_VICUNA, default_system=_CURIOUS.format("human")),
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "chatml": _CHATML,
    # LLaVA's own, by the names of its conversations; answers as in training, so that later turns follow the same.
    "llava_1_5": replace(_VICUNA, default_system=""),
    "llava_llama_2": replace(
        _LLAMA2,
        user=(Pictures("\n"), "{text} ", END_INST),
        user_system=None,
        answer=(" {text} ", EOS),
        default_system=_HELPFUL,
    ),
    "mistral_instruct": replace(
        _LLAMA2,
        user=(Pictures("\n"), "{text} ", END_INST),
        user_system=None,
        answer=(" {text} ", EOS),
        between=(INST, " "),
        tools=MISTRAL,
    ),
    "chatml_direct": replace(
        _CHATML,
        system=(IM_START, "system\n{text}", IM_END),
        default_system="Answer the questions.",
        user=(IM_START, "user\n", Pictures("\n"), "{text}", IM_END),
        between=(),
        end=(),
        tools=QWEN_DIRECT,
    ),
    "llava_llama_3": replace(_LLAMA3, default_system=_HELPFUL),
    "qwen_1_5": replace(_CHATML, default_system="You are a helpful assistant."),
    # Of projector pretraining: a picture and what it shows.
    "plain": Template(start=(BOS, Pictures()), user=(), answer=("{text}\n",), between=(Pictures(),), stops=("\n",)),
}

OWN_ALIASES = {
    "###": "dialog",
    "default": "dialog",
    "v1": "dialog",
    "conversation": "dialog",
    "vicuna": "vicuna_v1",
    "llava": "llava_v1",
    "llama-2": "llama2",
    "llama2-chat": "llama2",
    "llama-2-chat": "llama2",
    "llama-3": "llama3",
    "llama3-instruct": "llama3",
    "raw": "none",
    "llava_1_6_vicuna": "llava_v1",
    "llava_mistral": "mistral_instruct",
    "llava_yi": "chatml_direct",
    "llava_llama3": "llava_llama_3",
    "llava_qwen": "qwen_1_5",
    "qwen": "qwen_1_5",
    "llava_plain": "plain",
}

"""ms-swift's templates of LLaVA, by its names: LLaVA's exact prompts, which is what these names meant to be.
Knows no conversation: data alone.

ms-swift 2.0 wrote some differently: Yi's picture before its turn, no end of Llama 3's system turn, no new line after a
picture for Qwen, no further turns for Mistral. The models have not seen that in training, so it is not done again.
Tools are written as in the templates of ours that these are.
"""

from __future__ import annotations

from dataclasses import replace

from accessory.data.template.own import OWN

SWIFT = {
    "llava1_5": replace(OWN["llava_1_5"], opening=("\nASSISTANT:",)),
    "llava-vicuna": OWN["llava_v1"],
    "llava-mistral-instruct": OWN["mistral_instruct"],
    "llava-yi-instruct": OWN["chatml_direct"],
    "llama-llava-next": OWN["llava_llama_3"],
    "llava-qwen-instruct": OWN["qwen_1_5"],
    "llava-llama-instruct": OWN["llama3"],
}
SWIFT_ALIASES = {
    "llava1_5-instruct": "llava1_5",
    "llava1_6-vicuna": "llava-vicuna",
    "llava1_6-vicuna-instruct": "llava-vicuna",
    "llava1_6-mistral": "llava-mistral-instruct",
    "llava1_6-mistral-instruct": "llava-mistral-instruct",
    "llava-mistral": "llava-mistral-instruct",
    "llava1_6-yi": "llava-yi-instruct",
    "llava1_6-yi-instruct": "llava-yi-instruct",
    "llava-yi": "llava-yi-instruct",
    "llava1_6-llama3_1-instruct": "llama-llava-next",
    "llama3-llava-next": "llama-llava-next",
    "llama3-llava-next-hf": "llama-llava-next",
    "llama-llava-next-hf": "llama-llava-next",
    "llava-qwen": "llava-qwen-instruct",
    "llama-qwen-hf": "llava-qwen-instruct",
    "llava-next-qwen": "llava-qwen-instruct",
}

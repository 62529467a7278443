"""What the clients of `accessory bench serve` ask: mixed lengths, drawn once; and the folder that every side opens.

Must not know who answers. A letter is a token, so that a text's length is its number of tokens on every side.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

import torch

from accessory.bench.load import write_folder
from accessory.model import LlamaConfig

BLOCK = 8  # requests among which every length between the shortest and the longest is met


@dataclass(frozen=True)
class Ask:
    """One request of a client: the whole answer is generated, since the folder's model has no token to end with."""

    prompt: str
    answer: int
    """Tokens of the answer."""


@dataclass(frozen=True)
class Mix:
    """How long prompts and answers are, in tokens."""

    prompts: tuple[int, int]
    answers: tuple[int, int]

    def asks(self, number: int, *, turn: int) -> list[Ask]:
        """`number` requests; lengths are the same in every turn, texts are new, so that no cache knows them.

        Each BLOCK of them holds one prompt and one answer of each eighth of the range, in no order: a block is as long
        on average as the whole.
        """
        dice, letters = random.Random(0), random.Random(turn + 1)
        asks: list[Ask] = []
        while len(asks) < number:
            prompts, answers = _spread(self.prompts, dice), _spread(self.answers, dice)
            asks += [Ask(text(length, letters), answer) for length, answer in zip(prompts, answers, strict=True)]
        return asks[:number]


def text(length: int, dice: random.Random) -> str:
    """A text of so many tokens, which shares no beginning with another."""
    return "".join(dice.choices(string.ascii_lowercase, k=length))


def ids(said: str) -> list[int]:
    """The tokens of a text."""
    return [ord(letter) - ord("!") for letter in said]  # the first of the letters in their order


def _spread(bounds: tuple[int, int], dice: random.Random) -> list[int]:
    """BLOCK lengths between the bounds, one of each part of the range, shuffled."""
    low, high = bounds
    lengths = [round(low + (part + dice.random()) * (high - low) / BLOCK) for part in range(BLOCK)]
    dice.shuffle(lengths)
    return lengths


def write_model(config: LlamaConfig, folder: Path, *, dtype: torch.dtype) -> None:
    """Random weights of a shape with a tokenizer of letters, as a Hugging Face folder. OSError where it has no room."""
    more = {
        "tokenizer.json": json.dumps(_tokenizer(config.vocab_size)),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}),
        "generation_config.json": json.dumps({"do_sample": False}),  # without it, transformers takes 2 for an end
    }
    write_folder(config, folder, dtype=dtype, more=more)


def _tokenizer(size: int) -> dict:
    """A byte-level BPE without merges: every letter is a token; the other ids are words that no text is read as."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"\u0120t{number}" for number in range(size - len(letters)))][:size]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return json.loads(made.to_str())

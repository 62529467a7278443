"""The tiny model's tokenizer: sentencepiece BPE over generated conversations, and conversations as its ids.
Knows no pictures and no model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from random import Random

import pool as pools
import sentencepiece
import words

from accessory.data.template import Control, Template, Text, Turn, render
from accessory.data.tokenizer import Tokenizer

SIZE = 768
LINES = 40_000


def train_tokenizer(path: Path, *, seed: int) -> None:
    """Write a tokenizer.model; one thread and fixed text, so that it is the same file every time."""
    rng = Random(f"{seed} tokenizer")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines(rng)),
        model_writer=out,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())


def _lines(rng: Random) -> list[str]:
    """Conversations as plain text, in the proportions of training; characters that people type besides."""
    lines = []
    streams = [pools.scene_questions(rng), pools.digit_questions(rng), pools.questions_without_picture(rng)]
    for _ in range(LINES):
        question, answer = next(rng.choices(streams, (75, 12, 13))[0])
        lines.append(f"Human: {question}\nAssistant: {answer}")
    lines += [f"Human: {question}\nAssistant: {words.UNKNOWN} {words.NO_PICTURE}" for question in words.OFF_TOPIC * 20]
    lines += [chr(code) for code in range(32, 127)] * 3
    return lines


def writer(template: Template, tokenizer: Tokenizer) -> Callable[[str, str], list[tuple[int, bool]]]:
    """Returns write(question, answer) -> (id, supervised) tokens of one exchange in `template`, BOS left out."""
    known: dict[str, list[int]] = {}

    def ids(text: str) -> list[int]:
        if text not in known:
            if len(known) > 200_000:
                known.clear()
            known[text] = tokenizer.encode(text)
        return known[text]

    def write(question: str, answer: str) -> list[tuple[int, bool]]:
        turns = [Turn("user", question), Turn("assistant", answer)]
        tokens: list[tuple[int, bool]] = []
        for part in render(template, turns, open_answer=False)[1:]:
            if isinstance(part, Control):
                tokens.append((tokenizer.control(part.name), part.supervised))
            elif isinstance(part, Text):
                # An answer opens with a space, and pieces never cross one: alone or in its run, its ids are the same.
                text = part.text.removeprefix(" ") if part.supervised else part.text
                tokens += [(token, part.supervised) for token in ids(text)]
        return tokens

    return write

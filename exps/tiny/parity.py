"""The new task of the finetuning: is a handwritten digit even or odd? The model before it was never asked.
Knows no pixels."""

from __future__ import annotations

from random import Random

import words

QUESTIONS = ("Is the digit even or odd?", "Is the digit odd or even?", "Even or odd?", "Is this digit even or odd?",
             "Tell me if the digit is even or odd.", "Is the number even or odd?")  # fmt: skip


def ask(rng: Random, digit: int) -> tuple[str, str]:
    """A question as people type it, and its answer."""
    return words.vary(rng, rng.choice(QUESTIONS)), f"The digit is {'odd' if digit % 2 else 'even'}."

"""How answers are chosen, as programs say it: an object with the names that transformers users know.

Must not know models or conversations.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from accessory.config import nearest
from accessory.model import Sampling


@dataclass
class GenerationConfig:
    """Set its fields, or give them to a call by name."""

    max_new_tokens: int = 512
    do_sample: bool | None = None
    """None: where a temperature above 0 is given."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    """Only 1 is there."""
    seed: int | None = None
    """None: drawn anew for each answer from Python's dice, which `seed_everything` sets."""
    stop_words: list[str] = field(default_factory=list)

    def changed(self, **values: Any) -> GenerationConfig:
        """A copy with other values. ValueError for a name that there is not."""
        for name in values:
            if name not in _NAMES:
                raise ValueError(f"{name}: unknown; {nearest(name, _NAMES)}")
        return replace(self, **values)

    def check(self) -> None:
        """ValueError for what cannot be."""
        if self.num_beams != 1:
            raise ValueError(f"num_beams: got {self.num_beams}, expected 1, since there is no beam search")
        if self.do_sample and not self.temperature:
            raise ValueError("temperature: got 0 with do_sample true, expected more than 0; give one")

    def sampling(self) -> Sampling:
        """The engine's form. ValueError for values that cannot be."""
        self.check()
        drawn = bool(self.temperature) and self.do_sample is not False
        return Sampling(
            temperature=self.temperature if drawn else 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=(random.getrandbits(31) if drawn else 0) if self.seed is None else self.seed,
        )


_NAMES = [each.name for each in fields(GenerationConfig)]


def read_generation(given: Any, base: GenerationConfig) -> GenerationConfig:
    """A config of ours, a mapping, or any object with these attributes (transformers' GenerationConfig) as ours.

    What it leaves open (None, or no such attribute) is the base's.
    """
    if given is None:
        return base
    if isinstance(given, GenerationConfig):
        return given
    if isinstance(given, Mapping):
        return base.changed(**{str(name): value for name, value in given.items()})
    told = {name: getattr(given, name, None) for name in _NAMES}
    return replace(base, **{name: value for name, value in told.items() if value is not None})

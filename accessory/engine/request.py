"""What is asked of an engine and what comes back: requests, answers under way, events, results.

Must not know how an answer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from accessory.data.template import Template, Turn
from accessory.model import Sampling

PictureSource = str | Path | bytes | Image
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One question: a conversation that the engine is to continue."""

    turns: Sequence[Turn] | str
    """The conversation so far, a user turn last; plain text is a single user turn with all the pictures."""
    pictures: Sequence[PictureSource] = ()
    """Paths, encoded bytes or PIL images, in the order of the turns."""
    template: Template | str | None = None
    """How the conversation is written; None: as the model was trained. "none" passes text as it is, after BOS."""
    sampling: Sampling = Sampling()
    max_gen_len: int = 128
    """Most tokens to generate; fewer where the window ends before."""
    stops: Sequence[str] = ()
    """Further strings that end the answer and are no part of it."""
    stop_ids: Sequence[int] = ()
    """Further token ids that do."""
    overlong: Literal["error", "truncate"] = "error"
    """truncate: a prompt that leaves no room for max_gen_len tokens loses its oldest text, never BOS or pictures."""
    max_prompt: int | None = None
    """Most positions of the prompt; None: what the window leaves."""


@dataclass(frozen=True)
class Result:
    """A finished answer."""

    text: str
    ids: list[int]
    """The tokens generated; a token that only ended the answer is not among them."""
    finish: Finish
    """stop: a stop token or string; length: max_gen_len or the end of the window; cancelled: by the caller."""
    prompt_tokens: int
    """Positions of the prompt, pictures included."""
    dropped: int = 0
    """Positions of the prompt that truncation left out."""


@dataclass(eq=False)
class Answer:
    """The handle of a submitted request: what has been said so far, and the result once there is one."""

    id: int
    request: Request
    parts: list[str] = field(default_factory=list)
    """The text so far, piece by piece."""
    ids: list[int] = field(default_factory=list)
    result: Result | None = None


@dataclass(frozen=True)
class Event:
    """One token of one answer, perhaps its last."""

    answer: Answer
    token: int
    text: str
    """What the token adds to the text; often a word, perhaps nothing yet."""
    result: Result | None = None

"""What is asked of an engine and what comes back: requests, answers under way, events, results.

Must not know how an answer is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from accessory.data.template import Template, Turn
from accessory.model import Sampling

PictureSource = str | Path | bytes | Image
Finish = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """The language that an answer must be of: its text is in it, or begins one of its texts where length ends it."""

    kind: GrammarKind
    """json_object: any JSON object; json_schema: JSON of a schema; regex: a whole match; choice: one of some texts;
    lark: a grammar in Lark's notation."""
    text: str = ""
    """The schema as JSON; the pattern; a JSON list of strings; the grammar; nothing for json_object."""


@dataclass(frozen=True)
class Odds:
    """How likely the model found a token that was chosen, and which ones it found likeliest.

    All are natural logarithms of the model's own distribution over the whole vocabulary: before temperature, penalties,
    bias and grammar, and the same that `Engine.score` adds up.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, likeliest first (the lowest id of equals), as many as were asked for."""


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
    logprobs: int | None = None
    """None: none; 0 to 20: of each token, and of so many likeliest ones beside it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to logits by token id, -100 to 100; -100 all but forbids a token."""
    grammar: Grammar | None = None
    """What the answer must be of; it ends where its text does, or at one of `stops`; the template's stop strings are
    ordinary text in it."""
    ignore_stops: bool = False
    """Nothing but length ends the answer: what stops others, ids and strings, is ordinary. For measurements."""
    client: str = ""
    """Whose request it is: the queue takes clients in turn."""
    ids: Sequence[int] | None = None
    """The prompt as token ids, as they are, in place of `turns`, which are then ""; without pictures or a template."""


@dataclass(frozen=True)
class Result:
    """A finished answer."""

    text: str
    ids: list[int]
    """The tokens generated; a token that only ended the answer is not among them."""
    finish: Finish
    """stop: a stop token or string, or the grammar's end; length: max_gen_len or the end of the window; cancelled: by
    the caller; error: it could not go on, see `error`."""
    prompt_tokens: int
    """Positions of the prompt, pictures included."""
    dropped: int = 0
    """Positions of the prompt that truncation left out."""
    cached: int = field(default=0, compare=False)
    """Positions of the prompt that were taken from an earlier request's cache."""
    odds: list[Odds] = field(default_factory=list)
    """One for each of `ids` where `logprobs` was asked for, else none."""
    error: str = ""
    """Why it could not go on, where `finish` is "error"."""


@dataclass(eq=False)
class Answer:
    """The handle of a submitted request: what has been said so far, and the result once there is one."""

    id: int
    request: Request
    parts: list[str] = field(default_factory=list)
    """The text so far, piece by piece."""
    ids: list[int] = field(default_factory=list)
    odds: list[Odds] = field(default_factory=list)
    """One for each of `ids` where `logprobs` was asked for, else none."""
    result: Result | None = None


@dataclass(frozen=True)
class Event:
    """One token of one answer, perhaps its last."""

    answer: Answer
    token: int
    text: str
    """What the token adds to the text; often a word, perhaps nothing yet."""
    result: Result | None = None
    odds: Odds | None = None
    """The token's, where `logprobs` was asked for."""

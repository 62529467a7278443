"""Requests to prompts: render, encode, transform pictures, check that all fits; nothing runs here.

Must not know caches, rows or other ranks. Whatever is wrong with a request is said here, before any rank hears of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from accessory.assemble import Bundle, geometry
from accessory.data.encode import Encoded, begins_run, encode, settle, stop_ids, truncate_left
from accessory.data.image import Orientation, load_picture, picture_size
from accessory.data.template import Part, Template, Text, Turn, get_template, render
from accessory.data.tiles import Geometry, Size
from accessory.data.tokenizer import Tokenizer
from accessory.engine.grammar import Grammars, Matcher
from accessory.engine.prefix import digest, keys_of
from accessory.engine.request import PictureSource, Request
from accessory.engine.text import AnswerText

log = logging.getLogger(__name__)

MOST_LOGPROBS, MOST_BIAS = 20, 100


class WindowError(ValueError):
    """A prompt that does not fit the window."""


@dataclass(frozen=True)
class Prompt:
    """A request as numbers."""

    ids: list[int]
    """Token ids; 0 where a picture stands."""
    slots: list[int]
    """-1, or the row of the features of all pictures of this request."""
    pixels: Tensor | None
    """[tiles, 3, side, side] fp32; None without pictures."""
    order: Tensor | None
    """int64: which rows of the stack of all tiles the slots count; None: all, as they stand."""
    keys: np.ndarray
    """int64 [T]: what stands at each position, for the reuse of beginnings (`prefix.keys_of`)."""
    limit: int
    """Tokens that may be generated."""
    stop_ids: frozenset[int]
    text: AnswerText
    dropped: int
    grammar: Matcher | None = None
    """Where the answer stands in the request's grammar; its state, so that a prompt serves one answer."""


class Prompter:
    """Makes prompts for one model and one window."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        window: int,
        image_transform: str | None = None,
        orientation: Orientation = "keep",
        apart: bool = False,
    ) -> None:
        """apart: a picture's features depend, in their last bits, on those read with it: keys tell such apart."""
        self.tokenizer, self.window = bundle.tokenizer, window
        self._apart = apart
        self._vocabulary = min(bundle.tokenizer.size, bundle.config.vocab_size)
        self._template, self._source = bundle.template, bundle.source
        self._own_stops = bundle.stop_ids
        self._grammars = Grammars(bundle.tokenizer)
        self._vision = getattr(bundle.model, "vision", None)
        self._orientation = orientation
        self._geometry, self._before_bos = Geometry(0), False
        if self._vision is not None:
            seen = bundle.vision
            assert seen is not None, "a model that sees has a VisionConfig"
            self._before_bos = seen.before_bos
            self._geometry = geometry(seen, self._vision.slots, image_transform=image_transform)
            self._geometry.check()

    def __call__(self, request: Request) -> Prompt:
        """The prompt of a request.

        Raises WindowError for a prompt longer than the window, ValueError for everything else that cannot be asked,
        FileNotFoundError for a picture that is not there.
        """
        _check(request, self._vocabulary)
        sizes = self._sizes(request)
        form, parts, encoded = self._encode(request, sizes)
        encoded, dropped = self._fit(encoded, request)
        lead, tail = _around(form)
        stops, ends = self._ends(request, form)
        opening = begins_run(parts, self.tokenizer)
        grammar = None
        if request.grammar is not None:  # whose texts end by themselves, and with no more than they say
            tail = ""
            grammar = self._grammars(request.grammar, lead=lead, opening=opening, stop_ids=ends)
        order = self._geometry.order(sizes) if sizes else None
        pixels, digests = self._pixels(request.pictures, sizes)
        counts = self._geometry.count(sizes) if self._geometry.each else []
        return Prompt(
            ids=encoded.ids,
            slots=encoded.slots,
            pixels=pixels,
            order=None if order is None else torch.from_numpy(order),
            keys=keys_of(encoded.ids, encoded.slots, digests, counts),
            limit=min(request.max_gen_len, self.window - len(encoded.ids)),
            stop_ids=ends,
            text=AnswerText(
                self.tokenizer,
                stops=stops,
                opening=opening,
                lead=lead,
                tail=tail,
                shown=_marks(form, request, self.tokenizer),
            ),
            dropped=dropped,
            grammar=grammar,
        )

    def _ends(self, request: Request, form: Template) -> tuple[tuple[str, ...], frozenset[int]]:
        """Strings and ids that end the answer. A grammar's text may hold what the template ends its answers with."""
        if "" in request.stops:
            raise ValueError("stops: got an empty string, expected strings of at least one character; drop it")
        if request.ignore_stops:
            return (), frozenset()
        usual = form.stops if request.grammar is None else ()
        ends = _stop_ids(form, self.tokenizer) | self._own_stops | frozenset(request.stop_ids)
        return tuple(dict.fromkeys((*usual, *request.stops))), ends

    def encode(self, request: Request, *, answer: str | None = None) -> tuple[Template, list[Part], Encoded]:
        """The template, what it makes of the request, and that as numbers; no more than headers of pictures is read.

        answer: what the answer begins with, supervised.
        """
        return self._encode(request, self._sizes(request), answer)

    def places(self, request: Request) -> list[int]:
        """How many positions each picture takes in a row; none where pictures take no place in the sequence."""
        return self._geometry.count(self._sizes(request)) if self._geometry.each else []

    def _encode(
        self, request: Request, sizes: Sequence[Size], answer: str | None = None
    ) -> tuple[Template, list[Part], Encoded]:
        """The same, once the sizes of the pictures are known."""
        if request.ids is not None:
            return self._given(request, list(request.ids), answer)
        template = request.template or self._template
        form = get_template(template) if isinstance(template, str) else template
        turns, counts = self._turns(request), self._geometry.count(sizes)
        if not self._geometry.each:  # pictures that go into an adapter's prompt take no place in the sequence
            turns, counts = [replace(turn, pictures=0) for turn in turns], []
        parts = settle(render(form, turns), self.tokenizer)
        if answer is not None:
            parts = [*parts, Text(_around(form)[0] + answer, supervised=True)]
        encoded = encode(parts, self.tokenizer, slots_per_picture=counts, before_bos=self._before_bos)
        if not encoded.ids:
            raise ValueError("prompt: got no token, expected at least one as this tokenizer has no BOS; say something")
        return form, parts, encoded

    def _given(self, request: Request, ids: list[int], answer: str | None) -> tuple[Template, list[Part], Encoded]:
        """A prompt of ids, which goes on where they end. ValueError for what is no id, and for what they exclude."""
        wrong = [token for token in ids if not 0 <= token < self._vocabulary]
        if wrong or not ids:
            got = f"{wrong[0]}" if wrong else "none"
            raise ValueError(f"ids: got {got}, expected one or more token ids from 0 to {self._vocabulary - 1}")
        if request.turns or request.pictures or answer is not None:
            raise ValueError("ids: got them with turns, pictures or a text to score, expected ids alone; give one")
        text = self.tokenizer.decode(ids)
        return get_template("none"), [Text(text)], Encoded(ids, [-1] * len(ids), [False] * len(ids), text)

    def _sizes(self, request: Request) -> list[Size]:
        """Width and height of each picture, (1, 1) where they decide nothing."""
        self._turns(request)
        if not self._geometry.varies:
            return [(1, 1)] * len(request.pictures)
        return [picture_size(picture, orientation=self._orientation) for picture in request.pictures]

    def _turns(self, request: Request) -> list[Turn]:
        """The turns, whose pictures are all there."""
        supplied = len(request.pictures)
        if isinstance(request.turns, str):
            turns = [Turn("user", request.turns, pictures=supplied)]
        else:
            turns = list(request.turns)
        placed = sum(turn.pictures for turn in turns)
        if placed != supplied:
            raise ValueError(f"pictures: got {supplied}, but the turns speak of {placed}; supply one for each")
        if supplied and self._vision is None:
            raise ValueError(f"pictures: got {supplied}, but {self._source} has no vision; ask without pictures")
        if supplied > 1 and not self._vision.slots:
            raise ValueError(
                f"pictures: got {supplied}, but {self._source} reads one picture per conversation; give one"
            )
        return turns

    def _fit(self, encoded: Encoded, request: Request) -> tuple[Encoded, int]:
        """The prompt within the window, and how many positions that cost."""
        length, own = len(encoded.ids), request.max_prompt or self.window
        if request.overlong == "truncate":
            room = min(self.window - request.max_gen_len, own)
            if room < 1:
                raise WindowError(
                    f"max_gen_len: got {request.max_gen_len}, expected less than the window of {self.window} tokens"
                )
            try:
                encoded = truncate_left(encoded, limit=room)
            except ValueError as error:
                raise WindowError(str(error)) from error
            if length > room:
                log.warning("the prompt of %d tokens lost its oldest %d to fit", length, length - room)
        elif own < self.window and length > own:
            raise WindowError(
                f"prompt: got {length} tokens, expected at most {own}; shorten it, or raise max_length or cutoff_len"
            )
        elif length >= self.window:
            raise WindowError(
                f"prompt: got {length} tokens, expected at most {self.window - 1} in a window of {self.window}; "
                "shorten it, let it be truncated or raise max_seq_len"
            )
        return encoded, length - len(encoded.ids)

    def _pixels(self, pictures: Sequence[PictureSource], sizes: Sequence[Size]) -> tuple[Tensor | None, list[int]]:
        """All pictures as the tower takes them, and a digest of each."""
        if not pictures:
            return None, []
        parts = []
        for picture, size in zip(pictures, sizes, strict=True):
            image = load_picture(picture, orientation=self._orientation)
            if self._geometry.varies and image.size != size:
                raise ValueError(
                    f"picture: got {image.width} x {image.height} pixels, expected the {size[0]} x {size[1]} that its"
                    " header says; save or fetch it again"
                )
            parts.append(self._geometry.pixels(image))
        # a blank picture's pixels do not tell its size, which decides what its margins are
        marks = [digest(repr(size).encode(), part.numpy().tobytes()) for size, part in zip(sizes, parts, strict=True)]
        if self._apart:
            marks = [digest(repr(marks).encode(), repr(mark).encode()) for mark in marks]
        return torch.cat(parts), marks


def _check(request: Request, vocabulary: int) -> None:
    """ValueError for numbers that mean nothing."""
    if request.max_gen_len < 1:
        raise ValueError(f"max_gen_len: got {request.max_gen_len}, expected at least 1")
    if request.overlong not in ("error", "truncate"):
        raise ValueError(f"overlong: got {request.overlong!r}, expected 'error' or 'truncate'")
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
        raise ValueError(f"logprobs: got {request.logprobs}, expected none, or a number from 0 to {MOST_LOGPROBS}")
    for token, bias in request.logit_bias.items():
        if not 0 <= token < vocabulary:
            raise ValueError(f"logit_bias: got token id {token}, expected 0 to {vocabulary - 1}")
        if not (math.isfinite(bias) and -MOST_BIAS <= bias <= MOST_BIAS):
            raise ValueError(f"logit_bias: got {bias} for token {token}, expected -{MOST_BIAS} to {MOST_BIAS}")


def _around(form: Template) -> tuple[str, str]:
    """What the template writes before and after an answer's text, up to the first control token."""
    lead, tail = "", ""
    for item in form.answer:
        if not isinstance(item, str):
            break
        before, slot, after = item.partition("{")
        if slot:
            lead, tail = lead + before, after.partition("}")[2]
        else:
            tail += item
    return lead, tail


def _marks(form: Template, request: Request, tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens that are a part of the answer's text: where there are tools, those that calls are told by."""
    turns = () if isinstance(request.turns, str) else request.turns
    if form.tools is None or not any(turn.role in ("tools", "function") for turn in turns):
        return {}
    known = {tokenizer.control(name): name for name in form.tools.controls if tokenizer.has(name)}
    return {token: name for token, name in known.items() if not tokenizer.piece_bytes(token)}


def _stop_ids(form: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """The template's and the tokenizer's; none where neither has any: then length or strings end the answer."""
    try:
        found = stop_ids(form, tokenizer)
    except ValueError:
        found = frozenset()
    return found if tokenizer.eos_id is None else found | {tokenizer.eos_id}

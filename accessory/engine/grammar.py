"""Grammars of answers: JSON, schemas, patterns and the like to the tokens that may come next, by llguidance.

Must not know models, sampling or scheduling. What counts is the bytes that an id adds to a text; control tokens add
none and are never a part of an answer that has a grammar.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections import OrderedDict
from collections.abc import Collection
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from accessory.data.tokenizer import Tokenizer
from accessory.engine.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)

MOST_TEXT, MOST_DEPTH, MOST_CHOICES, MOST_MULTIPLE = 1 << 16, 64, 1024, 10_000
_KEPT, _TRIED = 32, 16
_SPACE = r" |\n[ \t]{0,32}"  # a model that is unsure would go on with blanks for ever
_LIMITS = {
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Grammars:
    """Compiles grammars for one tokenizer, on any thread; the latest are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: _Pieces | None = None
        self._kept: OrderedDict[tuple[Grammar, str], LLMatcher] = OrderedDict()
        self._making, self._keeping = Lock(), Lock()

    def __call__(
        self, grammar: Grammar, *, lead: str = "", opening: bool = False, stop_ids: Collection[int] = ()
    ) -> Matcher:
        """A matcher for one answer.

        lead: what the answer's ids say before its text begins, such as the template's space. opening: the answer
        begins a text (see `Tokenizer.decode`). stop_ids: ids that end the answer. Raises ValueError for a grammar that
        is none, is not supported or too large, and where llguidance is missing.
        """
        pieces = self._read()
        with self._keeping:
            made = self._kept.get((grammar, lead))
            if made is not None:
                self._kept.move_to_end((grammar, lead))
        if made is None:
            made = _compile(pieces.tokenizer, grammar, lead)
            with self._keeping:
                self._kept[grammar, lead] = made
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        with self._keeping:  # nobody else moves it while it is copied
            own = made.deep_copy()
        matcher = Matcher(own, pieces, grammar.kind, opening=opening, stop_ids=stop_ids)
        if matcher.done or not matcher.possible:
            raise ValueError(f"{grammar.kind}: got one that no token can begin, expected one that says something")
        return matcher

    def _read(self) -> _Pieces:
        """The tokenizer's bytes, read once."""
        with self._making:
            if self._pieces is None:
                self._pieces = _Pieces(self._tokenizer)
            return self._pieces


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(
        self, inner: LLMatcher, pieces: _Pieces, kind: str, *, opening: bool, stop_ids: Collection[int]
    ) -> None:
        self._inner, self._pieces, self._kind = inner, pieces, kind
        self._first, self._begun = opening, False
        self._stops = np.array(sorted(token for token in stop_ids if token < len(pieces.later)), dtype=np.int64)
        self._error = ""
        self._seen: tuple[np.ndarray, bool] | None = None

    @property
    def possible(self) -> bool:
        """Whether something can follow, be it the end."""
        allowed, may_end = self._look()
        return may_end or bool(allowed.any())

    @property
    def done(self) -> bool:
        """Whether the end alone can follow."""
        allowed, may_end = self._look()
        return may_end and not allowed.any()

    def allowed(self) -> Tensor:
        """Which ids may come next: bool [tokenizer's size]; stop ids do exactly where the text may end.

        Raises ValueError where the library gave up, or no id of this tokenizer goes on.
        """
        allowed, may_end = self._look()
        if self._error:
            raise ValueError(f"{self._kind}: the answer cannot go on ({self._error}); simplify the grammar")
        told = allowed.copy()
        told[self._stops] = may_end
        if not told.any():
            raise ValueError(
                f"{self._kind}: the answer cannot go on, as no token of the model fits; change the grammar"
            )
        return torch.from_numpy(told)

    def push(self, token: int) -> None:
        """Take a token that was chosen. One that does not fit is an error at the next `allowed`."""
        if self._error:
            return
        table = self._pieces.first if self._first else self._pieces.later
        piece = int(table[token])
        if piece != _NOTHING and not self._inner.consume_token(piece):
            self._error = _reason(self._inner.get_error()) or f"token {token} is not of it"
        elif piece == _NOTHING and not (self._first and not self._begun):
            self._error = f"token {token} is not of it"
        said = b" " if piece != _NOTHING else b""
        self._first = self._first and self._pieces.source.still_first(token, said)
        self._begun, self._seen = True, None

    def _look(self) -> tuple[np.ndarray, bool]:
        """Which ids [size] may come next, stop ids apart, and whether the text may end here."""
        if self._seen is None:
            size = len(self._pieces.later)
            told = b"" if self._error else self._inner.compute_bitmask()
            if not self._error and self._inner.is_error():
                self._error = _reason(self._inner.get_error())
            if self._error:
                self._seen = np.zeros(size, dtype=bool), False
                return self._seen
            bits = np.unpackbits(np.frombuffer(told, dtype=np.uint8), bitorder="little").view(bool)
            bits[_NOTHING] = False
            allowed = bits[self._pieces.first if self._first else self._pieces.later]
            if self._first and not self._begun:
                allowed |= self._pieces.blank
            self._seen = allowed, bool(bits[self._pieces.end])
        return self._seen


_NOTHING = 0  # the number of the piece of ids that say nothing


class _Pieces:
    """What ids add to a text, each string of bytes once: ids that spell the same are one piece to the library."""

    def __init__(self, source: Tokenizer) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise ValueError(
                "grammar: got no llguidance in this Python, expected it for answers in a grammar; "
                "pip install 'accessory[serve]'"
            ) from error
        self.source = source
        numbers: dict[bytes, int] = {b"": _NOTHING}
        mute = source.controls | source.unsaid
        tables = np.full((2, source.size), _NOTHING, dtype=np.int64)
        for token in range(source.size):
            if token not in mute:
                for place, first in enumerate((False, True)):
                    piece = source.piece_bytes(token, first=first)
                    if b"\xff" not in piece:  # no text has this byte, and the library marks special tokens by it
                        tables[place, token] = numbers.setdefault(piece, len(numbers))
        self.later, self.first = tables
        self.blank = (self.first == _NOTHING) & (self.later != _NOTHING)
        """Ids whose space is taken away where they begin a text, so that nothing is left."""
        self.end = len(numbers)
        self.tokenizer: LLTokenizer = LLTokenizer(
            _Wrapper([*numbers, b""], self.end), n_vocab=len(numbers) + 1, eos_token=self.end
        )


class _Wrapper:
    """A table of pieces as the library reads it; it never asks for ids of a text, as no grammar forces tokens."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes], end: int) -> None:
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, end, [end]

    def __call__(self, text: str | bytes) -> list[int]:
        return []


def _compile(tokenizer: LLTokenizer, grammar: Grammar, lead: str) -> LLMatcher:
    """The library's matcher. ValueError in one sentence."""
    from llguidance import LLMatcher, LLParserLimits

    if len(grammar.text.encode(errors="replace")) > MOST_TEXT:
        raise ValueError(f"{grammar.kind}: got more than {MOST_TEXT} bytes of text, expected fewer; shorten it")
    made = LLMatcher(tokenizer, _source(grammar, lead), log_level=0, limits=LLParserLimits(**_LIMITS))
    if error := _try(made, tokenizer.eos_token):
        raise ValueError(f"{grammar.kind}: got one that cannot be enforced ({error}); change or simplify it")
    for warning in made.get_grammar_warnings():
        log.warning("%s: %s", grammar.kind, warning)
    return made


def _try(made: LLMatcher, end: int) -> str:
    """Why a grammar is of no use, or one whose first tokens overrun a limit, before any answer depends on it."""
    probe, dice = made.deep_copy(), random.Random(0)
    for step in range(_TRIED):
        bits = np.frombuffer(b"" if probe.is_error() else probe.compute_bitmask(), dtype=np.uint8)
        if probe.is_error():
            stuck = step and "NoExtension" in probe.get_error()  # other ways may go on
            return "" if stuck else _reason(probe.get_error())
        pieces = np.unpackbits(bits, bitorder="little").nonzero()[0]
        pieces = pieces[pieces != end]
        if not len(pieces):
            return ""
        probe.consume_token(int(dice.choice(pieces)))
    return ""


def _source(grammar: Grammar, lead: str) -> str:
    """The grammar in the library's notation: the lead, then one text of the language.

    Forcing is off, as the library would else allow one spelling of a text alone, and it does not know our tokenizers'.
    """
    if grammar.kind in ("json_schema", "lark"):
        _count(grammar.text)
    start = f'%llguidance {{"no_forcing": true}}\nstart: {_string(lead) if lead else ""} '
    if grammar.kind == "lark":
        inner = {"name": "answer", "lark_grammar": grammar.text}
        return json.dumps({"grammars": [{"name": "all", "lark_grammar": start + "@answer"}, inner]})
    return start + "answer\n" + _rule(grammar)


def _rule(grammar: Grammar) -> str:
    """The rule of the answer itself."""
    if grammar.kind == "json_object":
        return "answer: %json " + json.dumps({"type": "object"} | _guided({}))
    if grammar.kind == "json_schema":
        return "answer: %json " + json.dumps(_schema(grammar.text))
    if grammar.kind == "regex":
        from llguidance import regex_to_lark

        return "answer: ANSWER\nANSWER: /" + regex_to_lark(grammar.text).replace("\n", "\\n") + "/"
    if grammar.kind == "choice":
        return "answer: ANSWER\nANSWER: " + " | ".join(_string(text) for text in _choices(grammar.text))
    raise ValueError(
        f"grammar: got kind {grammar.kind!r}, expected json_object, json_schema, regex, choice or lark; choose one"
    )


def _string(text: str) -> str:
    """A string in Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def _schema(text: str) -> dict[str, Any]:
    """A schema that was read and checked as far as JSON goes."""
    found = _json("json_schema", text)
    if isinstance(found, bool):
        found = {} if found else {"enum": []}
    if not isinstance(found, dict):
        raise ValueError(f"json_schema: got a {type(found).__name__}, expected a JSON object; give a schema")
    waiting: list[tuple[Any, int]] = [(found, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise ValueError(f"json_schema: got more than {MOST_DEPTH} levels, expected fewer; flatten it with $defs")
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(value, depth + 1) for value in inner]
    return found | _guided(found.get("x-guidance"))


def _guided(told: Any) -> dict[str, Any]:
    """The library's options, which a schema may carry: nothing is forgiven, and blanks come to an end."""
    if told:
        raise ValueError("json_schema: got x-guidance, expected a plain schema; drop it")
    return {"x-guidance": {"lenient": False, "whitespace_pattern": _SPACE}}


def _count(text: str) -> None:
    """ValueError for `multipleOf` of so much that the library would take gigabytes to count up to it."""
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    told = re.findall(r'"multipleOf"\s*:\s*([-+.\deE]+)', plain)
    parts = [re.fullmatch(r"(\d{1,9})(?:\.(\d{1,9}))?", number) for number in told]
    points = max((len(part[2] or "") for part in parts if part), default=0)
    steps = [int(part[1] + (part[2] or "").ljust(points, "0")) if part else MOST_MULTIPLE + 1 for part in parts]
    together = math.lcm(*steps) if re.search('"(all|any|one)Of"|"\\$ref"', plain) else max(steps, default=1)
    if together // math.gcd(together, 10**points) > MOST_MULTIPLE:
        raise ValueError(
            f"multipleOf: got {', '.join(told[:4])}, expected plain numbers that take few digits, alone and together;"
            " check the answer instead"
        )


def _choices(text: str) -> list[str]:
    """The texts of a choice."""
    found = _json("choice", text)
    fine = isinstance(found, list) and all(isinstance(item, str) and item for item in found)
    if not fine or not 0 < len(found) <= MOST_CHOICES:
        raise ValueError(
            f"choice: got {text[:60]!r}, expected a JSON list of 1 to {MOST_CHOICES} texts of at least one character"
        )
    return found


def _json(kind: str, text: str) -> Any:
    """JSON, strictly read."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind}: got a text that is no JSON ({error}); mend it") from error


def _reason(error: str) -> str:
    """The library's complaint on one line, without the excerpt of a source that the user did not write."""
    error = re.split(r"\n\s*\d+ \|", error)[0].replace("<non-verbose/>", "")
    if "NoExtension" in error:
        return "no token of the model fits"
    error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error)
    return " ".join(error.split())[:300].rstrip(".") or "no reason given"

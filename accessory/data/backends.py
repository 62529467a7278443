"""Tokenizer libraries made alike: sentencepiece and tiktoken (Llama 3) here, tokenizers in tokenizer_json.
Knows no conversation and no files: bytes of a tokenizer file come in, `tokenizer.py` names what goes out.

Every backend keeps control tokens out of plain text by construction, each in its library's way: sentencepiece matches
symbols that the model's author "defined", so markers among them are made control symbols first; `tokenizers` matches
added tokens, so its copy for plain text is built without them; tiktoken is asked for ordinary encoding.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from typing import Any

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z][A-Z_]*\]")

# Numbers of the fields that are read of sentencepiece's ModelProto and its messages, and of two piece types.
_PIECES, _NORMALIZER, _TYPE, _USER_DEFINED, _CONTROL = 1, 3, 3, 4, 3
_CHARACTERS, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4
_TRAINER, _MODEL_TYPE, _BPE = 2, 3, 2
_PICTURES = ("<image>", "<|image|>", "<|image_pad|>", "<im_patch>", "<im_start>", "<im_end>")
_NO_PREFIX = bytes([_NORMALIZER << 3 | 2, 2, _DUMMY_PREFIX << 3, 0])  # a message that comes twice is merged


class SentencePieceBackend:
    """A sentencepiece model (BPE or unigram), with tokens added beside it by `added_tokens.json`, if any."""

    def __init__(self, data: bytes, beside: dict[str, Any]) -> None:
        import sentencepiece

        added = beside.get("added", {})
        data, flags = _retype_markers(data, added)
        self._data = data
        self._model = model = self._later = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
        self.goes_on: frozenset[str] = frozenset()
        if beside.get("legacy") is False and flags.get(_DUMMY_PREFIX, 1):
            # "legacy: false" says that only a text's first run has a dummy space. LLaVA's own code (llava_llama,
            # llava_mistral, ...) has texts without BOS, and what follows a picture is a text of its own to it.
            own = str(beside.get("model_type", "")).startswith("llava_") and beside["model_type"] != "llava_next"
            self.goes_on = frozenset({"control"} if own else {"bos", "control", "picture"})
            self._later = sentencepiece.SentencePieceProcessor()
            self._later.LoadFromSerializedProto(data + _NO_PREFIX)
        pieces = model.get_piece_size()
        self.unknown = model.unk_id()
        self.prefixed = bool(flags.get(_DUMMY_PREFIX, 1))
        self.has_bytes = any(model.is_byte(i) for i in range(pieces))
        self.names = {model.id_to_piece(i): i for i in range(pieces) if model.is_control(i)}
        self.names |= {text: i for text, i in added.items() if i >= pieces}
        self.size = max([pieces, *(i + 1 for i in self.names.values())])
        self.hidden = frozenset(self.names.values())
        self.bos, self.eos, self.pad = (
            self.names.get(beside.get(f"{role}_token", ""), own if own >= 0 else None)
            for role, own in (("bos", model.bos_id()), ("eos", model.eos_id()), ("pad", model.pad_id()))
        )
        holes = set(range(pieces, self.size)) - set(self.names.values())
        self.unsaid = unsaid(self.names, self.pad, {self.bos, self.eos}, holes)
        self.trims_all = bool(flags.get(_EXTRA_SPACES, 1))
        self._trims = self.trims_all or self.prefixed

    def ids(self, text: str, *, goes_on: bool) -> list[int]:
        return (self._later if goes_on else self._model).encode(text)

    def spans(self, text: str, *, goes_on: bool) -> list[tuple[int, int, int]]:
        # The serialized answer is the one form that every release has, and its offsets are bytes.
        answer = (self._later if goes_on else self._model).encode(text, out_type="serialized_proto")
        at = _characters(text)
        found: list[tuple[int, int, int]] = []
        for field, start, stop, _ in _fields(answer, 0, len(answer)):
            if field == 2:
                piece = {number: value for number, _, _, value in _fields(answer, start, stop)}
                begin, end = piece.get(4, 0), piece.get(5, 0)
                found.append((piece.get(2, 0), at[begin], at[end - 1] + 1 if end > begin else at[begin]))
        for i in range(len(found) - 2, -1, -1):  # bytes of one character: only the last one has its span
            token, start, stop = found[i]
            if start == stop and self._model.is_byte(token):
                found[i] = (token, *found[i + 1][1:])
        return found

    def pieces(self) -> list[tuple[str, float]] | None:
        """Pieces and scores by id; None for a model that is no BPE, or does to texts what LLaMA's does not."""
        told: dict[int, dict[int, tuple[int, int | None]]] = {}
        for field, start, stop, _ in _fields(self._data, 0, len(self._data)):
            if field in (_TRAINER, _NORMALIZER):
                told[field] = {n: (end - begin, value) for n, begin, end, value in _fields(self._data, start, stop)}
            elif field == _PIECES and self._data.startswith(bytes([_TYPE << 3, _USER_DEFINED]), stop - 2):
                return None
        trainer, normalizer = told.get(_TRAINER, {}), told.get(_NORMALIZER, {})
        rewrites = normalizer.get(_CHARACTERS, (0, None))[0] > 0 or normalizer.get(_EXTRA_SPACES, (0, 1))[1]
        if rewrites or trainer.get(_MODEL_TYPE, (0, 1))[1] != _BPE:
            return None
        return [(self._model.id_to_piece(i), self._model.get_score(i)) for i in range(self._model.get_piece_size())]

    def piece(self, token: int, *, first: bool) -> bytes:
        if token >= self._model.get_piece_size():
            return b""
        if token == self.unknown:
            return " \u2047 ".encode()
        text = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(BYTE.fullmatch(text)[1], 16)])
        if first and self._trims:
            text = text.removeprefix(SPACE)
        return text.replace(SPACE, " ").encode()


def _retype_markers(data: bytes, added: dict[str, int]) -> tuple[bytes, dict[int, Any]]:
    """The model with user-defined markers (`<|im_start|>`, `[INST]`) as control symbols, and its normalizer's flags."""
    changed = bytearray(data)
    flags: dict[int, Any] = {}
    for field, start, stop, _ in _fields(data, 0, len(data)):
        if field == _NORMALIZER:
            flags = {number: value for number, _, _, value in _fields(data, start, stop)}
        elif field == _PIECES and data.startswith(b"\x18\x04", stop - 2):
            text, place = "", None
            for number, first, last, value in _fields(data, start, stop):
                if number == 1:
                    text = data[first:last].decode("utf-8")
                elif number == _TYPE and value == _USER_DEFINED:
                    place = first
            if place is not None and (MARKER.fullmatch(text) or text in added):
                changed[place] = _CONTROL
    return bytes(changed), flags


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int | None]]:
    """Fields of a protobuf message: (number, start, stop of the payload, value of a varint)."""
    while start < stop:
        key, start = _varint(data, start)
        kind, value = key & 7, None
        if kind == 0:
            value, end = _varint(data, start)
        elif kind == 2:
            size, start = _varint(data, start)
            end = start + size
        elif kind in (1, 5):
            end = start + (8 if kind == 1 else 4)
        else:
            raise ValueError("the file is no protobuf message")
        if end > stop:
            raise ValueError("the file is cut short or no protobuf message")
        yield key >> 3, start, end, value
        start = end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf varint and the place after it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("the file is cut short or no protobuf message")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def unsaid(names: dict[str, int], pad: int | None, ends: set[int | None], holes: set[int]) -> frozenset[int]:
    """Ids that no answer can hold: holes of the numbering, padding that ends nothing, and places of pictures."""
    places = {number for text, number in names.items() if text in _PICTURES}
    return frozenset(holes | places | ({pad} if pad is not None and pad not in ends else set()))


class TiktokenBackend:
    """Meta's Llama 3 rank file: lines of base64 and rank, then 256 control tokens as Llama 3.1 names them.

    Llama 3 left 128002-128005, 128008 and 128010 on "reserved"; the ids of every token in use are the same.
    """

    trims_all = False
    goes_on: frozenset[str] = frozenset()
    SPLIT = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    _NAMED = (
        "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id "
        "start_header_id end_header_id eom_id eot_id python_tag image"
    ).split()

    def __init__(self, data: bytes) -> None:
        import tiktoken

        ranks = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                word, rank = line.split()
                ranks[base64.b64decode(word, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"line {number} is not base64 and a rank ({error})") from error
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"its {len(ranks)} ranks are not 0 to {len(ranks) - 1}, so lines are missing or doubled")
        self._model = tiktoken.Encoding("llama3", pat_str=self.SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.ranks = ranks
        texts = self._NAMED + [f"reserved_special_token_{i}" for i in range(2, 2 + 256 - len(self._NAMED))]
        self.names = {f"<|{text}|>": len(ranks) + i for i, text in enumerate(texts)}
        self.size = len(ranks) + len(texts)
        self.hidden = frozenset(self.names.values())
        self.bos, self.eos, self.pad = (len(ranks) + i for i in (0, 1, 4))
        self.unsaid = unsaid(self.names, self.pad, {self.bos, self.eos}, set())

    def ids(self, text: str, *, goes_on: bool) -> list[int]:
        return [token for part in _parts(text) for token in self._model.encode_ordinary(part)]

    def spans(self, text: str, *, goes_on: bool) -> list[tuple[int, int, int]]:
        at = _characters(text)
        found, begin = [], 0
        for token in self.ids(text, goes_on=goes_on):
            end = begin + len(self._model.decode_single_token_bytes(token))
            found.append((token, at[begin], at[end - 1] + 1))
            begin = end
        return found

    def piece(self, token: int, *, first: bool) -> bytes:
        return self._model.decode_single_token_bytes(token)


def _parts(text: str, *, longest: int = 400_000, run: int = 25_000) -> Iterator[str]:
    """Cut a text as Meta's Llama 3 tokenizer does: every 400,000 characters, and 25,000 into an unmixed run of blanks
    or of other characters."""
    if len(text) <= run:
        yield text
        return
    for start in range(0, len(text), longest):
        chunk, cut = text[start : start + longest], 0
        for match in re.finditer(rf"\s{{1,{run}}}|\S{{1,{run}}}", chunk):
            end = match.end()
            if end - match.start() == run and end < len(chunk) and chunk[end].isspace() == chunk[end - 1].isspace():
                yield chunk[cut:end]
                cut = end
        yield chunk[cut:]


def _characters(text: str) -> Sequence[int]:
    """For each byte of a text in UTF-8, and for its end, the number of its character."""
    if text.isascii():
        return range(len(text) + 1)
    at: list[int] = []
    for number, letter in enumerate(text):
        code = ord(letter)
        at += [number] * (1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4)
    return [*at, len(text)]

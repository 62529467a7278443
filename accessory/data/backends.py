"""The three tokenizer libraries made alike: sentencepiece, tokenizers (tokenizer.json), tiktoken (Llama 3).
Knows no conversation and no files: bytes of a tokenizer file come in, `tokenizer.py` names what goes out.

Every backend keeps control tokens out of plain text by construction, each in its library's way: sentencepiece matches
symbols that the model's author "defined", so markers among them are made control symbols first; `tokenizers` matches
added tokens, so its copy for plain text is built without them; tiktoken is asked for ordinary encoding.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z][A-Z_]*\]")

# Numbers of the fields that are read of sentencepiece's ModelProto and its messages, and of two piece types.
_PIECES, _NORMALIZER, _TYPE, _USER_DEFINED, _CONTROL = 1, 3, 3, 4, 3
_DUMMY_PREFIX, _EXTRA_SPACES = 3, 4


class SentencePieceBackend:
    """A sentencepiece model (BPE or unigram), with tokens added beside it by `added_tokens.json`, if any."""

    def __init__(self, data: bytes, beside: dict[str, Any]) -> None:
        import sentencepiece

        added = beside.get("added", {})
        data, flags = _retype_markers(data, added)
        self._model = model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
        pieces = model.get_piece_size()
        self._unknown = model.unk_id()
        self.names = {model.id_to_piece(i): i for i in range(pieces) if model.is_control(i)}
        self.names |= {text: i for text, i in added.items() if i >= pieces}
        self.size = max([pieces, *(i + 1 for i in self.names.values())])
        self.hidden = frozenset(self.names.values())
        self.bos, self.eos, self.pad = (
            self.names.get(beside.get(f"{role}_token", ""), own if own >= 0 else None)
            for role, own in (("bos", model.bos_id()), ("eos", model.eos_id()), ("pad", model.pad_id()))
        )
        self.trims_all = bool(flags.get(_EXTRA_SPACES, 1))
        self._trims = self.trims_all or bool(flags.get(_DUMMY_PREFIX, 1))

    def ids(self, text: str) -> list[int]:
        return self._model.encode(text)

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        # The serialized answer is the one form that every release has, and its offsets are bytes.
        answer = self._model.encode(text, out_type="serialized_proto")
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

    def piece(self, token: int, *, first: bool) -> bytes:
        if token >= self._model.get_piece_size():
            return b""
        if token == self._unknown:
            return " \u2047 ".encode()
        text = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(_BYTE.fullmatch(text)[1], 16)])
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
            if place is not None and (_MARKER.fullmatch(text) or text in added):
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


class JsonBackend:
    """A `tokenizer.json` (BPE or unigram). Added tokens that are special or look like markers are control tokens."""

    trims_all = False

    def __init__(self, content: dict[str, Any], beside: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        model = content.get("model") or {}
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind not in ("BPE", "Unigram"):
            raise ValueError(f"its model is {kind}, and only BPE and Unigram are read")
        self._read_decoder(content)
        added = content.get("added_tokens") or []
        vocab = model["vocab"]
        words = vocab if isinstance(vocab, dict) else {word: i for i, (word, _) in enumerate(vocab)}
        roles = {beside.get(f"{role}_token") for role in ("bos", "eos", "pad")} - {None}
        special = [t for t in added if t["special"] or t["content"] in roles or _MARKER.fullmatch(t["content"])]
        self.names = {text: words[text] for text in roles if text in words} | {t["content"]: t["id"] for t in special}
        self.hidden = frozenset(self.names.values()) - {t["id"] for t in special if not t["special"]}
        self.names.pop(_unknown_text(model), None)  # plain text may well be unknown
        self.bos, self.eos, self.pad = (self._role(role, beside) for role in ("bos", "eos", "pad"))
        self.size = max([-1, *words.values(), *(t["id"] for t in added)]) + 1

        kept = [t for t in added if t not in special]
        plain = content | {
            "model": _without(model, set(self.names)),
            "added_tokens": kept,
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._plain = Tokenizer.from_str(json.dumps(plain))
        # tokenizers numbers added tokens anew when some are gone, so their true ids are put back.
        self._true = {self._plain.token_to_id(t["content"]): t["id"] for t in kept}
        self._shown = {t["id"]: t["content"].encode() for t in added}

    def ids(self, text: str) -> list[int]:
        ids = self._plain.encode(text.replace(_UNTYPED, "\ufffd"), add_special_tokens=False).ids
        return [self._true.get(i, i) for i in ids] if self._true else ids

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        found = self._plain.encode(text.replace(_UNTYPED, "\ufffd"), add_special_tokens=False)
        return [(self._true.get(i, i), *span) for i, span in zip(found.ids, found.offsets, strict=True)]

    def piece(self, token: int, *, first: bool) -> bytes:
        if token in self._shown:
            return self._shown[token]
        text = self._plain.id_to_token(token)
        if text is None:  # a hole in the numbering
            return b""
        if self._byte_level:
            return _byte_level(text)
        for old, new in self._replace:
            text = text.replace(old, new)
        byte = _BYTE.fullmatch(text) if self._byte_fallback else None
        if byte:
            text_bytes = bytes([int(byte[1], 16)])
        else:
            text_bytes = text.encode()
        if first and self._trim:
            return text_bytes.lstrip(b" ") if self._trim == "all" else text_bytes.removeprefix(b" ")
        return text_bytes

    def _read_decoder(self, content: dict[str, Any]) -> None:
        """How pieces become bytes: byte level, or words with a space mark and perhaps byte pieces."""
        decoder = content.get("decoder") or content.get("pre_tokenizer") or {}
        steps = decoder.get("decoders") or decoder.get("pretokenizers") or [decoder]
        self._byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        self._replace: list[tuple[str, str]] = []
        self._byte_fallback, self._trim = False, ""
        for step in [] if self._byte_level else steps:
            kind = step.get("type")
            if kind == "Replace" and "String" in step["pattern"]:
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace":
                self._replace.append((step["replacement"], " "))
                prefixed = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                self._trim = "" if prefixed == "never" else "all"
            elif kind == "Strip" and step["content"] == " " and step["start"] <= 1 and not step["stop"]:
                self._trim = "one" if step["start"] else ""
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind != "Fuse":
                raise ValueError(f"its decoder step {kind} is unknown; ByteLevel, Metaspace and Llama's steps are read")

    def _role(self, role: str, beside: dict[str, Any]) -> int | None:
        """The id of BOS, EOS or padding: as the folder says, else by the usual names."""
        said = beside.get(f"{role}_token")
        if said is not None and said not in self.names:
            return None
        usual = [said] if said is not None else [] if beside.get("eos_token") else _USUAL[role]
        return next((self.names[text] for text in usual if text in self.names), None)


_UNTYPED = "\uffff"  # begins the names that control tokens get inside the plain copy; U+FFFF is no character
_USUAL = {
    "bos": ["<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"],
    "eos": ["</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>"],
    "pad": ["<pad>", "<|finetune_right_pad_id|>", "<|pad|>"],
}


def _unknown_text(model: dict[str, Any]) -> str | None:
    """The text of the unknown token of a tokenizer.json's model."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _without(model: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The model with control tokens under names that no text can spell, and without merges that lead to them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return model | {"vocab": [[_UNTYPED + w if w in names else w, score] for w, score in vocab]}
    if not names & vocab.keys():
        return model
    merges = [m for m in model["merges"] if not names & _merged(m)]
    return model | {"vocab": {_UNTYPED + w if w in names else w: i for w, i in vocab.items()}, "merges": merges}


def _merged(merge: str | Sequence[str]) -> set[str]:
    """Both sides of a merge and what they make."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where it prints, else the next letter from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_table()


def _byte_level(text: str) -> bytes:
    """Bytes of a byte-level piece; a piece in other letters stands for itself."""
    try:
        return bytes([_BYTES[letter] for letter in text])
    except KeyError:
        return text.encode()


class TiktokenBackend:
    """Meta's Llama 3 rank file: lines of base64 and rank, then 256 control tokens as Llama 3.1 names them.

    Llama 3 left 128002-128005, 128008 and 128010 on "reserved"; the ids of every token in use are the same.
    """

    trims_all = False
    _SPLIT = (
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
        self._model = tiktoken.Encoding("llama3", pat_str=self._SPLIT, mergeable_ranks=ranks, special_tokens={})
        texts = self._NAMED + [f"reserved_special_token_{i}" for i in range(2, 2 + 256 - len(self._NAMED))]
        self.names = {f"<|{text}|>": len(ranks) + i for i, text in enumerate(texts)}
        self.size = len(ranks) + len(texts)
        self.hidden = frozenset(self.names.values())
        self.bos, self.eos, self.pad = (len(ranks) + i for i in (0, 1, 4))

    def ids(self, text: str) -> list[int]:
        return [token for part in _parts(text) for token in self._model.encode_ordinary(part)]

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        at = _characters(text)
        found, begin = [], 0
        for token in self.ids(text):
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

"""A `tokenizer.json` behind the interface of all tokenizers: BPE or unigram, byte level or with LLaMA's space mark.
Knows no conversation and no files: the parsed content comes in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from accessory.data.backends import BYTE, MARKER, unsaid

if TYPE_CHECKING:
    from tokenizers import Encoding


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
        special = [t for t in added if t["special"] or t["content"] in roles or MARKER.fullmatch(t["content"])]
        self.names = {text: words[text] for text in roles if text in words} | {t["content"]: t["id"] for t in special}
        self.hidden = frozenset(self.names.values()) - {t["id"] for t in special if not t["special"]}
        taken = {number: text for text, number in words.items()} | {t["id"]: t["content"] for t in added}
        self._add_beside(beside.get("added", {}), taken)
        self.names.pop(_unknown_text(model), None)  # plain text may well be unknown
        self.bos, self.eos, self.pad = (self._role(role, beside) for role in ("bos", "eos", "pad"))
        self.size = max(taken, default=-1) + 1
        self.unsaid = unsaid(self.names, self.pad, {self.bos, self.eos}, set(range(self.size)) - set(taken))

        kept = [t for t in added if t not in special]
        plain = content | {
            "model": _without(model, set(self.names)),
            "added_tokens": kept,
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._plain = self._later = Tokenizer.from_str(json.dumps(plain))
        self.goes_on = frozenset({"bos", "control", "picture"} if _goes_on(content, beside) else ())
        if self.goes_on:
            self._later = Tokenizer.from_str(json.dumps(_unprefixed(plain)))
        # tokenizers numbers added tokens anew when some are gone, so their true ids are put back.
        self._true = {self._plain.token_to_id(t["content"]): t["id"] for t in kept}
        self._shown = {t["id"]: t["content"].encode() for t in added}

    def ids(self, text: str, *, goes_on: bool) -> list[int]:
        ids = self._encode(text, goes_on).ids
        return [self._true.get(i, i) for i in ids] if self._true else ids

    def spans(self, text: str, *, goes_on: bool) -> list[tuple[int, int, int]]:
        found = self._encode(text, goes_on)
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
        byte = BYTE.fullmatch(text) if self._byte_fallback else None
        if byte:
            text_bytes = bytes([int(byte[1], 16)])
        else:
            text_bytes = text.encode()
        if first and self._trim:
            return text_bytes.lstrip(b" ") if self._trim == "all" else text_bytes.removeprefix(b" ")
        return text_bytes

    def _encode(self, text: str, goes_on: bool) -> Encoding:
        plain = self._later if goes_on else self._plain
        return plain.encode(text.replace(_UNTYPED, "\ufffd"), add_special_tokens=False)

    def _add_beside(self, added: dict[str, int], taken: dict[int, str]) -> None:
        """Take in tokens that only the files beside tokenizer.json name. ValueError where another has the id."""
        known = set(taken.values())
        for text, number in added.items():
            if text in known:
                continue
            if number in taken:
                raise ValueError(f"the files beside it call id {number} {text!r}, and here it is {taken[number]!r}")
            self.names[text], taken[number] = number, text
            self.hidden |= {number}

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


def _goes_on(content: dict[str, Any], beside: dict[str, Any]) -> bool:
    """Whether only the first run of text gets a dummy space: as the file says, or LLaMA's legacy flag of its own model.

    transformers builds the tokenizer of a LLaMA anew, by the flag, and reads the file as it is for all other models.
    """
    spaces = [step for step in _steps(content) if step["type"] in ("Prepend", "Metaspace")]
    if beside.get("legacy") is not None and beside.get("model_type", "llama") == "llama":
        return bool(spaces) and not beside["legacy"]
    return any(step.get("prepend_scheme") == "first" for step in spaces)


def _steps(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps of the normalizer and the pre-tokenizer, one by one."""
    waiting = [content.get("normalizer"), content.get("pre_tokenizer")]
    while waiting:
        step = waiting.pop(0)
        if step:
            yield step
            waiting += [*step.get("normalizers", ()), *step.get("pretokenizers", ())]


def _unprefixed(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without its dummy space."""
    copy = json.loads(json.dumps(content))
    for step in _steps(copy):
        if step["type"] == "Metaspace":
            step |= {"prepend_scheme": "never"}
            step.pop("add_prefix_space", None)
        elif step["type"] == "Prepend":
            step["prepend"] = ""
    return copy


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


BYTE_LETTERS = _byte_table()


def _byte_level(text: str) -> bytes:
    """Bytes of a byte-level piece; a piece in other letters stands for itself."""
    try:
        return bytes([BYTE_LETTERS[letter] for letter in text])
    except KeyError:
        return text.encode()

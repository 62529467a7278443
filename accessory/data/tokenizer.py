"""Text to ids and ids to text, whichever tokenizer file a LLaMA-family model ships.
Knows no conversation: control tokens are found here by name and placed by templates."""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from accessory.data.backends import JsonBackend, SentencePieceBackend, TiktokenBackend

_SURROGATE = re.compile("[\ud800-\udfff]")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")


class Backend(Protocol):
    """What one tokenizer library gives to `Tokenizer`; text comes in free of lone surrogates."""

    size: int
    """Number of ids; ids are 0 .. size - 1."""
    names: dict[str, int]
    """Control tokens by their text; `ids` and `spans` never yield one of these ids."""
    hidden: frozenset[int]
    """Ids that leave no trace in decoded text."""
    bos: int | None
    eos: int | None
    pad: int | None
    trims_all: bool
    """Decoding drops every leading space of an answer, not only one."""

    def ids(self, text: str) -> list[int]: ...

    def spans(self, text: str) -> list[tuple[int, int, int]]: ...

    def piece(self, token: int, *, first: bool) -> bytes: ...


class Tokenizer:
    """One tokenizer behind one interface. Plain text can never become a control token, whatever it spells.

    `bos_id` and `eos_id` are None where the file defines none. `pad_id` is always a valid id (0 where the file defines
    none), to fill places that nothing reads. `controls` are the ids of all control tokens.
    """

    def __init__(self, backend: Backend, path: Path, *, sha256: str = "") -> None:
        """sha256: of the tokenizer file's bytes."""
        self._backend = backend
        self.path = path
        self._sha256 = sha256
        self.size = backend.size
        self.bos_id = backend.bos
        self.eos_id = backend.eos
        self.pad_id = backend.pad if backend.pad is not None else 0
        self.controls = frozenset(backend.names.values())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, no EOS, never a control token. Lone surrogates are read as U+FFFD."""
        return self._backend.ids(_clean(text))

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """`encode` with places: (id, start, end) in characters of `text`.

        Several ids that spell one character share its span; an id that stands for nothing in the text (a dummy leading
        space) may have an empty one. Starts and ends never decrease.
        """
        return self._backend.spans(_clean(text))

    def control(self, name: str) -> int:
        """The id of a control token by its text, or by its role "bos" or "eos". ValueError names close ones."""
        role = {"bos": self.bos_id, "eos": self.eos_id}.get(name)
        found = self._backend.names.get(name) if role is None else role
        if found is None:
            names = self._backend.names
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)[:6]
            raise ValueError(
                f"control token {name!r}: not in the tokenizer {self.path}, which has {', '.join(near) or 'none'}; "
                "choose a template made for this model, or the tokenizer that the template needs"
            )
        return found

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that decides ids: the tokenizer file, and its control tokens by name and role."""
        told = [self._sha256, self.size, self.bos_id, self.eos_id, sorted(self._backend.names.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def control_name(self, token: int) -> str | None:
        """The text of a control token, <bos> or <eos> by its role; None for what is no control token."""
        roles = {self.bos_id: "<bos>", self.eos_id: "<eos>"}
        if token not in self.controls:
            return None
        return roles.get(token) or next(name for name, number in self._backend.names.items() if number == token)

    def decode(self, ids: Iterable[int], *, opening: bool = True) -> str:
        """Text of ids; control tokens are dropped, bytes that are no UTF-8 become U+FFFD.

        opening: the ids begin a text, so that the space which encoding put before its first word is taken away again;
        False where the text goes on from a prompt.
        """
        stream = Decoder(self, opening=opening)
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def piece_bytes(self, token: int, *, first: bool = False) -> bytes:
        """The UTF-8 bytes (perhaps a part of a character) that an id adds to a text; first: it begins the text."""
        if not 0 <= token < self.size:
            raise ValueError(f"token id: got {token}, expected 0 to {self.size - 1}; these ids are not of {self.path}")
        return b"" if token in self._backend.hidden else self._backend.piece(token, first=first)

    def still_first(self, token: int, piece: bytes) -> bool:
        """Whether the id after `token` (which gave `piece`) still begins the text."""
        return token in self._backend.hidden or (self._backend.trims_all and not piece)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_tokenizer, (self.path,)


class Decoder:
    """Ids to text as they come: whole characters only, constant work per id. All outputs joined equal `decode`."""

    def __init__(self, tokenizer: Tokenizer, *, opening: bool = True) -> None:
        self._tokenizer = tokenizer
        self._first = opening
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this id completes, perhaps none."""
        piece = self._tokenizer.piece_bytes(token, first=self._first)
        self._first = self._first and self._tokenizer.still_first(token, piece)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left when no id follows: U+FFFD for a character begun and not ended."""
        return self._utf8.decode(b"", final=True)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a sentencepiece `.model`, a `tokenizer.json`, Meta's Llama 3 rank file, or a folder that holds one.

    A file is known by its content, not by its name. In a folder, `tokenizer.json` is read before `tokenizer.model` if
    `tokenizer_config.json` stands beside it (a Hugging Face folder), else after it; BOS, EOS and added tokens come from
    the json files beside it. Raises FileNotFoundError, and ValueError for a folder without one or a file that is none.
    """
    path = Path(path)
    file = _choose(path) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer: no file {file}; give a tokenizer file or the folder that holds it")
    data = file.read_bytes()
    try:
        backend = _open_backend(data, _neighbours(file.parent) if path.is_dir() or _is_json(data) else {})
    except ImportError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, TypeError and bare Exception for a damaged file
        raise ValueError(
            f"tokenizer {file}: {error or type(error).__name__}; expected a sentencepiece model, a tokenizer.json or "
            "Meta's Llama 3 rank file, so fetch the file again or give another --tokenizer_path"
        ) from error
    return Tokenizer(backend, path, sha256=hashlib.sha256(data).hexdigest())


def _open_backend(data: bytes, beside: dict[str, Any]) -> Backend:
    """Pick the library by content."""
    if not data.strip():
        raise ValueError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a git-lfs pointer stands here instead of the file")
    if _is_json(data):
        return JsonBackend(json.loads(data), beside)
    if _RANK_LINE.match(data):
        return TiktokenBackend(data)
    return SentencePieceBackend(data, beside)


def _choose(folder: Path) -> Path:
    """The tokenizer file of a folder."""
    order = ["tokenizer.model", "tokenizer.json"]
    if (folder / "tokenizer_config.json").is_file():
        order.reverse()
    for name in order:
        if (folder / name).is_file():
            return folder / name
    there = sorted(entry.name for entry in folder.iterdir())
    listing = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "nothing"
    raise ValueError(
        f"tokenizer: {folder} holds {listing} but no {' or '.join(order)}; copy one there or name its path"
    )


def _neighbours(folder: Path) -> dict[str, Any]:
    """bos_token, eos_token, pad_token and added ({text: id}) as the json files of a Hugging Face folder say."""
    found: dict[str, Any] = {"added": {}}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said = _read_json(folder / name)
        for key in ("bos_token", "eos_token", "pad_token"):
            token = said.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                found[key] = token
        for number, token in said.get("added_tokens_decoder", {}).items():
            found["added"][token["content"]] = int(number)
    found["added"].update(_read_json(folder / "added_tokens.json"))
    return found


def _read_json(file: Path) -> dict[str, Any]:
    """A json object, {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} beside it is no json ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} beside it holds a {type(content).__name__}, not an object")
    return content


def _is_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"{"


def _clean(text: str) -> str:
    """Lone surrogates (JSON can carry them, UTF-8 cannot) as U+FFFD; the length stays."""
    return _SURROGATE.sub("\ufffd", text)

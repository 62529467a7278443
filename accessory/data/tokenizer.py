"""Text to ids and ids to text, whichever tokenizer file a LLaMA-family model ships.
Knows no conversation: control tokens are found here by name and placed by templates."""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from accessory.data.backends import SentencePieceBackend, TiktokenBackend
from accessory.data.tokenizer_json import JsonBackend

log = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")
After = Literal["", "bos", "control", "picture"]
"""What stands before a run of text: nothing, the BOS of the whole, another control token, a picture."""

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
    goes_on: frozenset[str]
    """After which of `After` a run goes on, that is, gets no dummy space before it."""
    unsaid: frozenset[int]
    """Ids that no answer can hold: without a token, or a placeholder."""

    def ids(self, text: str, *, goes_on: bool) -> list[int]: ...

    def spans(self, text: str, *, goes_on: bool) -> list[tuple[int, int, int]]: ...

    def piece(self, token: int, *, first: bool) -> bytes: ...


class Tokenizer:
    """One tokenizer behind one interface. Plain text can never become a control token, whatever it spells.

    `bos_id` and `eos_id` are None where the file defines none. `pad_id` is always a valid id (0 where the file defines
    none), to fill places that nothing reads. `controls` are the ids of all control tokens. `size` is the number of ids
    that have a meaning: rows of a padded vocabulary from there on are never sampled, and neither is one of `unsaid`
    (ids without a token, padding, places of pictures).
    """

    def __init__(self, backend: Backend, path: Path, *, sha256: str = "", adds_bos: bool = True) -> None:
        """sha256: of the tokenizer file's bytes."""
        self.backend = backend
        self.path = path
        self._sha256 = sha256
        self.size = backend.size
        self.adds_bos = adds_bos and backend.bos is not None
        """Whether a plain text begins with BOS; a conversation does where its template says so."""
        self.bos_id = backend.bos
        self.eos_id = backend.eos
        self.pad_id = backend.pad if backend.pad is not None else 0
        self.controls = frozenset(backend.names.values())
        self.unsaid = backend.unsaid

    def encode(self, text: str, *, after: After = "") -> list[int]:
        """Ids of plain text: no BOS, no EOS, never a control token. Lone surrogates are read as U+FFFD.

        after: what stands before the text, as some tokenizers put a space before the first run of text alone.
        """
        return self.backend.ids(_clean(text), goes_on=after in self.backend.goes_on)

    def spans(self, text: str, *, after: After = "") -> list[tuple[int, int, int]]:
        """`encode` with places: (id, start, end) in characters of `text`.

        Several ids that spell one character share its span; an id that stands for nothing in the text (a dummy leading
        space) may have an empty one. Starts and ends never decrease.
        """
        return self.backend.spans(_clean(text), goes_on=after in self.backend.goes_on)

    def prefixes(self, after: After) -> bool:
        """Whether a run of text after this begins a text, whose first space, if any, is not its own (see `decode`)."""
        return after not in self.backend.goes_on

    def has(self, name: str) -> bool:
        """Whether there is a control token of this text, or of the role "bos" or "eos"."""
        role = {"bos": self.bos_id, "eos": self.eos_id}.get(name)
        return role is not None or name in self.backend.names

    def control(self, name: str) -> int:
        """The id of a control token by its text, or by its role "bos" or "eos". ValueError names close ones."""
        role = {"bos": self.bos_id, "eos": self.eos_id}.get(name)
        found = self.backend.names.get(name) if role is None else role
        if found is None:
            names = self.backend.names
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)[:6]
            raise ValueError(
                f"control token {name!r}: not in the tokenizer {self.path}, which has {', '.join(near) or 'none'}; "
                "choose a template made for this model, or the tokenizer that the template needs"
            )
        return found

    def size_for(self, rows: int | None) -> int:
        """How many tokens this is for a model whose embedding has so many rows: all, or the rows where nothing but
        control tokens that no text becomes lies behind them, such as a pad that was added afterwards (which is said).
        """
        least, kept = self.size, {self.bos_id, self.eos_id}
        while least and least - 1 in self.controls and least - 1 not in kept:
            least -= 1
        if rows is None or not least <= rows < self.size:
            return self.size
        beyond = sorted((token, name) for name, token in self.backend.names.items() if token >= rows)
        log.warning("%s: the model has no row for %s, which are not used", self.path, ", ".join(n for _, n in beyond))
        return rows

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that decides ids: the tokenizer file, and its control tokens by name and role."""
        told = [self._sha256, self.size, self.bos_id, self.eos_id, sorted(self.backend.names.items())]
        told += [sorted(self.backend.goes_on), self.adds_bos]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def control_name(self, token: int) -> str | None:
        """The text of a control token, <bos> or <eos> by its role; None for what is no control token."""
        roles = {self.bos_id: "<bos>", self.eos_id: "<eos>"}
        if token not in self.controls:
            return None
        return roles.get(token) or next(name for name, number in self.backend.names.items() if number == token)

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
        return b"" if token in self.backend.hidden else self.backend.piece(token, first=first)

    def still_first(self, token: int, piece: bytes) -> bool:
        """Whether the id after `token` (which gave `piece`) still begins the text."""
        return token in self.backend.hidden or (self.backend.trims_all and not piece)

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
        beside = _neighbours(file.parent) if path.is_dir() or _is_json(data) else {}
        backend = _open_backend(data, beside)
    except ImportError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, TypeError and bare Exception for a damaged file
        raise ValueError(
            f"tokenizer {file}: {error or type(error).__name__}; expected a sentencepiece model, a tokenizer.json or "
            "Meta's Llama 3 rank file, so fetch the file again or give another --tokenizer_path"
        ) from error
    told = beside.get("add_bos_token", True)
    return Tokenizer(backend, path, sha256=hashlib.sha256(data).hexdigest(), adds_bos=bool(told))


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


def read_beside(path: Path, name: str) -> dict[str, Any]:
    """A json object that stands beside a tokenizer (its file or its folder), {} where there is none."""
    return _read_json((path if path.is_dir() else path.parent) / name)


def _neighbours(folder: Path) -> dict[str, Any]:
    """bos_token, eos_token, pad_token, added ({text: id}), and LLaMA's legacy flag, as a Hugging Face folder says."""
    found: dict[str, Any] = {"added": {}}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said = _read_json(folder / name)
        for key in ("bos_token", "eos_token", "pad_token"):
            token = said.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                found[key] = token
        if isinstance(said.get("add_bos_token"), bool):
            found["add_bos_token"] = said["add_bos_token"]
        for number, token in said.get("added_tokens_decoder", {}).items():
            found["added"][token["content"]] = int(number)
        if str(said.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer":
            found["legacy"] = said.get("legacy")
    found["added"].update(_read_json(folder / "added_tokens.json"))
    found["model_type"] = _read_json(folder / "config.json").get("model_type", "llama")
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

"""Files by which transformers tokenises as we do: tokenizer.json made of a sentencepiece model or of Llama 3's ranks.
Must not know templates: a chat template comes as its text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accessory.data.backends import SPACE, SentencePieceBackend, TiktokenBackend
from accessory.data.tokenizer import Tokenizer, read_beside
from accessory.data.tokenizer_json import BYTE_LETTERS, JsonBackend

log = logging.getLogger(__name__)

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def transformers_files(tokenizer: Tokenizer, *, chat_template: str | None = None) -> dict[str, str]:
    """Texts of small files by name, to stand beside the tokenizer's own in a Hugging Face folder.

    A folder that is one already keeps its tokenizer.json; its tokenizer_config.json gets the chat template, and loses a
    class that transformers 5 would build anew by a rule that the folder does not tell. For LLaMA's and Mistral's
    sentencepiece models, and Llama 3's ranks, tokenizer.json is made and named so that transformers reads it as it
    stands: ids are the same for every text. Sentencepiece models of other kinds are left to transformers, with a word.
    """
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        content = _of_sentencepiece(tokenizer, backend)
    elif isinstance(backend, TiktokenBackend):
        content = _of_ranks(backend)
    else:
        content = None
    said = read_beside(tokenizer.path, "tokenizer_config.json") if _is_hugging(tokenizer.path) else {}
    config = dict(said)
    if not isinstance(backend, JsonBackend):
        roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": backend.pad}
        names = {number: text for text, number in backend.names.items()}
        config |= {role: names[number] for role, number in roles.items() if number is not None}
    if content is not None:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name in ("legacy", "added_tokens_decoder", "add_prefix_space", "sp_model_kwargs"):
            config.pop(name, None)
    elif not isinstance(backend, JsonBackend):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True} | config
    elif str(config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer" and "legacy" not in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # which reads the file as it stands, in every release
    files = {} if content is None else {"tokenizer.json": json.dumps(content, ensure_ascii=False)}
    if chat_template is not None:
        files["chat_template.jinja"] = config["chat_template"] = chat_template  # older readers look into the second
    if config != said:
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files


def _is_hugging(path: Path) -> bool:
    """Whether the json files beside a tokenizer are its own: beside a single file they need not be."""
    return path.is_dir() or path.suffix == ".json"


def _of_sentencepiece(tokenizer: Tokenizer, backend: SentencePieceBackend) -> dict[str, Any] | None:
    """A tokenizer.json of a BPE model as LLaMA's; None for others."""
    pieces = backend.pieces()
    if pieces is None:
        log.warning(
            "tokenizer %s: a sentencepiece model that is no BPE, trims blanks, rewrites letters or has symbols, which "
            "transformers may read otherwise; a folder with tokenizer.json as tokenizer_path does better",
            tokenizer.path,
        )
        return None
    if backend.goes_on == {"control"}:
        log.warning("tokenizer %s: a text after BOS or a picture has no dummy space in transformers", tokenizer.path)
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    score = {piece: value for piece, value in pieces}
    merges = _merges(vocab, known=set(vocab) - set(backend.names), order=lambda piece: (-score[piece], vocab[piece]))
    model = {"type": "BPE", "dropout": None, "unk_token": pieces[backend.unknown][0], "fuse_unk": True}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": backend.has_bytes}
    steps = [{"type": "Prepend", "prepend": SPACE}] if backend.prefixed and not backend.goes_on else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if backend.prefixed else []
    return _content(
        backend.names,
        model | {"vocab": vocab, "merges": merges},
        bos=backend.bos,
        normalizer={"type": "Sequence", "normalizers": steps} if not backend.goes_on else None,
        pre_tokenizer=first if backend.goes_on else None,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _of_ranks(backend: TiktokenBackend) -> dict[str, Any]:
    """A tokenizer.json of Llama 3's ranks."""
    letters = {byte: letter for letter, byte in BYTE_LETTERS.items()}
    vocab = {"".join(letters[byte] for byte in word): rank for word, rank in backend.ranks.items()}
    merges = _merges(vocab, known=set(vocab), order=lambda word: (vocab[word],))
    split = {"type": "Split", "pattern": {"Regex": backend.SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    return _content(
        backend.names,
        model | {"vocab": vocab, "merges": merges},
        bos=backend.bos,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]},
        decoder=level | {"add_prefix_space": True, "use_regex": True},
    )


def _content(names: Mapping[str, int], model: dict[str, Any], *, bos: int | None, **steps: Any) -> dict[str, Any]:
    """A tokenizer.json, which puts BOS before a text where it is asked to."""
    added = [{"id": number, "content": text} | _FLAGS for text, number in sorted(names.items(), key=lambda one: one[1])]
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    if bos is not None:
        name = next(text for text, number in names.items() if number == bos)
        text.insert(0, {"SpecialToken": {"id": name, "type_id": 0}})
        special = {name: {"id": name, "ids": [bos], "tokens": [name]}}
    pair = [*text, {"Sequence": {"id": "B", "type_id": 0}}]
    after = {"type": "TemplateProcessing", "single": text, "pair": pair, "special_tokens": special}
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return head | steps | {"post_processor": after, "model": model}


def _merges(vocab: Iterable[str], *, known: set[str], order: Callable[[str], tuple[float, ...]]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, those first that a model joins first."""
    pairs = []
    for word in vocab:
        if word in known and len(word) > 1:
            for cut in range(1, len(word)):
                if word[:cut] in known and word[cut:] in known:
                    pairs.append((order(word), cut, [word[:cut], word[cut:]]))
    return [pair for _, _, pair in sorted(pairs)]

"""Folders with small tokenizers as Hugging Face has them, each with the control tokens of all templates.

Must not need a network or a stored file.
"""

import json
from pathlib import Path

from fixtures import toys

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]
INST = ["[INST]", "[/INST]"]
KINDS = ["prepend", "first", "byte_level", "no_bos", "v3", "legacy", "unlegacy", "llama_flag", "llava_flag"]
"""prepend, first: a space mark before every run of text, or before the first; v3: [INST] is a token; legacy, unlegacy:
sentencepiece models of LLaMA's class, by its flag; llama_flag, llava_flag: prepend, of that class with legacy false."""


def added(content: dict, texts: list[str]) -> dict:
    """A tokenizer.json with these special tokens at its end."""
    size = max(content["model"]["vocab"].values()) + 1
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    known = {entry["content"] for entry in content["added_tokens"]}
    new = [text for text in texts if text not in known]
    entries = [{"id": size + number, "content": text} | flags for number, text in enumerate(new)]
    return content | {"added_tokens": [*content["added_tokens"], *entries]}


def llama(*, texts: list[str]) -> dict:
    """LLaMA's kind of tokenizer.json, a Prepend and a Replace before everything."""
    content = toys.llama_json()
    content["added_tokens"] = content["added_tokens"][:3]
    for entry in content["added_tokens"]:
        entry["normalized"] = False
    return added(content, texts)


def metaspace(content: dict, scheme: str) -> dict:
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    return content | {"normalizer": None, "pre_tokenizer": step}


def write(folder: Path, kind: str) -> Path:
    """One folder."""
    folder.mkdir(parents=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if kind in ("legacy", "unlegacy"):
        (folder / "tokenizer.model").write_bytes(toys.sentencepiece_model())
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "legacy"}
        config["added_tokens_decoder"] = {
            str(400 + number): {"content": text, "special": True, "normalized": False, "lstrip": False}
            | {"rstrip": False, "single_word": False}
            for number, text in enumerate(MARKERS)
        }
    elif kind in ("byte_level", "no_bos"):
        content = added(toys.byte_level_json(), [*MARKERS, "<|begin_of_text|>"])
        config |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"}
        if kind != "byte_level":
            config["bos_token"] = None
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        content = llama(texts=[*MARKERS, *(INST if kind == "v3" else [])])
        content = metaspace(content, "first") if kind == "first" else content
        (folder / "tokenizer.json").write_text(json.dumps(content))
        if kind.endswith("flag"):
            config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
            (folder / "config.json").write_text(json.dumps({"model_type": kind.removesuffix("_flag")}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

"""Words that choose linears for LoRA: scopes, our names, Hugging Face's, regular expressions.

Must not know a module; names of linears come in and are matched. A word without a scope never leaves the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SEVEN = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
SCOPES = ("llm", "projector", "vision")
ALL = ("all", "all-linear")
# Hugging Face's last part of a name -> ours, by part of the model
THEIRS: dict[str, dict[str, str]] = {
    "llm": {
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
    },
    "projector": {"linear_1": "0", "linear_2": "2"},
    "vision": {"out_proj": "proj"},
}
FUSED = ("q_proj", "k_proj", "v_proj")  # one linear, qkv, in the tower


def split_scopes(words: Iterable[str], *, what: str = "lora_target") -> dict[str, tuple[str, ...]]:
    """Sort words by the part of the model that they choose from: `vision:qkv` from the tower, `q_proj` from the llm.

    Returns our own names where the words are plain names. Raises ValueError for a name that no decoder has, and for
    some of the tower's q_proj, k_proj and v_proj without the others.
    """
    found: dict[str, list[str]] = {scope: [] for scope in SCOPES}
    for word in words:
        scope, mark, rest = word.partition(":")
        scope, rest = (scope, rest) if mark and scope in SCOPES else ("llm", word)
        if not rest:
            raise ValueError(f"{what}: got {word!r}, expected a name behind the scope, such as {scope}:all")
        found[scope].append(rest)
    return {scope: normal(given, scope=scope, what=what) for scope, given in found.items()}


def normal(words: Iterable[str], *, scope: str, what: str) -> tuple[str, ...]:
    """Words of one part under our names, each once; regular expressions stay. ValueError for names that cannot be."""
    words = list(words)
    table = THEIRS[scope]
    if scope == "vision" and (some := [word for word in words if word in FUSED]):
        if len(set(some)) < len(FUSED):
            raise ValueError(
                f"{what}: got vision:{', vision:'.join(some)}, expected q_proj, k_proj and v_proj together, which are"
                " one linear in the tower; use vision:qkv"
            )
        words = ["qkv" if word in FUSED else word for word in words]
    everything = SEVEN if scope == "llm" else ("all",)
    ours: dict[str, None] = {}
    for word in words:
        ours.update(dict.fromkeys(everything if word in ALL else (table.get(word, word),)))
    if scope == "llm" and (unknown := sorted(word for word in ours if word not in SEVEN and not is_regex(word))):
        raise ValueError(
            f"{what}: got {', '.join(unknown)}, expected some of {', '.join((*table, *SEVEN))}, all, or a regular"
            " expression"
        )
    for word in filter(is_regex, ours):
        try:
            re.compile(word)
        except re.error as error:
            raise ValueError(f"{what}: got {word!r}, expected a regular expression ({error}); correct it") from error
    return tuple(ours)


def is_regex(word: str) -> bool:
    """Whether a word is a regular expression, not a name."""
    return bool(re.search(r"[\\*+?()\[\]{}|^$]", word))


def reached(targets: Sequence[str], names: Iterable[str], *, scope: str) -> dict[str, list[str]]:
    """Which of the names each target reaches: by a name's last parts, or a regular expression over the whole name.

    The expression is also tried on Hugging Face's name of a decoder's linear (model.layers.0.self_attn.q_proj).
    """
    names = list(names)
    found: dict[str, list[str]] = {}
    for target in targets:
        if target in ALL:
            found[target] = names
        elif is_regex(target):
            found[target] = [n for n in names if re.fullmatch(target, n) or re.fullmatch(target, theirs(n, scope))]
        else:
            found[target] = [name for name in names if name == target or name.endswith(f".{target}")]
    return found


def theirs(name: str, scope: str) -> str:
    """Hugging Face's name of a linear of the decoder; any other name as it is."""
    match = re.fullmatch(r"layers\.(\d+)\.(attention|feed_forward)\.(\w+)", name)
    if scope != "llm" or match is None:
        return name
    block = {"attention": "self_attn", "feed_forward": "mlp"}[match[2]]
    leaf = next((word for word, own in THEIRS["llm"].items() if own == match[3]), match[3])
    return f"model.layers.{match[1]}.{block}.{leaf}"

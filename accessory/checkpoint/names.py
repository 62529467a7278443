"""Names of tensors, canonical (the state dict's) and in files; what files carry that nobody needs; cut dims by name.

Must not know a file or a model; names and shapes come in, names and dims go out.

Canonical names are Meta's (`layers.0.attention.wq.weight`), with `.lora_a.weight` and `.lora_b.weight` beside a
linear's weight, `prefix*` for the zero-init adapter, and `vision.*` (ours). In files, Meta's have no prefix and
Accessory's have `llma.`; released vision weights carry other projects' names, which `vision_names` translates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from accessory.checkpoint import vision_names

PREFIX = "llma."

# buffers that some writers store and every reader computes: nothing is lost with them
DISCARDED = (
    r"rope\.freqs",  # Meta
    r"layers\.\d+\.attention\.inner_attention\.rope\.freqs",  # LLaMA 1
    r"layers\.\d+\.attention\.rotary_emb\.inv_freq",
)

_COLUMN = r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])"
_ROW = r"layers\.\d+\.(attention\.wo|feed_forward\.w2)"
_NORMS = r"layers\.\d+\.(attention_norm|ffn_norm)|norm"

# which dim the shards of a folder are joined on; None: every shard holds all of it. The first match counts.
CUTS: tuple[tuple[str, int | None], ...] = (
    (rf"({_COLUMN}|output)\.(weight|bias)", 0),
    (rf"{_COLUMN}\.lora_a\.weight", None),
    (rf"{_COLUMN}\.lora_b\.weight", 0),
    (rf"{_ROW}\.weight", 1),
    (rf"{_ROW}\.bias", None),
    (rf"{_ROW}\.lora_a\.weight", 1),
    (rf"{_ROW}\.lora_b\.weight", None),
    (r"tok_embeddings\.weight", 1),  # 0 when tied to `output`, and in Meta's Llama 3 files
    (rf"({_NORMS})\.(weight|bias)", None),
    (r"prefix_gate", 1),  # (layers, heads)
    (r"prefix|prefix_new_gate", None),
    (r"vision\..+", None),
)

PARTS: tuple[tuple[str, str], ...] = (
    (r".+\.lora_[ab]\.weight", "lora"),
    (r"tok_embeddings\..+", "embedding"),
    (r"output\..+", "output"),
    (r"layers\.\d+\.attention\..+", "attention"),
    (r"layers\.\d+\.feed_forward\..+", "feed-forward"),
    (rf"({_NORMS})\..+", "norms"),
    (r"prefix.*", "adapter"),
    (r"vision\.(qformer\..+|query_tokens)", "qformer"),
    (r"vision\..+", "vision"),
)


def canonical(name: str) -> tuple[str, str | None] | None:
    """Return (canonical name, transform of the file's tensor or None) of a name in a Meta or Accessory file.

    None for a name that is discarded: it is on the list above, or it is the unused half of a released vision model.
    A name that no rule knows stays as it is, without the prefix, and whoever wants tensors will call it unexpected.
    """
    name = name.removeprefix(PREFIX)
    if any(re.fullmatch(pattern, name) for pattern in DISCARDED) or vision_names.ignored(name):
        return None
    return vision_names.to_canonical(name) or (name, None)


def in_files(keys: Iterable[str], *, reference: bool) -> dict[str, tuple[str, str | None]]:
    """Return key -> (name in an Accessory file, transform of our tensor or None).

    reference: vision tensors under the names of released LLaMA2-Accessory weights, where those have such a tensor;
    otherwise `llma.` and the canonical name.
    """
    keys = list(keys)
    kind = vision_names.kind_of(keys) if reference else None
    found = {key: vision_names.to_reference(key, kind=kind) if kind else None for key in keys}
    return {key: (PREFIX + (new[0] if new else key), new[1] if new else None) for key, new in found.items()}


def known(key: str) -> bool:
    """Whether the table of cuts knows this tensor."""
    return any(re.fullmatch(pattern, key) for pattern, _ in CUTS)


def cut_dim(key: str, *, tied: bool = False) -> int | None:
    """The dim on which a folder's shards cut this tensor; None where each holds all of it (unknown names too)."""
    if tied and key == "tok_embeddings.weight":
        return 0
    return next((dim for pattern, dim in CUTS if re.fullmatch(pattern, key)), None)


def part(key: str) -> str:
    """The part of the model that a tensor belongs to, for counting parameters."""
    return next((name for pattern, name in PARTS if re.fullmatch(pattern, key)), "other")

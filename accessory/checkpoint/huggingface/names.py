"""Names of tensors in Hugging Face folders, and ours: one table, read both ways.

Must not know a file or a model: names, shapes and tensors come in and go out.

Three key families exist for LLaVA, all accepted whatever the folder says of itself: llava-hf's on disk
(`language_model.model.*`, `vision_tower.vision_model.*`, `multi_modal_projector.linear_1`), transformers' since 4.52 in
memory (`model.language_model.*`, `lm_head`), and the original LLaVA's (`model.layers.*`, `model.mm_projector.0`,
`model.vision_tower.vision_tower.vision_model.*`). Language models alone are `model.layers.*`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs: the canonical tensor, and which of the parts that make it up on dim 0."""

    key: str
    transform: str | None = None
    part: int = 0
    parts: int = 1


# canonical -> foreign; N is a layer's number, * is weight or bias. Several foreign names: stacked on dim 0, in order.
TEXT: dict[str, str] = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.N.attention.wq.*": "layers.N.self_attn.q_proj.*",
    "layers.N.attention.wk.*": "layers.N.self_attn.k_proj.*",
    "layers.N.attention.wv.*": "layers.N.self_attn.v_proj.*",
    "layers.N.attention.wo.*": "layers.N.self_attn.o_proj.*",
    "layers.N.feed_forward.w1.*": "layers.N.mlp.gate_proj.*",
    "layers.N.feed_forward.w3.*": "layers.N.mlp.up_proj.*",
    "layers.N.feed_forward.w2.*": "layers.N.mlp.down_proj.*",
    "layers.N.attention_norm.weight": "layers.N.input_layernorm.weight",
    "layers.N.ffn_norm.weight": "layers.N.post_attention_layernorm.weight",
}
HEAD = "output.weight"
CLIP: dict[str, tuple[str, ...]] = {
    "vision.tower.cls_token": ("embeddings.class_embedding",),
    "vision.tower.pos_embed": ("embeddings.position_embedding.weight",),
    "vision.tower.patch_embed.proj.*": ("embeddings.patch_embedding.*",),
    "vision.tower.norm_pre.*": ("pre_layrnorm.*",),
    "vision.tower.blocks.N.norm1.*": ("encoder.layers.N.layer_norm1.*",),
    "vision.tower.blocks.N.attn.qkv.*": tuple(f"encoder.layers.N.self_attn.{x}_proj.*" for x in "qkv"),
    "vision.tower.blocks.N.attn.proj.*": ("encoder.layers.N.self_attn.out_proj.*",),
    "vision.tower.blocks.N.norm2.*": ("encoder.layers.N.layer_norm2.*",),
    "vision.tower.blocks.N.mlp.fc1.*": ("encoder.layers.N.mlp.fc1.*",),
    "vision.tower.blocks.N.mlp.fc2.*": ("encoder.layers.N.mlp.fc2.*",),
    "vision.tower.norm.*": ("post_layernorm.*",),
}
NEWLINE = "vision.image_newline"
TRANSFORMS = {
    "layers.N.attention.wq.*": "heads",
    "layers.N.attention.wk.*": "heads",
    "vision.tower.cls_token": "add_2",
    "vision.tower.pos_embed": "add_1",
}
_YI = {"layers.N.attention_norm.weight": "layers.N.ln1.weight", "layers.N.ffn_norm.weight": "layers.N.ln2.weight"}

# buffers that every reader computes: nothing is lost with them
_DISCARDED = re.compile(r"(.*\.)?(rotary_emb\..*|inv_freq|embeddings\.position_ids)")
_TEXT_PREFIX = re.compile(r"(base_model\.model\.)?((language_model|model)\.)*")
_TOWER_PREFIX = re.compile(r"(base_model\.model\.)?(model\.)?(vision_tower\.)+(vision_model\.)?")
_PROJECTOR = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?"
    r"(?:multi_modal_projector\.linear_(?P<new>[12])|mm_projector(?:\.(?P<old>\d+))?)\.(?P<leaf>weight|bias)"
)
_NEWLINE = re.compile(r"(base_model\.model\.)?(model\.)?image_newline")
_CLIP_REST = re.compile(r"(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)")

# layouts on the way out: prefixes of the language model, head, tower, the projector's layers, and the newline
LAYOUTS: dict[str, tuple[str, str, str, str, str]] = {
    "plain": ("model.", "lm_head.weight", "", "", ""),
    "llava": (
        "language_model.model.",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.",
        "multi_modal_projector.linear_",
        "image_newline",
    ),
    "original": (
        "model.",
        "lm_head.weight",
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
        "model.image_newline",
    ),
}


def canonical(name: str, *, tower: bool = False) -> Place | None:
    """Return where a file's tensor belongs; None for a buffer that is discarded.

    tower: the folder is a CLIP's by itself, whose text half is discarded too. A name that no rule knows is its own
    place, and whoever wants tensors will call it unexpected.
    """
    if _DISCARDED.fullmatch(name):
        return None
    if tower:
        if _CLIP_REST.fullmatch(name):
            return None
        return _look_up(name.removeprefix("vision_model."), _inward_clip()) or Place(name)
    if found := _PROJECTOR.fullmatch(name):
        number = {"1": "0", "2": "2", None: found["old"] or "0"}[found["new"]]
        return Place(f"vision.proj.{number}.{found['leaf']}")
    if _NEWLINE.fullmatch(name):
        return Place(NEWLINE)
    if prefix := _TOWER_PREFIX.match(name):
        return _look_up(name[prefix.end() :], _inward_clip()) or Place(name)
    return _look_up(name[_TEXT_PREFIX.match(name).end() :], _inward_text()) or Place(name)


def in_file(key: str, *, layout: str) -> tuple[list[str], str | None]:
    """Return the names of a canonical tensor in a file (several: its parts on dim 0) and its transform.

    Raises ValueError where the layout has no place for the tensor.
    """
    text, head, tower, projector, newline = LAYOUTS[layout]
    if key == HEAD:
        return [head], None
    if layout != "plain" and key == NEWLINE:
        return [newline], None
    if layout != "plain" and (found := re.fullmatch(r"vision\.proj\.(\d+)\.(weight|bias)", key)):
        number = found[1] if layout == "original" else {"0": "1", "2": "2"}.get(found[1])
        if number is not None:
            return [f"{projector}{number}.{found[2]}"], None
    for table, prefix in ((_outward_text(), text), (_outward_clip(), tower)):
        template, number, leaf = _template(key, table)
        if template is not None and (table is _outward_text() or layout != "plain"):
            parts = [prefix + _filled(part, number, leaf) for part in table[template]]
            return parts, TRANSFORMS.get(template)
    raise ValueError(
        f"{key}: Hugging Face's {layout} form has no place for it; merge what PEFT added, or write Accessory's form"
    )


def unpermute(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, ...] of q or k from Hugging Face's order (halves) to Meta's (pairs): a copy.

    For weights, biases and the B matrix of LoRA; whole heads, of any rank's slice.
    """
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def permute(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `unpermute`."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def transform_shape(transform: str | None, shape: Sequence[int]) -> Shape:
    """Return the canonical shape of a file's tensor."""
    return {"add_1": (1, *shape), "add_2": (1, 1, *shape)}.get(transform or "", tuple(shape))


def transform_back(transform: str | None, tensor: Tensor, head_dim: int) -> Tensor:
    """Return a canonical tensor as a file holds it; before it is split into its parts."""
    if transform == "heads":
        return permute(tensor, head_dim)
    return {"add_1": lambda t: t[0], "add_2": lambda t: t[0, 0]}.get(transform or "", lambda t: t)(tensor)


@cache
def _inward_text() -> dict[str, Place]:
    """Foreign template, without prefix -> place template."""
    pairs = [*((foreign, ours) for ours, foreign in TEXT.items()), *((foreign, ours) for ours, foreign in _YI.items())]
    table = {foreign: Place(ours, TRANSFORMS.get(ours)) for foreign, ours in pairs}
    return {**table, "lm_head.weight": Place(HEAD)}


@cache
def _inward_clip() -> dict[str, Place]:
    """Foreign template, without prefix -> place template."""
    return {
        name: Place(ours, TRANSFORMS.get(ours), part, len(parts))
        for ours, parts in CLIP.items()
        for part, name in enumerate(parts)
    }


@cache
def _outward_text() -> dict[str, tuple[str, ...]]:
    """Canonical template -> foreign templates, without prefix."""
    return {ours: (foreign,) for ours, foreign in TEXT.items()}


@cache
def _outward_clip() -> dict[str, tuple[str, ...]]:
    """Canonical template -> foreign templates, without prefix."""
    return dict(CLIP)


def _look_up(name: str, table: dict[str, Place]) -> Place | None:
    """The place of a name, its layer number and last part filled in."""
    template, number, leaf = _template(name, table)
    if template is None:
        return None
    place = table[template]
    return Place(_filled(place.key, number, leaf), place.transform, place.part, place.parts)


def _template(name: str, table: dict[str, object]) -> tuple[str | None, str, str]:
    """The template in a table that a name fits, and the layer number and last part it has there."""
    number = re.search(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)", name)
    leaf = re.search(r"(?<=\.)(weight|bias)$", name)
    numbered = name[: number.start()] + "N" + name[number.end() :] if number else name
    for template, last in ((numbered, ""), (re.sub(r"(?<=\.)(weight|bias)$", "*", numbered), leaf[0] if leaf else "")):
        if template in table:
            return template, number[0] if number else "", last
    return None, "", ""


def _filled(template: str, number: str, leaf: str) -> str:
    """A template as a name."""
    return template.replace(".N.", f".{number}.").replace("*", leaf)

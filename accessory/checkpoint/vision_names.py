"""Names of vision tensors in other people's files, and in ours: one table, read both ways.

Must not know a vision module or a file: names and tensors come in, names and tensors go out.

Canonical names are the state dict's: `vision.tower.*` (timm's own names), `vision.qformer.*`, `vision.proj.*`, ...
Two layouts are foreign:
  accessory  released LLaMA2-Accessory weights, without their `llma.` prefix: BLIP-2 under `qformer.`, OpenAI's CLIP
             under `clip.visual.`, and the projections.
  blip2      a Hugging Face BLIP-2 folder (blip2-opt-2.7b).
Every rule is one name for one name. `vision.tower.*` is CLIP's or BLIP-2's, so the way out asks for the kind of encoder
(a VisionConfig's `kind`); the way in never has to. Names that are ours alone (`vision.qformer.key_positions`, towers
other than these two) have no rule: they are None here and keep their canonical name in a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """What a tensor goes through on its way; both functions are views, and so is the way back."""

    tensor: Callable[[Tensor], Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    inverse: str


TRANSFORMS: dict[str, Transform] = {
    "transpose": Transform(lambda t: t.t(), lambda s: s[::-1], "transpose"),
    "add_1": Transform(lambda t: t[None], lambda s: (1, *s), "drop_1"),
    "drop_1": Transform(lambda t: t[0], lambda s: s[1:], "add_1"),
    "add_2": Transform(lambda t: t[None, None], lambda s: (1, 1, *s), "drop_2"),
    "drop_2": Transform(lambda t: t[0, 0], lambda s: s[2:], "add_2"),
}

# (foreign name, canonical name, transform on the way in); N is a layer's number, * is weight or bias
Rule = tuple[str, str, str | None]

_BLOCK = "vision_model.encoder.layers.N."
_LAYER = "qformer.encoder.layer.N."
BLIP2: tuple[Rule, ...] = (
    ("vision_model.embeddings.class_embedding", "vision.tower.cls_token", None),
    ("vision_model.embeddings.position_embedding", "vision.tower.pos_embed", None),
    ("vision_model.embeddings.patch_embedding.*", "vision.tower.patch_embed.proj.*", None),
    (_BLOCK + "layer_norm1.*", "vision.tower.blocks.N.norm1.*", None),
    (_BLOCK + "self_attn.qkv.*", "vision.tower.blocks.N.attn.qkv.*", None),
    (_BLOCK + "self_attn.projection.*", "vision.tower.blocks.N.attn.proj.*", None),
    (_BLOCK + "layer_norm2.*", "vision.tower.blocks.N.norm2.*", None),
    (_BLOCK + "mlp.fc1.*", "vision.tower.blocks.N.mlp.fc1.*", None),
    (_BLOCK + "mlp.fc2.*", "vision.tower.blocks.N.mlp.fc2.*", None),
    ("vision_model.post_layernorm.*", "vision.tower.norm.*", None),
    ("query_tokens", "vision.query_tokens", None),
    ("qformer.layernorm.*", "vision.qformer.layernorm.*", None),
    *(
        rule
        for part in ("attention", "crossattention")
        for rule in (
            (_LAYER + part + ".attention.query.*", f"vision.qformer.layers.N.{part}.query.*", None),
            (_LAYER + part + ".attention.key.*", f"vision.qformer.layers.N.{part}.key.*", None),
            (_LAYER + part + ".attention.value.*", f"vision.qformer.layers.N.{part}.value.*", None),
            (_LAYER + part + ".output.dense.*", f"vision.qformer.layers.N.{part}.out.*", None),
            (_LAYER + part + ".output.LayerNorm.*", f"vision.qformer.layers.N.{part}_norm.*", None),
        )
    ),
    (_LAYER + "intermediate_query.dense.*", "vision.qformer.layers.N.up.*", None),
    (_LAYER + "output_query.dense.*", "vision.qformer.layers.N.down.*", None),
    (_LAYER + "output_query.LayerNorm.*", "vision.qformer.layers.N.feed_forward_norm.*", None),
)

QFORMER: tuple[Rule, ...] = (
    *(("qformer." + foreign, canonical, transform) for foreign, canonical, transform in BLIP2),
    ("qformer_proj.0.*", "vision.proj.0.*", None),
    ("qformer_proj.1.*", "vision.proj.1.*", None),
    ("start_img", "vision.start", "drop_2"),
    ("end_img", "vision.end", "drop_2"),
)

_RESBLOCK = "clip.visual.transformer.resblocks.N."
CLIP: tuple[Rule, ...] = (
    ("clip.visual.class_embedding", "vision.tower.cls_token", "add_2"),
    ("clip.visual.positional_embedding", "vision.tower.pos_embed", "add_1"),
    ("clip.visual.conv1.weight", "vision.tower.patch_embed.proj.weight", None),
    ("clip.visual.ln_pre.*", "vision.tower.norm_pre.*", None),
    (_RESBLOCK + "ln_1.*", "vision.tower.blocks.N.norm1.*", None),
    (_RESBLOCK + "attn.in_proj_weight", "vision.tower.blocks.N.attn.qkv.weight", None),
    (_RESBLOCK + "attn.in_proj_bias", "vision.tower.blocks.N.attn.qkv.bias", None),
    (_RESBLOCK + "attn.out_proj.*", "vision.tower.blocks.N.attn.proj.*", None),
    (_RESBLOCK + "ln_2.*", "vision.tower.blocks.N.norm2.*", None),
    (_RESBLOCK + "mlp.c_fc.*", "vision.tower.blocks.N.mlp.fc1.*", None),
    (_RESBLOCK + "mlp.c_proj.*", "vision.tower.blocks.N.mlp.fc2.*", None),
    ("clip.visual.ln_post.*", "vision.tower.norm.*", None),
    ("clip.visual.proj", "vision.tower_proj.weight", "transpose"),
    ("clip_proj.*", "vision.proj.0.*", None),
    ("clip_proj_norm.*", "vision.proj.1.*", None),
)

PERCEIVER: tuple[Rule, ...] = (
    *CLIP,
    ("visual_query", "vision.perceiver.query", None),
    ("visual_blocks.N.norm1.*", "vision.perceiver.blocks.N.norm1.*", None),
    ("visual_blocks.N.attn.qkv.*", "vision.perceiver.blocks.N.attn.qkv.*", None),
    ("visual_blocks.N.attn.proj.*", "vision.perceiver.blocks.N.attn.proj.*", None),
    ("visual_blocks.N.norm2.*", "vision.perceiver.blocks.N.norm2.*", None),
    ("visual_blocks.N.mlp.fc1.*", "vision.perceiver.blocks.N.mlp.fc1.*", None),
    ("visual_blocks.N.mlp.fc2.*", "vision.perceiver.blocks.N.mlp.fc2.*", None),
    ("visual_proj.*", "vision.perceiver.proj.0.*", None),
    ("visual_proj_norm.*", "vision.perceiver.proj.1.*", None),
)

RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "accessory": {"qformer": QFORMER, "clip": CLIP, "perceiver": PERCEIVER},
    "blip2": {"qformer": BLIP2},
}

# what the layouts carry beside the encoder: CLIP's text half, BLIP-2's language model
IGNORED: dict[str, tuple[str, ...]] = {
    "accessory": (
        r"clip\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight)",
        r"clip\.(transformer|ln_final)\..+",
        r"qformer\.language_(projection|model)\..+",
    ),
    "blip2": (r"language_(projection|model)\..+",),
}


def to_canonical(name: str, *, layout: str = "accessory") -> tuple[str, str | None] | None:
    """Return (canonical name, transform of the file's tensor or None); None for a name that no rule knows."""
    return _translate(name, _inward(layout))


def to_reference(canonical: str, *, kind: str, layout: str = "accessory") -> tuple[str, str | None] | None:
    """Return (the layout's name, transform of our tensor or None); None where the layout has no such tensor."""
    return _translate(canonical, _outward(layout, kind))


def ignored(name: str, *, layout: str = "accessory") -> bool:
    """Say whether a file of this layout carries this tensor for other purposes than reading pictures."""
    return any(re.fullmatch(pattern, name) for pattern in IGNORED[layout])


def kind_of(canonical: Iterable[str]) -> str | None:
    """Return the kind of encoder that canonical names belong to; None where they tell of none."""
    names = set(canonical)
    for mark, kind in (("vision.query_tokens", "qformer"), ("vision.perceiver.query", "perceiver")):
        if mark in names:
            return kind
    return "clip" if any(name.startswith("vision.tower.") for name in names) else None


def transform_tensor(transform: str | None, tensor: Tensor) -> Tensor:
    """Return the tensor as the other side holds it: a view of the same bytes."""
    return tensor if transform is None else TRANSFORMS[transform].tensor(tensor)


def transform_shape(transform: str | None, shape: Sequence[int]) -> tuple[int, ...]:
    """Return what `transform_tensor` makes of a shape, without a tensor."""
    return tuple(shape) if transform is None else TRANSFORMS[transform].shape(tuple(shape))


@cache
def _inward(layout: str) -> dict[str, tuple[str, str | None]]:
    """Return foreign template -> (canonical template, transform)."""
    rules = (rule for kind in RULES[layout].values() for rule in kind)
    return {foreign: (canonical, transform) for foreign, canonical, transform in rules}


@cache
def _outward(layout: str, kind: str) -> dict[str, tuple[str, str | None]]:
    """Return canonical template -> (foreign template, transform)."""
    rules = RULES[layout].get(kind, ())
    return {ours: (foreign, transform and TRANSFORMS[transform].inverse) for foreign, ours, transform in rules}


def _translate(name: str, table: dict[str, tuple[str, str | None]]) -> tuple[str, str | None] | None:
    """Look a name up, as it is or with its layer number and its last part left open, and fill these in again."""
    number = re.search(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)", name)
    leaf = re.search(r"(?<=\.)(weight|bias)$", name)
    for open_number in (False, True):
        for open_leaf in (False, True):
            template = name
            if open_leaf and leaf:
                template = template[: leaf.start()] + "*"
            if open_number and number:
                template = template[: number.start()] + "N" + template[number.end() :]
            if template in table:
                target, transform = table[template]
                target = target.replace("*", leaf[0]) if open_leaf and leaf else target
                return (target.replace(".N.", f".{number[0]}.") if open_number and number else target), transform
    return None

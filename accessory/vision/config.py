"""What a vision encoder is made of, as plain values that a config.json can hold.

Must not know torch or timm: whoever only counts slots or transforms pictures reads these values and builds nothing.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

KINDS = ("qformer", "clip", "perceiver", "llava")
CHOICES = {
    "select_feature": ("patch", "cls_patch"),
    "aspect": ("pad", "crop", "anyres"),
    "merge": ("flat", "spatial_unpad"),
    "compat": ("llava", "hf"),
}
MLP = re.compile(r"mlp([1-9])x_gelu")
RESERVED = {"num_classes", "global_pool", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class VisionConfig:
    """One encoder: a timm tower, then what its kind puts between the tower and the language model.

    The fields from `queries` on describe the Q-Former (kind qformer) or the perceiver, those from `select_layer` on
    LLaVA's encoder; kind clip reads none of them.
    """

    kind: Literal["qformer", "clip", "perceiver", "llava"] = "qformer"
    """qformer: learned queries read the tower's tokens; clip: the tokens themselves; perceiver: rows for a prefix;
    llava: the tokens of an inner layer through a projector, of one tile or several."""
    tower: str = "vit"
    """Name of a timm model, or `vit` for a plain timm VisionTransformer of the sizes in tower_args."""
    tower_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for timm: patch_size, embed_dim, depth, num_heads, mlp_ratio, class_token, act_layer, ..."""
    tower_eps: float | None = None
    """Epsilon of the tower's LayerNorms; null: timm's own for that model."""
    tower_proj: int = 0
    """Width of the bias-free projection after the tower (CLIP's own: 768); 0: none. Kinds clip and perceiver."""
    image_size: int = 224
    """Side of the square picture (of a tile), in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """What is subtracted from each colour (of 0..1)."""
    std: tuple[float, float, float] = CLIP_STD
    """What each colour is divided by, after the mean is subtracted."""
    image_transform: str = "resized_center_crop"
    """Transform to use when the user names none; kind llava uses `aspect`."""
    before_bos: bool = False
    """Whether pictures that open a conversation stand before BOS, as with the reference's CLIP, not behind it."""
    queries: int = 32
    """Learned queries: feature rows of a picture, start and end not counted; rows of the prefix for kind perceiver."""
    hidden: int = 768
    """Width of the Q-Former or perceiver."""
    layers: int = 12
    """Depth of the Q-Former or perceiver."""
    heads: int = 12
    """Attention heads of the Q-Former or perceiver."""
    intermediate: int = 3072
    """Inner width of its feed-forward layers."""
    cross_every: int = 2
    """Cross-attention stands in Q-Former layers 0, cross_every, 2 * cross_every, ..."""
    eps: float = 1e-12
    """Epsilon of the Q-Former's LayerNorms (the perceiver's are 1e-5)."""
    norm_first: bool = False
    """Q-Former LayerNorms before each sublayer and one at the end, not (as BERT) after each and one at the start."""
    key_positions: bool = False
    """Q-Former: learned positions are added to the tower's tokens where they serve as cross-attention keys."""
    grid_queries: bool = False
    """Q-Former: initialise query i of k * k, and all positions, with the sin/cos code of its cell of the picture."""
    select_layer: int = -2
    """LLaVA: after which block the tower is left, 1 to its depth, or -1 (the last one) and below; no final norm."""
    select_feature: Literal["patch", "cls_patch"] = "patch"
    """LLaVA: the tokens of the patches, or the class token before them."""
    projector: str = "mlp2x_gelu"
    """LLaVA: linear, mlpNx_gelu (N linears, exact GELU between them) or identity."""
    projector_bias: bool = True
    """LLaVA: whether the projector's linears have a bias."""
    aspect: Literal["pad", "crop", "anyres"] = "pad"
    """LLaVA: the picture on a square of the mean colour, its middle as CLIP's processor cuts it, or tiles."""
    grid_pinpoints: tuple[tuple[int, int], ...] = GRIDS
    """LLaVA, anyres: canvases in pixels as the model's config lists them; `compat` says which number is the width."""
    merge: Literal["flat", "spatial_unpad"] = "flat"
    """LLaVA: rows tile by tile, or line by line of the whole picture with a learned newline behind each."""
    compat: Literal["llava", "hf"] = "llava"
    """LLaVA, anyres: grid_pinpoints are (width, height), as LLaVA reads them, or (height, width), as transformers does:
    another grid for pictures that no canvas shrinks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _colours("mean", self.mean))
        object.__setattr__(self, "std", _colours("std", self.std))
        object.__setattr__(self, "grid_pinpoints", _pairs(self.grid_pinpoints))
        for entry in fields(self):
            _check_type(entry.name, getattr(self, entry.name), entry.type)
        self._check_values()

    def _check_values(self) -> None:
        """Raise ValueError for values that cannot belong together."""
        if self.kind not in KINDS:
            raise ValueError(f"vision kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if ":" in self.tower:
            raise ValueError(f"vision tower: got {self.tower!r}, expected the name of a timm model, not of a place")
        taken = sorted(RESERVED & self.tower_args.keys())
        if taken:
            raise ValueError(
                f"tower_args: got {', '.join(taken)}, expected sizes only; weights come from the checkpoint"
            )
        side = self.tower_args.get("img_size", self.image_size)
        if side != self.image_size:
            raise ValueError(f"tower_args.img_size: got {side}, expected {self.image_size}; leave it out")
        for name in ("image_size", "queries", "hidden", "layers", "heads", "intermediate", "cross_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.hidden % self.heads:
            raise ValueError(f"heads {self.heads} do not divide hidden {self.hidden}; choose a divisor")
        if self.kind == "qformer" and self.tower_proj:
            raise ValueError(f"tower_proj: got {self.tower_proj}, expected 0 for kind qformer; leave it out")
        if self.grid_queries and round(self.queries**0.5) ** 2 != self.queries:
            raise ValueError(f"grid_queries: got {self.queries} queries, expected a square number such as 16 or 36")
        if self.kind == "llava":
            self._check_llava()

    def _check_llava(self) -> None:
        """Raise ValueError for values that LLaVA's encoder cannot be made of."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"vision {name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.projector not in ("linear", "identity") and not MLP.fullmatch(self.projector):
            raise ValueError(
                f"vision projector: got {self.projector!r}, expected linear, identity or mlpNx_gelu such as mlp2x_gelu"
            )
        if self.select_layer == 0:
            raise ValueError("select_layer: got 0, expected the number of a block, 1 for the first or -1 for the last")
        if self.tower_proj:
            raise ValueError(f"tower_proj: got {self.tower_proj}, expected 0 for kind llava; leave it out")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: got {self.image_size}, expected a multiple of the patch size {self.patch_size}"
            )
        if self.merge == "spatial_unpad" and self.select_feature != "patch":
            raise ValueError(
                f"select_feature: got {self.select_feature} with merge spatial_unpad, expected patch; correct one"
            )
        if self.aspect != "anyres":
            return
        if not self.grid_pinpoints:
            raise ValueError("grid_pinpoints: got none with aspect anyres, expected pairs such as [336, 672]")
        for pair in self.grid_pinpoints:
            if any(side < 1 or side % self.image_size for side in pair):
                raise ValueError(
                    f"grid_pinpoints: got {list(pair)}, expected multiples of the tile's side {self.image_size}"
                )

    @property
    def patch_size(self) -> int:
        """Side of the tower's patches in pixels, by its arguments, or by timm's name for it."""
        named = re.search(r"_patch(\d+)(?!\d)", self.tower)
        return self.tower_args.get("patch_size") or (int(named[1]) if named else 16)

    @property
    def side(self) -> int:
        """Patches along the side of the picture (of a tile)."""
        return self.image_size // self.patch_size

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """grid_pinpoints as (width, height)."""
        if self.compat == "llava":
            return self.grid_pinpoints
        return tuple((width, height) for height, width in self.grid_pinpoints)

    @classmethod
    def reference(cls, kind: str) -> VisionConfig:
        """Return the full-size configuration that released Accessory weights of this kind have.

        qformer: BLIP-2's EVA ViT-g (39 layers) and Q-Former; clip, perceiver: OpenAI's CLIP ViT-L/14; llava: that of
        336 pixels as in LLaVA 1.5.
        """
        if kind == "llava":
            return cls(kind=kind, tower="vit_large_patch14_clip_quickgelu_336", image_size=336)
        if kind == "qformer":
            sizes = {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 6144 / 1408}
            return cls(tower_args=sizes, tower_eps=1e-6)
        clip = cls(kind="clip", tower="vit_large_patch14_clip_quickgelu_224", tower_proj=768)
        if kind == "clip":
            return replace(clip, before_bos=True)
        return replace(clip, kind=kind, queries=10, layers=8, heads=16)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisionConfig:
        """Read what `to_dict` gave (or a person wrote); ValueError names an unknown key and the nearest known one."""
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or known
                raise ValueError(f"vision config: got key {name!r}, expected {' or '.join(near)}; rename or drop it")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for json.dump."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _colours(name: str, values: Any) -> tuple[float, ...]:
    """Return three floats."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{name}: got {values!r}, expected three numbers, one for each colour")
    return tuple(float(value) for value in values)


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    """Return pairs of whole numbers."""
    fits = isinstance(values, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int for side in pair) for pair in values
    )
    if not fits:
        raise ValueError(f"grid_pinpoints: got {values!r}, expected a list of pairs such as [[336, 672], [672, 336]]")
    return tuple((first, second) for first, second in values)


def _plain(value: Any) -> Any:
    """Return lists for tuples."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Raise ValueError where a JSON value is of another type than its field."""
    plain = {"int": int, "bool": bool, "str": str, "float": (int, float), "float | None": (int, float, type(None))}
    expected = plain.get(annotation, dict if annotation.startswith("dict") else object)
    if not isinstance(value, expected) or (isinstance(value, bool) and annotation not in ("bool",)):
        raise ValueError(f"vision config {name}: got {value!r}, expected {annotation}")

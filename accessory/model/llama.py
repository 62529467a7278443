"""The LLaMA decoder (1, 2 and 3): token ids and feature rows in, hidden states, logits or the loss out.

Must not know text, files or pictures. Weights have Meta's names; PEFT, vision and quantisation come from outside.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accessory.dist import Cut, Shard
from accessory.model.attention import Attention, Step
from accessory.model.cache import Cache
from accessory.model.head import Head
from accessory.model.parallel import Column, Embedding, Linear, Row, TiedEmbedding, pack, together
from accessory.model.pointwise import rms_norm, swiglu
from accessory.model.rope import Rope, grows
from accessory.model.spelled import first_keys


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder, under the names of Meta's params.json; lengths in tokens."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    """Heads of keys and values; None: as many as n_heads."""
    vocab_size: int = 32000
    multiple_of: int = 256
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    hidden_dim: int | None = None
    """Feed-forward width; None: Meta's formula over dim, ffn_dim_multiplier and multiple_of."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: float | dict[str, Any] | None = None
    """A multiplier of positions, or Hugging Face's dict: linear, ntk, dynamic or llama3."""
    max_seq_len: int = 2048
    """The window the model was trained for."""
    qkv_bias: bool = False
    tied: bool = False
    """Whether the head reads the embedding's weight."""
    head_width: int | None = None
    """Width of an attention head; None: dim // n_heads."""
    sliding_window: int | None = None
    """Newest tokens that a query sees, itself included; None: all."""
    full_layers: int = 0
    """The first layers, which see all tokens whatever sliding_window says."""

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads if self.head_width is None else self.head_width

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)

    @property
    def rope_grows(self) -> bool:
        """Whether keys depend on how long their row was when they were made, so that rows cannot share them."""
        return grows(self.rope_scaling)

    def check(self, shard: Shard) -> None:
        """ValueError where the sizes contradict each other or cannot be cut across `shard.size` ranks."""
        for name in ("dim", "n_layers", "n_heads", "kv_heads", "vocab_size", "multiple_of", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number; check params.json")
        if not (self.rope_theta > 0 and self.norm_eps >= 0):
            raise ValueError(
                f"rope_theta: got {self.rope_theta} with norm_eps {self.norm_eps}, expected positive numbers"
            )
        if (self.head_width is None and self.dim % self.n_heads) or self.head_dim < 2 or self.head_dim % 2:
            wide = "" if self.head_width is None else f" and head_width {self.head_width}"
            raise ValueError(f"dim: got {self.dim} with n_heads {self.n_heads}{wide}, expected heads of one even width")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window: got {self.sliding_window}, expected a positive number, or null for none")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads: got {self.kv_heads}, expected a divisor of n_heads {self.n_heads}")
        if not self.fits(shard.size):
            sizes = ", ".join(str(tp) for tp in range(1, 129) if self.fits(tp))
            raise ValueError(
                f"tp: got {shard.size}, but n_heads {self.n_heads}, n_kv_heads {self.kv_heads}, dim {self.dim} and "
                f"hidden_dim {self.ffn_dim} cannot be cut across it; start {sizes} rank(s)"
            )

    def fits(self, tp: int) -> bool:
        """Whether every weight can be dealt to tp ranks."""
        kv_fit = self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        return kv_fit and all(n % tp == 0 for n in (self.n_heads, self.dim, self.ffn_dim))


class Adapter(Protocol):
    """What a zero-init adapter must offer to sit in `Llama.prompt`."""

    def begin(self, model: Llama, step: Step, visual: Tensor | None) -> Any:
        """The function that `Step.prompt` holds for one forward."""


class Llama(nn.Module):
    """h = embed(ids); h = block(h) for every block; norm(h)."""

    def __init__(
        self,
        config: LlamaConfig,
        shard: Shard | None = None,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build this rank's slices, uninitialised, on `device` (meta: nothing is allocated).

        Raises ValueError when the sizes cannot be cut across `shard.size` ranks.
        """
        super().__init__()
        shard = shard or Shard()
        config.check(shard)
        self.config, self.shard = config, shard
        place = {"shard": shard, "device": device, "dtype": dtype}
        embedding = TiedEmbedding if config.tied else Embedding
        self.tok_embeddings = embedding(config.vocab_size, config.dim, **place)
        self.layers = nn.ModuleList(Block(i, config, **place) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)
        tied = self.tok_embeddings if config.tied else None
        self.output = Head(config.vocab_size, config.dim, tied=tied, **place)
        self.rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling, max_seq_len=config.max_seq_len)
        self.cuts: dict[str, Cut] = {}  # of parameters that PEFT registers here
        self.prompt: Adapter | None = None

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        cache: Cache | None = None,
        rows: Tensor | None = None,
        segments: Tensor | None = None,
        features: Tensor | None = None,
        slots: Tensor | None = None,
        visual: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states [B, T, dim] after the last norm; with `labels`, (loss sum, target count) of `Head`.

        ids, positions [B, T] int64. cache, rows [B]: keys and values of earlier tokens; position -1 is padding.
        segments [B, T], without a cache: packed documents 1, 2, ... see themselves and segment 0, a shared prefix,
        earlier tokens only; -1 is padding. features [N, dim], slots [B, T]: where slots >= 0 the embedding is that
        feature row and the id is ignored. visual [B, P, dim]: added to a zero-init adapter's prompt.
        labels [B, T]: the target of each position itself (already shifted), -100 where there is none.
        """
        h = self.tok_embeddings(ids)
        if features is not None:
            assert slots is not None and len(features), f"features {tuple(features.shape)} need slots and rows"
            h = torch.where((slots >= 0).unsqueeze(-1), features.to(h.dtype)[slots.clamp(min=0)], h)
        step = self._step(positions, cache, rows, segments)
        if self.config.sliding_window is not None:
            step.window = self.config.sliding_window
            step.near, step.near_starts = self._near(step, step.window)
        if self.prompt is not None:
            step.prompt = self.prompt.begin(self, step, visual)
        for layer in self.layers:
            h = layer(h, step)
        h = self.norm(h)
        return h if labels is None else self.output(h, labels)

    def _step(self, positions: Tensor, cache: Cache | None, rows: Tensor | None, segments: Tensor | None) -> Step:
        """Rotations and mask, computed once for all layers."""
        assert cache is None or segments is None, "segments are for packed rows, which have no cache"
        turns = self.rope(positions)
        if cache is None:
            mask = None if segments is None else segment_mask(segments)
            starts = first_keys(mask) if mask is not None and mask.device.type == "cpu" else None
            return Step(positions, turns, mask, starts=starts)
        place = cache.place(rows, positions)
        return Step(positions, turns, place.mask, cache, rows, place)

    def _near(self, step: Step, window: int) -> tuple[Tensor | None, list[int] | None]:
        """The mask of the layers that see `window` tokens, and what `Step.starts` is to it (arXiv 2310.06825)."""
        mask, positions = step.mask, step.positions
        length = positions.shape[1] if mask is None else mask.shape[-1]
        if length <= window:
            return mask, step.starts
        keys = positions
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()[None, None]
        elif step.cache is not None:
            keys = torch.arange(length, device=positions.device)[None]
        near = mask & (positions[:, None, :, None] - keys[:, None, None, :] < window)
        return near, first_keys(near) if step.cache is None and near.device.type == "cpu" else None

    def new_cache(
        self, *, rows: int, size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Cache:
        """A cache for `rows` requests of up to `size` tokens, on the model's device; on `meta` it only has sizes."""
        wk, norm = self.layers[0].attention.wk, self.norm.weight
        kv_heads = wk.cuts["weight"].local_shape[0] // self.config.head_dim
        return Cache(
            self.config.n_layers,
            rows=rows,
            size=size,
            kv_heads=kv_heads,
            head_dim=self.config.head_dim,
            device=norm.device if device is None else device,
            dtype=norm.dtype if dtype is None else dtype,
        )

    def linears(self) -> dict[str, Linear]:
        """The seven tensor-parallel linears of every layer, by name; PEFT and quantisation choose among these."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def fuse(self) -> None:
        """For inference: join wq, wk, wv and w1, w3 of each layer into one buffer each; their weights become views."""
        for layer in self.layers:
            attention, ffn = layer.attention, layer.feed_forward
            for group in ((attention.wq, attention.wk, attention.wv), (ffn.w1, ffn.w3)):
                if all(linear.storage is None and linear.pack is None for linear in group):
                    pack(group)


class Block(nn.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h))."""

    def __init__(
        self, layer: int, config: LlamaConfig, *, shard: Shard, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        place = {"shard": shard, "device": device, "dtype": dtype}
        self.attention = Attention(
            layer,
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            slides=config.sliding_window is not None and layer >= config.full_layers,
            qkv_bias=config.qkv_bias,
            **place,
        )
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, **place)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        h = x + self.attention(self.attention_norm(x), step)
        return h + self.feed_forward(self.ffn_norm(h))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): SwiGLU, arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int, *, shard: Shard, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        place = {"shard": shard, "device": device, "dtype": dtype}
        self.w1 = Column(dim, hidden, **place)
        self.w3 = Column(dim, hidden, **place)
        self.w2 = Row(hidden, dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = together(x, (self.w1, self.w3))
        return self.w2(swiglu(gate, up))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467), the division in fp32."""

    def __init__(self, dim: int, *, eps: float, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def segment_mask(segments: Tensor) -> Tensor:
    """segments [B, T] -> bool [B, 1, T, T]: earlier tokens of one's own segment and of segment 0; padding: itself."""
    own = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    shared = (segments == 0).unsqueeze(-2) & (segments >= 0).unsqueeze(-1)
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ((own | shared) & earlier).unsqueeze(1)


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """Which slice of every tensor of the state dict this rank holds; whole where a module says nothing."""
    cuts: dict[str, Cut] = {}
    for prefix, module in model.named_modules():
        said = getattr(module, "cuts", {})
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            cuts[name] = said.get(name.rpartition(".")[2], Cut(tuple(parameter.shape)))
    return cuts


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int = 0, names: Collection[str] | None = None) -> None:
    """First weights of all parameters (or of `names`), the same at any tp size.

    Matrices follow the reference (kaiming uniform, a = sqrt 5: bound 1 / sqrt(fan in)); embeddings normal with
    std 0.02; norms 1; biases 0. Parameters below `vision.` are the vision room's own affair and are left alone.
    """
    for name, parameter in model.named_parameters():
        if name.startswith("vision.") or (names is not None and name not in names):
            continue
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name == "tok_embeddings.weight":
            draw_whole(model, name, lambda full, generator: full.normal_(0.0, 0.02, generator=generator), seed=seed)
        else:
            draw_whole(model, name, _kaiming, seed=seed)


def draw_whole(model: nn.Module, name: str, draw: Callable[[Tensor, torch.Generator], Any], *, seed: int) -> None:
    """Fill one parameter from (seed, its name): the whole tensor is drawn in fp32, and this rank takes its slice."""
    parameter, cut = model.get_parameter(name), cuts_of(model)[name]
    full = torch.empty(cut.shape, dtype=torch.float32)
    draw(full, torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode())))
    if cut.dim is None:
        parameter.copy_(full)
        return
    parameter.zero_()
    rows = cut.stop - cut.start
    parameter.narrow(cut.dim, 0, rows).copy_(full.narrow(cut.dim, cut.start, rows))


def _kaiming(full: Tensor, generator: torch.Generator) -> None:
    """Uniform within 1 / sqrt(fan in), in place."""
    bound = full.shape[-1] ** -0.5
    full.uniform_(-bound, bound, generator=generator)

"""Logits to the next id: greedy, temperature, top-k, top-p, min-p, penalties.

Must not know text or models. A request's randomness comes from (seed, position), never from a shared generator, and
every sum runs along one row in an order of its own, so a result does not depend, bit by bit, on who else is in the
batch. Rows are sorted only as deep as a filter looks, and not at all where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_BLOCK = 256  # tokens whose probabilities are summed before the draw decides among them
_DEPTH = 256  # how many of the likeliest tokens are sorted at first
_BUCKETS, _SPAN = 8192, 32.0  # steps of logit in which the rest is counted, down to exp(-32) of the likeliest
_AT_ONCE = 1 << 18  # logits that a processor works on, so that what lies between steps stays in its cache
_ONE = 1 << 40  # a probability of 1 where they are counted: sums of integers depend on no order


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens."""

    temperature: float = 0.0
    """0: greedy. Above: the higher, the more even."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keep this many tokens; 0: all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: logits of ids already seen are divided by this, or multiplied where negative (arXiv 1909.05858)."""
    frequency_penalty: float = 0.0
    """A token's logit loses this for each time that the answer has it already; -2 to 2."""
    presence_penalty: float = 0.0
    """A token's logit loses this once where the answer has it already; -2 to 2."""
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (all) or a positive count"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number > 0; 1 is none"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "a number in [-2, 2]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "a number in [-2, 2]"),
        )
        for name, fine, expected in checks:
            if not fine:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {expected}")


def sample(logits: Tensor, params: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """Choose one id per row: logits [B, V] fp32 -> ids [B] int64 on the same device.

    positions: the position that each chosen token will take. -inf forbids a token; each row has at least one that it
    does not forbid, and neither NaN nor +inf. Of equal logits the lowest id is the likelier. Penalties are not applied
    here: see `penalised` and `lowered`.
    """
    assert len(params) == len(positions) == len(logits), (len(params), len(positions), len(logits))
    drawing = [row for row, p in enumerate(params) if p.temperature > 0]
    chosen = torch.zeros(len(params), dtype=torch.int64, device=logits.device)
    if len(drawing) < len(params):
        chosen = logits.argmax(-1)
    together = len(params) if logits.device.type != "cpu" else max(1, _AT_ONCE // logits.shape[1])
    for start in range(0, len(drawing), together):
        rows = drawing[start : start + together]
        some = [params[row] for row in rows]
        uniforms = [uniform(p.seed, positions[row]) for row, p in zip(rows, some, strict=True)]
        dense = rows[-1] - rows[0] + 1 == len(rows)
        part = logits[rows[0] : rows[-1] + 1] if dense else logits[torch.tensor(rows, device=logits.device)]
        chosen[torch.tensor(rows, device=logits.device)] = _draw(part, some, uniforms)
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: splitmix64 applied to both."""
    mixed = _splitmix(_splitmix(seed & _MASK) ^ (position & _MASK))
    return (mixed >> 11) * 2.0**-53


def penalised(logits: Tensor, penalty: float) -> Tensor:
    """The repetition penalty: logits of seen ids pushed down, whatever their sign (arXiv 1909.05858)."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def lowered(count: int, params: Sampling) -> float:
    """What the frequency and presence penalties add to the logit of a token that an answer has `count` times:
    -count * frequency - (count > 0) * presence, as OpenAI defines them."""
    return -(count * params.frequency_penalty + (count > 0) * params.presence_penalty)


def leading(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row [B, V]: (logits [B, W], ids [B, W]), likeliest first, the lowest id of equals.

    W is at least min(count, V): each row holds its `count` likeliest and a few that the search turned up beside them,
    all there are down to the last one's logit. -inf fills places that are left over.
    """
    rows, vocabulary = logits.shape
    wide = vocabulary // (2 * count)
    if wide < 2:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        return ordered, ids
    # The maxima of blocks: at least `count` tokens reach the one of rank `count`, and little else does.
    whole = vocabulary - vocabulary % wide
    maxima = logits[:, :whole].reshape(rows, -1, wide).amax(-1)
    least = maxima.topk(count).values[:, -1:].clamp(min=torch.finfo(logits.dtype).min)
    return _sorted(logits, logits >= least, count)


def _sorted(logits: Tensor, wanted: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The wanted tokens of each row, as `leading` gives them, in at least `width` places."""
    row, token = wanted.nonzero(as_tuple=True)
    found = torch.bincount(row, minlength=len(logits))
    place = torch.arange(len(row), device=row.device) - (found.cumsum(0) - found)[row]
    width = max(width, int(found.max()))
    ordered = logits.new_full((len(logits), width), -torch.inf)
    ids = torch.zeros((len(logits), width), dtype=torch.int64, device=logits.device)
    ordered[row, place], ids[row, place] = logits[row, token], token
    ordered, order = ordered.sort(dim=-1, descending=True, stable=True)
    return ordered, ids.gather(1, order)


def _draw(logits: Tensor, params: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Inverse-transform sampling from the filtered distribution: logits [B, V] -> ids [B]."""
    temperature = _column([_defined(p.temperature) for p in params], logits).to(logits.dtype)
    probs = (logits - logits.amax(-1, keepdim=True)).div_(temperature).softmax(-1)
    draw = _column(uniforms, logits)
    filtered = [row for row, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < logits.shape[1]]
    chosen = torch.zeros(len(params), dtype=torch.int64, device=logits.device)
    if len(filtered) < len(params):
        chosen = _inverse(_above(probs, [p.min_p for p in params]), draw)
    for method in (_narrow, _wide):
        if filtered:
            rows = torch.tensor(filtered, device=logits.device)
            every = len(filtered) == len(params)
            part = (logits, probs, draw) if every else (logits[rows], probs[rows], draw[rows])
            ids, enough = method(*part, [params[row] for row in filtered])
            chosen[rows] = ids
            filtered = [row for row, done in zip(filtered, enough.tolist(), strict=True) if not done]
    return chosen


def _narrow(logits: Tensor, probs: Tensor, draw: Tensor, params: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """A draw [B] among the likeliest tokens, and whether these are all that the filters keep [B]."""
    vocabulary = logits.shape[1]
    depth = vocabulary if vocabulary < 4 * _DEPTH else _DEPTH
    ordered, ids = leading(logits, depth)
    there = ordered > -torch.inf
    likely = probs.gather(1, ids).double() * there
    rank = torch.arange(ids.shape[1], device=ids.device)
    keep = likely.cumsum(-1) - likely < _column([p.top_p for p in params], logits)
    keep &= rank < _column([p.top_k or vocabulary for p in params], logits)
    keep &= likely >= _column([p.min_p for p in params], logits) * likely[:, :1]
    keep &= there
    keep[:, 0] = True
    edges = (likely * keep).cumsum(-1)
    found = there.sum(-1)
    enough = (keep.sum(-1) < found) | (found < depth) | (depth == vocabulary)
    return ids.gather(1, _search(edges, draw * edges[:, -1:]))[:, 0], enough


def _wide(logits: Tensor, probs: Tensor, draw: Tensor, params: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """The same where the filters keep many: buckets of logits tell about where they cut, and one is sorted there."""
    top_p = _column([p.top_p for p in params], logits)
    top_k = _column([p.top_k or logits.shape[1] for p in params], logits)
    steps = _column([_BUCKETS / _SPAN / _defined(p.temperature) for p in params], logits).to(logits.dtype)
    bucket = (logits.amax(-1, keepdim=True) - logits).mul_(steps).clamp_(max=_BUCKETS - 1).long()
    counts = torch.zeros((len(logits), _BUCKETS), dtype=torch.int64, device=logits.device)
    mass = counts.scatter_add(1, bucket, (probs * _ONE).long()).cumsum(-1)
    cut = (mass < top_p * _ONE).sum(-1, keepdim=True)
    number = counts
    if any(p.top_k for p in params):
        number = counts.scatter_add(1, bucket, torch.ones_like(bucket)).cumsum(-1)
        cut = cut.minimum((number < top_k).sum(-1, keepdim=True))
    sure = bucket < cut - 1  # counting rounds: the neighbours of the bucket are looked at, too
    ordered, ids = _sorted(logits, (bucket <= cut + 1) & ~sure, 1)
    kept = sure.to(probs.dtype).mul_(probs)
    likely = probs.gather(1, ids).double() * (ordered > -torch.inf)
    keep = _sums(kept).cumsum(-1)[:, -1:] + likely.cumsum(-1) - likely < top_p
    before = torch.where(cut > 1, number.gather(1, (cut - 2).clamp(min=0)), 0)
    keep &= before + torch.arange(ids.shape[1], device=ids.device) < top_k
    kept = kept.scatter_add(1, ids, (likely * keep).to(kept.dtype))
    return _inverse(_above(kept, [p.min_p for p in params]), draw), torch.ones_like(sure[:, 0])


def _sums(probs: Tensor) -> Tensor:
    """The sums of blocks of each row [B, V], fp64 [B, V / 256], the last of which may be shorter."""
    whole = probs.shape[1] - probs.shape[1] % _BLOCK
    sums = probs[:, :whole].reshape(len(probs), -1, _BLOCK).sum(-1)
    if whole < probs.shape[1]:
        sums = torch.cat((sums, probs[:, whole:].cumsum(-1)[:, -1:]), dim=-1)
    return sums.double()


def _above(probs: Tensor, shares: Sequence[float]) -> Tensor:
    """Probabilities [B, V] without those below a share of the row's highest."""
    if not any(shares):
        return probs
    return probs.masked_fill(probs < _column(shares, probs).to(probs.dtype) * probs.amax(-1, keepdim=True), 0)


def _inverse(probs: Tensor, draw: Tensor) -> Tensor:
    """The ids [B] at which the running sum of probs [B, V] passes draw [B, 1] of the whole, block by block."""
    short = -probs.shape[1] % _BLOCK
    sums = _sums(probs)
    edges = sums.cumsum(-1)
    target = draw * edges[:, -1:]
    block = _search(edges, target)
    before = (edges - sums).gather(1, block)
    padded = torch.nn.functional.pad(probs, (0, short)) if short else probs
    blocks = padded.reshape(len(probs), -1, _BLOCK)
    inner = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]].double().cumsum(-1)
    return (block * _BLOCK + _search(inner, (target - before).clamp(min=0)))[:, 0]


def _search(edges: Tensor, target: Tensor) -> Tensor:
    """The first place [B, 1] whose edge lies beyond the target; rounding never leads past the last that adds to it."""
    last = torch.searchsorted(edges, edges[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(edges, target.contiguous(), right=True), last)


def _defined(temperature: float) -> float:
    """A temperature by which fp32 can be divided."""
    return min(max(temperature, 1e-6), 1e30)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers [B, 1] fp64 beside a tensor."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _splitmix(x: int) -> int:
    """One round of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)

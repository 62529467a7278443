"""The optimiser over the fp32 masters, and its state as pieces that any layout of ranks can take up.

Must not know the model, steps or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.checkpoint.boxes import Box, Piece
from accessory.train.muon import Muon
from accessory.train.parts import Part
from accessory.train.settings import Settings
from accessory.train.trainee import Trainee

ADAM = ("exp_avg", "exp_avg_sq")
MUON = ("momentum_buffer",)
EIGHT = {"exp_avg": "1", "exp_avg_sq": "2"}  # bitsandbytes: state1, qmap1, absmax1, ...
STEP = "step"  # the piece that counts updates
QUANTISED_BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit state


def make_optimizer(trainee: Trainee, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser that the settings name, with groups by part and by decay; `lr` of a group is its part's peak.

    Norms, biases and all that has one dim have no decay. Raises ValueError where the optimiser cannot run so.
    """
    kind = settings.optim
    if kind == "muon" and (trainee.ranks.dp_size > 1 or trainee.ranks.shard.size > 1):
        ranks = trainee.ranks
        raise ValueError(
            f"optim: got muon with {ranks.dp_size} data-parallel and {ranks.shard.size} tensor-parallel ranks, expected"
            " one of each, since it needs whole matrices; take adamw"
        )
    groups = list(_groups(trainee, settings))
    betas = (settings.adam_beta1, settings.adam_beta2)
    if kind == "sgd":
        return torch.optim.SGD(groups)
    if kind == "adamw_8bit":
        return _eight_bit(groups, betas, settings.adam_epsilon)
    hidden = [group for group in groups if group["hidden"] and kind == "muon"]
    others = [group for group in groups if not group["hidden"] or kind != "muon"]
    adamw = torch.optim.AdamW(others, betas=betas, eps=settings.adam_epsilon, fused=True) if others else None
    if not hidden:
        return adamw
    muon = Muon(hidden)
    return Two(muon, adamw) if adamw is not None else muon


class Two:
    """Two optimisers that step together, for the loop as one."""

    def __init__(self, *both: torch.optim.Optimizer) -> None:
        self.both = both
        self.state = {parameter: one.state[parameter] for one in both for parameter in _parameters(one)}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both."""
        return [group for one in self.both for group in one.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        for one in self.both:
            one.step()


def optimizer_pieces(optimizer: torch.optim.Optimizer | Two, trainee: Trainee) -> dict[str, Piece]:
    """The state as pieces named `exp_avg/<key>`, fp32, and `step`; views, or for 8-bit state its values."""
    found = {name: piece for name, _, _, piece in _pieces(optimizer, trainee)}
    ranks = trainee.ranks
    found[STEP] = Piece(Box.whole((1,)), torch.tensor([_updates(optimizer)]), ranks.rank == 0)
    return found


@torch.no_grad()
def load_optimizer(
    optimizer: torch.optim.Optimizer | Two, trainee: Trainee, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Take up a state: (name, tensor of the box that `optimizer_pieces` gave), in any order."""
    places = {name: (parameter, key, piece) for name, parameter, key, piece in _pieces(optimizer, trainee)}
    for name, tensor in tensors:
        if name == STEP:
            _set_updates(optimizer, float(tensor))
            continue
        parameter, key, piece = places[name]
        piece.tensor.copy_(tensor)
        if key not in optimizer.state[parameter] and parameter.numel():
            _write_eight(optimizer.state[parameter], key, piece.tensor, parameter)


def _groups(trainee: Trainee, settings: Settings) -> Iterator[dict[str, Any]]:
    """Parameters that share part, decay and kind; shards without elements belong to none."""
    for part in trainee.parts:
        for decays in (True, False):
            for hidden in (True, False):
                params = [
                    trainee.masters[name]
                    for name in part.names
                    if _decays(name, trainee) == decays and _hidden(name, trainee, part) == hidden
                ]
                if params := [leaf for leaf in params if leaf.numel()]:
                    decay = settings.weight_decay if decays else 0.0
                    yield {"params": params, "lr": part.lr, "weight_decay": decay, "part": part.name, "hidden": hidden}


def _decays(name: str, trainee: Trainee) -> bool:
    """Whether weight decay is for this parameter."""
    return len(trainee.cuts[name].shape) > 1 and not name.endswith(("bias", "norm.weight"))


def _hidden(name: str, trainee: Trainee, part: Part) -> bool:
    """Whether it is a matrix between hidden states, which Muon is for."""
    outer = name.startswith(("tok_embeddings.", "output.", "prefix"))
    return len(trainee.cuts[name].shape) == 2 and name.endswith("weight") and not outer


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimiser."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _pieces(optimizer: torch.optim.Optimizer | Two, trainee: Trainee) -> Iterator[tuple[str, Tensor, str, Piece]]:
    """(name, parameter, key of its state, piece) of every tensor of the state, which is made where there is none."""
    owners = {p: one for one in getattr(optimizer, "both", (optimizer,)) for p in _parameters(one)}
    kinds = {_kind(one): one for one in owners.values()}
    for name, leaf in trainee.masters.items():
        kind = _kind(owners[leaf]) if leaf in owners else next(iter(kinds), ())
        for key in kind:
            tensor = _tensor(owners[leaf], leaf, key) if leaf in owners else torch.empty_like(leaf)
            yield f"{key}/{name}", leaf, key, trainee.piece(name, tensor.detach())


def _kind(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors that an optimiser keeps for a parameter."""
    if isinstance(optimizer, torch.optim.SGD):
        return ()
    return MUON if isinstance(optimizer, torch.optim.Muon) else ADAM


@torch.no_grad()
def _tensor(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> Tensor:
    """One tensor of a parameter's state; all of it is made, as the optimiser would, where there is none."""
    state = optimizer.state[parameter]
    if not state and hasattr(optimizer, "init_state"):  # bitsandbytes
        at = next((g, group, p) for g, group in enumerate(optimizer.param_groups) for p in _places(group, parameter))
        optimizer.init_state(at[1], parameter, at[0], at[2])
    elif not state:
        for name in _kind(optimizer):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if not isinstance(optimizer, torch.optim.Muon):
            fused = any(group.get("fused") and _places(group, parameter) for group in optimizer.param_groups)
            state["step"] = torch.zeros((), device=parameter.device if fused else None)
    return state[key] if key in state else _read_eight(state, key, parameter)


def _places(group: dict[str, Any], parameter: Tensor) -> list[int]:
    """Where a parameter is in a group: one index or none."""
    return [index for index, other in enumerate(group["params"]) if other is parameter]


def _updates(optimizer: torch.optim.Optimizer | Two) -> float:
    """How many updates the state has seen."""
    return max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0.0)


def _set_updates(optimizer: torch.optim.Optimizer | Two, count: float) -> None:
    """Say so to every parameter's state."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(count)
        elif "step" in state:
            state["step"] = int(count)


def _eight_bit(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with block-wise 8-bit state (arXiv 2110.02861)."""
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=eps)
    optimizer.fill_qmap()
    # its signed map reaches from -0.993 to 1: made even, values read from the state give the same codes again
    optimizer.name2qmap["dynamic"][0] = -1.0
    return optimizer


def _read_eight(state: dict[str, Any], key: str, parameter: Tensor) -> Tensor:
    """The values of 8-bit state; small parameters have it in fp32."""
    number = EIGHT[key]
    held = state[f"state{number}"]
    if held.dtype != torch.uint8:
        return held
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
    return dequantize_blockwise(held, absmax=absmax, code=code, blocksize=QUANTISED_BLOCK).view_as(parameter)


def _write_eight(state: dict[str, Any], key: str, values: Tensor, parameter: Tensor) -> None:
    """The reverse."""
    number = EIGHT[key]
    held = state[f"state{number}"]
    whole = torch.zeros_like(parameter)
    whole[tuple(slice(0, size) for size in values.shape)] = values
    if held.dtype != torch.uint8:
        held.copy_(whole)
        return
    # searched here, since bitsandbytes' own search takes a neighbour of very small values
    code, flat = state[f"qmap{number}"], whole.flatten()
    blocks = F.pad(flat, (0, -len(flat) % QUANTISED_BLOCK)).view(-1, QUANTISED_BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    blocks /= scales.clamp(min=torch.finfo(scales.dtype).tiny)
    codes = torch.bucketize(blocks, (code[1:] + code[:-1]) / 2, out_int32=True)
    held.copy_(codes.flatten()[: len(flat)].view_as(held))
    state[f"absmax{number}"].copy_(scales[:, 0])

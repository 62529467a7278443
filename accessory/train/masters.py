"""The fp32 weights that the optimiser updates, and what the model computes with: the same, 16-bit copies, or shards.

Must not know losses, schedules or which parts there are; it is told which parameters are trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from accessory.dist import Ranks
from accessory.model import IGNORED
from accessory.train.joined import Joined

PREFIX = "llama."  # of the canonical names inside Joined


class Masters(Protocol):
    """What both ways of holding weights offer."""

    leaves: dict[str, Tensor]
    """Canonical name -> fp32 leaf, this rank's part of the parameter."""
    dealt: frozenset[str]
    """Parameters whose rows are dealt to the data-parallel ranks; of the others each holds all."""

    def begin(self, *, last: bool) -> None:
        """Before a backward pass; last: of the step."""

    def collect(self) -> None:
        """Put the accumulated gradient of every parameter on its leaf; zeros where it got none."""

    def follow(self) -> None:
        """Let the model compute with the leaves' values; gradients are cleared."""

    def gather(self, *, whole: bool) -> None:
        """Prepare forwards outside the root module, collectively; whole: weights of blocks are read outside them."""

    def scatter(self) -> None:
        """Free what `gather` and forwards without a backward pass left whole."""

    def local(self, name: str) -> Tensor:
        """This rank's part of a frozen parameter."""


class Copies:
    """One data-parallel rank. In fp32 the leaves are the model's own parameters.

    Otherwise the model holds 16-bit copies; their gradients are added to fp32 ones as soon as they are complete, and
    freed. offload: leaves and gradients are in the host's memory.
    """

    def __init__(
        self, module: Joined, names: Iterable[str], *, device: torch.device, dtype: torch.dtype, offload: bool
    ) -> None:
        self._module = module
        self._copies: dict[str, nn.Parameter] = {}
        self._sums: dict[str, Tensor] = {}
        self._fresh: set[str] = set()  # whose sum holds a gradient of this step
        self.leaves: dict[str, Tensor] = {}
        self.dealt: frozenset[str] = frozenset()
        home = torch.device("cpu") if offload else device
        apart = dtype != torch.float32 or home.type != device.type
        trained = set(names)
        for name, parameter in list(module.llama.named_parameters()):
            if name not in trained:
                parameter.data = parameter.data.to(device, dtype)
            elif apart:
                self.leaves[name] = parameter.detach().to(home, torch.float32).clone().requires_grad_()
                copy = nn.Parameter(parameter.detach().to(device, dtype))
                copy.register_post_accumulate_grad_hook(partial(self._add, name))
                _replace(module.llama, name, copy)
                self._copies[name] = copy
            else:
                parameter.data = parameter.data.to(device, torch.float32)
                self.leaves[name] = parameter
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)

    def begin(self, *, last: bool) -> None:
        """Nothing to prepare."""

    def collect(self) -> None:
        for name, leaf in self.leaves.items():
            if name in self._copies:
                if name not in self._fresh:
                    self._sum(name).zero_()
                leaf.grad = self._sums[name]
            elif leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)

    @torch.no_grad()
    def follow(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None
        self._fresh.clear()
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [self.leaves[name] for name in self._copies])

    def gather(self, *, whole: bool) -> None:
        """All is whole."""

    def scatter(self) -> None:
        """Nothing to free."""

    def local(self, name: str) -> Tensor:
        return self._module.llama.get_parameter(name).detach()

    def _add(self, name: str, copy: Tensor) -> None:
        """Add a copy's gradient to the fp32 sum; the hook of each copy."""
        grad, copy.grad = copy.grad, None
        if name in self._fresh:
            self._sums[name].add_(grad.to(self._sums[name].device))
        else:
            self._sum(name).copy_(grad)
            self._fresh.add(name)

    def _sum(self, name: str) -> Tensor:
        """The buffer of a gradient, kept from step to step."""
        if name not in self._sums:
            self._sums[name] = torch.empty_like(self.leaves[name], requires_grad=False)
        return self._sums[name]


class Shards:
    """Several data-parallel ranks: FSDP2, one group of weights per block and one for the rest; leaves are its shards.

    zero 2: trained weights stay whole from their first use in a step to its last; frozen ones are whole on every rank.
    zero 3: both are gathered layer by layer. Frozen weights of the vision part are always whole, and quantised storage
    too: a rank without pictures then needs no collective that others have.
    """

    def __init__(
        self, module: Joined, names: Iterable[str], *, ranks: Ranks, dtype: torch.dtype, zero: int, offload: bool
    ) -> None:
        self._module, self._keep = module, zero == 2
        trained = set(names)
        ignored: set[nn.Parameter] = set()
        for name, parameter in list(module.llama.named_parameters()):
            if name in trained:
                parameter.data = parameter.data.float()
                continue
            parameter.data = parameter.data.to(dtype)
            if zero == 2 or name.startswith("vision."):
                parameter.data = parameter.data.to(ranks.device)
                ignored.add(parameter)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(ranks.device)
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotations stay in fp32
        )
        store = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if offload else OffloadPolicy()
        mesh = DeviceMesh.from_group(ranks.dp_group, ranks.device.type, mesh_dim_names=("dp",))
        options = {"mesh": mesh, "mp_policy": policy, "offload_policy": store, "ignored_params": ignored}
        for unit in _units(module):
            if any(parameter not in ignored for parameter in unit.parameters()):
                fully_shard(unit, reshard_after_forward=zero == 3, **options)
        fully_shard(module, reshard_after_forward=False, **options)
        self._groups = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        with torch.no_grad():
            # one position, once: FSDP learns which module is its root and settles where shards are stored
            ids = torch.zeros(1, 1, dtype=torch.int64, device=ranks.device)
            module(ids, ids, torch.full_like(ids, IGNORED))
            self.scatter()
            parameters = dict(module.llama.named_parameters())
            self._sharded = {name: parameter for name, parameter in parameters.items() if name in trained}
            self.leaves = {name: tensor.to_local().detach() for name, tensor in self._sharded.items()}
        self.dealt = frozenset(name for name, tensor in parameters.items() if isinstance(tensor, DTensor))
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def begin(self, *, last: bool) -> None:
        """Between the micro-batches of a step weights may stay whole."""
        self._module.set_reshard_after_backward(last or not self._keep)

    @torch.no_grad()
    def collect(self) -> None:
        for name, leaf in self.leaves.items():
            grad = self._sharded[name].grad
            leaf.grad = torch.zeros_like(leaf) if grad is None else grad.to_local()

    def follow(self) -> None:
        for name, leaf in self.leaves.items():
            leaf.grad = self._sharded[name].grad = None

    def gather(self, *, whole: bool) -> None:
        """The root; blocks gather themselves in their forwards, and stay whole at zero 2."""
        self._module.unshard()
        for unit in self._groups:
            if whole:
                unit.unshard()
                unit.set_reshard_after_forward(False, recurse=False)

    def scatter(self) -> None:
        for unit in self._groups:
            unit.set_reshard_after_forward(not self._keep and unit is not self._module, recurse=False)
            unit.reshard()

    def local(self, name: str) -> Tensor:
        parameter = self._module.llama.get_parameter(name).detach()
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _units(module: Joined) -> list[nn.Module]:
    """What is gathered at once: the decoder's blocks and the tower's."""
    tower = getattr(getattr(module.llama, "vision", None), "tower", None)
    return [*module.llama.layers, *getattr(tower, "blocks", ())]


def _replace(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register another parameter under a name."""
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._parameters[leaf] = parameter

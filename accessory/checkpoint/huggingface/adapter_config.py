"""adapter_config.json of PEFT's LoRA: which linears it reaches, of what rank and factor; what of it is not computed.

Must not know torch, tensors or files: values come in, values go out. Names are those of the adapter's own modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL = "all-linear"
BIASES = ("none", "all", "lora_only")
# starts that change the base's weights, so that what was learned is no difference to the base as it is released
_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FEATURES = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "lora_bias",
)
_HARMLESS = {"use_rslora", "runtime_config", "megatron_config", "loftq_config", "eva_config", "corda_config"}
_HARMLESS |= {"lora_ga_config"}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says."""

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ()
    """Last parts of names (or whole ones), or a regular expression over the whole name, or all-linear."""
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    """Only these layers; empty: all."""
    layers_pattern: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    saved: tuple[str, ...] = ()
    """Modules that are stored whole."""
    base: str | None = None

    def shape(self, module: str) -> tuple[int, float]:
        """Rank of a linear, and the factor on the product of its two matrices."""
        rank = _by_pattern(self.ranks, module, self.rank)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def reaches(self, module: str) -> bool:
        """Whether the adapter hangs on a linear of this name."""
        if _named(self.excluded, module) or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL:
                return not module.endswith("lm_head")
            return re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        return _named(self.targets, module) and (not self.layers or _layer(self.layers_pattern, module) in self.layers)


def read_adapter(config: Mapping[str, Any], *, where: str) -> AdapterConfig:
    """Translate an adapter_config.json. ValueError, naming `where` and the feature, for what we do not compute."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind!r}, expected LORA; merge it into its base with peft first")
    on = [name for name, value in config.items() if value and name.startswith("use_") and name not in _HARMLESS]
    on += [name for name, value in config.items() if value and name.endswith("_config") and name not in _HARMLESS]
    on += [name for name in _FEATURES if config.get(name)]
    if on:
        raise ValueError(
            f"{where}: {', '.join(sorted(on))} is set, which is not computed here (plain LoRA and rsLoRA are); merge"
            " it into its base with peft first"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED):
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changes the base's weights, expected an adapter for the"
            " base as it is; save it with path_initial_model_for_weight_conversion"
        )
    rank, alpha, bias = config.get("r", 8), config.get("lora_alpha", 8), config.get("bias", "none")
    sane = type(rank) is int and rank > 0 and isinstance(alpha, int | float) and bias in BIASES
    if not sane:
        raise ValueError(
            f"{where}: r is {rank!r}, lora_alpha {alpha!r}, bias {bias!r}, expected a positive rank, a number and one"
            f" of {', '.join(BIASES)}; correct it"
        )
    layers = config.get("layers_to_transform")
    return AdapterConfig(
        rank=rank,
        alpha=float(alpha),
        rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=_words(config.get("target_modules"), "target_modules", where),
        excluded=_words(config.get("exclude_modules"), "exclude_modules", where),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        layers_pattern=tuple(_listed(config.get("layers_pattern"))),
        ranks=_table(config.get("rank_pattern"), "rank_pattern", where),
        alphas=_table(config.get("alpha_pattern"), "alpha_pattern", where),
        bias=bias,
        saved=tuple(_listed(config.get("modules_to_save"))),
        base=config.get("base_model_name_or_path") or None,
    )


def _words(said: Any, name: str, where: str) -> str | tuple[str, ...]:
    """Names, or one expression. ValueError for an expression that is none."""
    if isinstance(said, str):
        try:
            re.compile(said)
        except re.error as error:
            raise ValueError(f"{where}: {name} is {said!r}, expected a regular expression ({error})") from error
        return said
    return tuple(_listed(said))


def _table(said: Any, name: str, where: str) -> dict[str, Any]:
    """Pattern -> number."""
    table = said or {}
    if not isinstance(table, Mapping) or not all(isinstance(n, int | float) and n > 0 for n in table.values()):
        raise ValueError(f"{where}: {name} is {said!r}, expected an object of positive numbers; correct it")
    return dict(table)


def _listed(said: Any) -> list[str]:
    """A name or names as a list."""
    return [said] if isinstance(said, str) else list(said or ())


def _named(words: str | tuple[str, ...], module: str) -> bool:
    """Whether a name is meant by words: the whole of it, or its last parts."""
    if isinstance(words, str):
        return bool(words) and re.fullmatch(words, module) is not None
    return any(module == word or module.endswith(f".{word}") for word in words)


def _by_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a name."""
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _layer(patterns: tuple[str, ...], module: str) -> int | None:
    """The number of the layer that a module is in."""
    tries = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((match for pattern in tries if (match := re.match(pattern, module))), None)
    return None if found is None else int(found["idx"])

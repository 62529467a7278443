"""Who am I among ranks: launch, tensor- and data-parallel groups, device, dtype, and rank-zero logging.

Must not know models, tokens or files of weights; it never touches seeds, print or the root logger.
What needs torch is imported when first asked for, so that a leader starts its followers before it imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accessory.dist.crew import abandon, launch, lost_rank

if TYPE_CHECKING:
    from accessory.dist.ranks import (
        Cut,
        Ranks,
        Shard,
        close,
        cpu_has_bf16,
        default_dtype,
        dtype_from_name,
        init,
        pick_device,
        setup_logging,
    )

__all__ = [
    "Cut",
    "Ranks",
    "Shard",
    "abandon",
    "close",
    "cpu_has_bf16",
    "default_dtype",
    "dtype_from_name",
    "init",
    "launch",
    "lost_rank",
    "pick_device",
    "setup_logging",
]


def __getattr__(name: str) -> Any:
    """Import `ranks`, and torch with it, for one of its names."""
    if name not in __all__:
        raise AttributeError(f"module 'accessory.dist' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module("accessory.dist.ranks"), name)

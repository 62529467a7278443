"""What a checkpoint notes of its run, by which a run that goes on from it is compared (`resume.RULES`).

Must not compare.
"""

from __future__ import annotations

from typing import Any

from accessory.train.feeding import Data
from accessory.train.schedule import warmup_steps
from accessory.train.settings import Settings
from accessory.train.start import Start


def facts_of(settings: Settings, start: Start, data: Data, *, base: bool, total: int, dp: int) -> dict[str, Any]:
    """Plain values. base: whether the trained tensors lie on others; total: steps of the run; dp: ranks that split."""
    return {
        "data": data.fingerprint,
        "base": start.sources if base or settings.quantization_bit else [],
        "quantization_bit": settings.quantization_bit,
        "precision": str(start.dtype).removeprefix("torch."),
        "lora": {"alpha": settings.lora_alpha, "rslora": settings.use_rslora, "dropout": settings.lora_dropout},
        "seed": settings.seed,
        "optimizer": settings.optim,
        "global_batch": settings.per_device_train_batch_size * settings.gradient_accumulation_steps * dp,
        "total_steps": total,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": warmup_steps(total, settings),
        "betas": [settings.adam_beta1, settings.adam_beta2],
        "epsilon": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
    }

"""Small models in training, made from folders as a run would, for the tests of train/.

Must not know what a test asks of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from accessory.assemble import Bundle, build, load, read_spec
from accessory.checkpoint import open_folders
from accessory.data.tokenizer import open_tokenizer
from accessory.dist import Ranks
from accessory.peft import init_peft
from accessory.train.parts import choose_parts, peft_config
from accessory.train.settings import Settings
from accessory.train.trainee import Trainee


def train_on(
    folder: Path, ranks: Ranks, settings: Settings, *, dtype: torch.dtype = torch.float32, pictures: bool = False
) -> tuple[Trainee, Bundle]:
    """The trainee of a folder's model, as the settings say, and the bundle around its model."""
    checkpoint = open_folders([folder])
    keys = {key for source in checkpoint.sources for key in source.stored}
    tokenizer = open_tokenizer(checkpoint.tokenizer)
    added: dict[str, Any] = peft_config(settings)
    kind = checkpoint.meta["llama_type"]
    if added and not kind.endswith(("_peft", "_adapter")):
        kind += "_peft"
    spec = read_spec({**checkpoint.config, **added}, llama_type=kind, keys=keys, vocab_size=tokenizer.size)
    model = build(spec, shard=ranks.shard, dtype=dtype)
    parts = choose_parts(model, settings, pictures=pictures)
    absent = {name for name, _ in model.named_parameters()} - keys
    quant = settings.quantization_bit == 4
    load(model, checkpoint, device="cpu", dtype=dtype, quant=quant, optional=absent, wide=parts.names)
    for name in absent:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)._parameters
        holder[leaf] = nn.Parameter(torch.empty(holder[leaf].shape))
    init_peft(model, names=absent)
    trainee = Trainee(
        model,
        parts,
        ranks,
        dtype=dtype,
        zero=settings.zero,
        offload=settings.cpu_offload,
        checkpointing=settings.activation_checkpointing,
    )
    return trainee, Bundle(model, tokenizer, spec.llama, spec.vision, "alpaca", kind, "here", dtype)

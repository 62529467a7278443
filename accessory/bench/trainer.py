"""One side of `accessory bench train` as a program of its own: it builds a model, and runs steps when it is told to.

Must not time or compare anything but its own steps; memory is this process's alone, hence the process.
`main([SIDE, json])` reads numbers of steps from stdin and answers each with a JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accessory.bench.ceilings import wait
from accessory.bench.shapes import SHAPES
from accessory.bench.sides import fill, hf_config
from accessory.dist import Ranks, Shard, dtype_from_name, pick_device
from accessory.model import Llama, LlamaConfig

IGNORED = -100
TARGETS = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


@dataclass(frozen=True)
class Task:
    """What both sides train: sizes, method, and the rows of every step."""

    shape: str = "110m"
    method: str = "full"
    """full, or lora of rank 8 on all linears."""
    rows: str = "full"
    """full: every row has `length` tokens; padded, packed: rows of an instruction set's lengths."""
    batch: int = 4
    length: int = 512
    dtype: str = "bf16"
    device: str = "cpu"
    lr: float = 3e-4
    seed: int = 0

    def steps(self) -> Iterator[list[list[int]]]:
        """For ever: the documents of one step, as token ids that a model can learn something from."""
        config, generator = SHAPES[self.shape], torch.Generator().manual_seed(self.seed + 1)
        while True:
            if self.rows == "full":
                lengths = [self.length] * self.batch
            elif self.rows == "padded":
                lengths = lengths_like_alpaca(self.batch, self.length, generator)
            else:
                lengths = fill_rows(self.batch, self.length, generator)
            yield [ramble(length, config.vocab_size, generator) for length in lengths]


def lengths_like_alpaca(count: int, longest: int, generator: torch.Generator) -> list[int]:
    """Lengths of instruction rows: log-normal around 90 tokens, half of them between 60 and 135, cut at `longest`."""
    draws = torch.empty(count).log_normal_(mean=4.5, std=0.6, generator=generator)
    return [min(longest, max(16, int(draw))) for draw in draws]


def fill_rows(rows: int, length: int, generator: torch.Generator) -> list[int]:
    """Lengths of instruction rows that fill `rows` sequences of `length` about full; packing itself is not timed."""
    out: list[int] = []
    for _ in range(rows):
        room = length
        while room >= 16:
            size = min(room, lengths_like_alpaca(1, length, generator)[0])
            out.append(size)
            room -= size
    return out


def ramble(length: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    """A text without sense but with a law: each token follows from the one before, with a little noise."""
    token, out = int(torch.randint(vocabulary, (), generator=generator)), []
    jumps = (torch.rand(length, generator=generator) < 0.2).tolist()
    for jump in jumps:
        out.append(token)
        token = int(torch.randint(vocabulary, (), generator=generator)) if jump else (token * 31 + 7) % 997
    return out


class Ours:
    """What `accessory train` runs in a step, without its folder and its logs."""

    def __init__(self, task: Task) -> None:
        from accessory.peft import PeftConfig, apply_peft, init_peft
        from accessory.train.optim import make_optimizer
        from accessory.train.parts import choose_parts, peft_config
        from accessory.train.settings import Settings
        from accessory.train.trainee import Trainee

        device, dtype = pick_device(task.device), dtype_from_name(task.dtype)
        settings = Settings(finetuning_type=task.method, lora_rank=8, lora_alpha=16, learning_rate=task.lr)
        model = Llama(SHAPES[task.shape], device=device)
        fill(model, seed=task.seed)
        apply_peft(model, PeftConfig(**peft_config(settings)), device=device)
        init_peft(model, seed=task.seed)
        parts = choose_parts(model, settings, pictures=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parts.names)
            if name not in parts.names:
                parameter.data = parameter.data.to(dtype)
        ranks = Ranks(0, 1, 0, Shard(), 0, 1, device)
        self.trainee = Trainee(
            model, parts, ranks, dtype=dtype, zero=2, offload=False, checkpointing="none", compile=False
        )
        self.optimizer = make_optimizer(self.trainee, settings)
        self.task, self.device = task, device

    def step(self, documents: list[list[int]]) -> Tensor:
        """One update; the loss per target."""
        rows = pack(documents, self.task.length) if self.task.rows == "packed" else [[d] for d in documents]
        batch = {name: tensor.to(self.device) for name, tensor in to_batch(rows).items()}
        if self.task.rows != "packed":
            del batch["segments"]
        targets = int((batch["labels"] != IGNORED).sum())
        loss = self.trainee.forward_backward(batch, scale=1.0 / targets, last=True)
        self.trainee.clip(1.0)
        self.optimizer.step()
        self.trainee.updated()
        return loss / targets


class Transformers:
    """transformers' LlamaForCausalLM (and peft's LoRA) under autocast, with torch's fused AdamW."""

    def __init__(self, task: Task) -> None:
        import transformers

        self.device, self.dtype = pick_device(task.device), dtype_from_name(task.dtype)
        config = SHAPES[task.shape]
        ours = Llama(config, device="cpu")
        fill(ours, seed=task.seed)
        model = transformers.LlamaForCausalLM(hf_config(config))
        model.load_state_dict(hf_weights(ours, config))
        del ours
        if task.method == "lora":
            import peft

            lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS.values()), task_type="CAUSAL_LM")
            model = peft.get_peft_model(model.to(self.dtype), lora)
        self.model = model.to(self.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=task.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.trained = trained

    def step(self, documents: list[list[int]]) -> Tensor:
        """One update; the loss per target."""
        longest = max(map(len, documents))
        ids = torch.tensor([d + [0] * (longest - len(d)) for d in documents], device=self.device)
        mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents], device=self.device)
        labels = ids.masked_fill(mask == 0, IGNORED)
        padded = None if bool(mask.all()) else mask
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(ids, attention_mask=padded, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


SIDES: dict[str, Callable[[Task], Any]] = {"ours": Ours, "transformers": Transformers}


def pack(documents: list[list[int]], length: int) -> list[list[list[int]]]:
    """Documents into rows of at most `length` tokens, in their order."""
    rows: list[list[list[int]]] = [[]]
    for document in documents:
        if sum(map(len, rows[-1])) + len(document) > length:
            rows.append([])
        rows[-1].append(document)
    return rows


def to_batch(rows: list[list[list[int]]]) -> dict[str, Tensor]:
    """Rows of documents as the model's input, [B, T] each."""
    longest = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), longest)
    out = {name: torch.zeros(shape, dtype=torch.int64) for name in ("ids", "positions")}
    out["labels"], out["segments"] = torch.full(shape, IGNORED), torch.full(shape, -1)
    for at, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, start=1):
            place = slice(start, start + len(document))
            out["ids"][at, place] = torch.tensor(document)
            out["positions"][at, place] = torch.arange(len(document))
            out["segments"][at, place] = number
            out["labels"][at, start : start + len(document) - 1] = torch.tensor(document[1:])
            start += len(document)
    return out


def hf_weights(model: Llama, config: LlamaConfig) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names; rows of wq and wk go from pairs to halves."""
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    inner = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    out = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in names:
            out[f"{names[module]}.weight"] = tensor
            continue
        _, layer, *_, last = module.split(".")
        if last in ("wq", "wk"):
            tensor = tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        room = "self_attn" if last in ("wq", "wk", "wv", "wo") else "mlp"
        out[f"model.layers.{layer}.{inner.get(last) or f'{room}.{TARGETS[last]}'}.weight"] = tensor
    return out


def main(argv: list[str]) -> None:
    """Obey lines of stdin: "N" runs N steps and prints tokens, seconds, losses and the peak memory so far."""
    side, task = argv[0], Task(**json.loads(argv[1]))
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the answer is ours alone
    device = pick_device(task.device)
    trainer, steps = SIDES[side](task), task.steps()
    for line in sys.stdin:
        losses, tokens, start = [], 0, 0.0
        batches = [next(steps) for _ in range(int(line))]
        wait(device)
        start = time.perf_counter()
        for documents in batches:
            losses.append(trainer.step(documents))
            tokens += sum(map(len, documents))
        wait(device)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        record = {"tokens": tokens, "seconds": seconds, "losses": [float(loss) for loss in losses], "peak": peak}
        out.write(json.dumps(record) + "\n")
        out.flush()

"""The settings of `accessory train`: one flat YAML, under LLaMA-Factory's names wherever the idea is the same.

Must not import torch: the launcher and `--help` read them before any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["frozen", "lora", "full"]
ProjectorMode = Literal["frozen", "lora", "full", "projection"]


@dataclass
class Settings:
    """Train a model: pretraining, finetuning of all or few parameters, captions, visual instructions."""

    # ---- whose words
    dialect: Literal["accessory", "llamafactory", "swift"] | None = None
    """Whose words and defaults the settings are given in; none: told by the words. Noted settings are our own."""

    # ---- the model
    model_name_or_path: list[str] = field(default_factory=list)
    """Folder or hub id of the model, then folders of deltas or trained parts, in order. Without it: the tiny model."""
    adapter_name_or_path: list[str] = field(default_factory=list)
    """Folders of adapters or trained parts on top of the model, in order, whose training goes on."""
    model_type: str | None = None
    """A name such as llava1d6-mistral-7b-instruct, which chooses hub id and template where these are not given."""
    llama_type: str | None = None
    """llama, llama_peft, llama_adapter, llama_qformerv2, llava, ...; without it what the folder says."""
    llama_config: list[str] = field(default_factory=list)
    """JSON files of model sizes (params.json and additions), later ones override."""
    tokenizer_path: str | None = None
    """Tokenizer file, or the folder that holds it; without it the model folder's."""
    train_from_scratch: bool = False
    """Begin with random weights of the sizes in llama_config; parts that model_name_or_path holds are still read."""
    max_seq_len: int | None = None
    """The window written into the model's config; without it the model's own, or cutoff_len when from scratch."""
    quantization_bit: Literal[4] | None = None
    """4: the frozen weights of the layers are stored as NF4, and only what PEFT adds is trained."""
    precision: Literal["bf16", "fp32", "fp16"] | None = None
    """Of computation; masters of trained parameters are fp32. Without it: bf16 on GPUs and CPUs that have it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    # ---- what is trained
    finetuning_type: Literal["full", "lora", "norm_bias", "norm_bias_lora", "bias", "adapter", "freeze", "frozen"] = (
        "full"
    )
    """Of the language model: full; lora; norm_bias and bias (llama_peft's), norm_bias_lora; adapter (zero-init
    prompts); freeze (only the last freeze_trainable_layers train); frozen."""
    lora_rank: int = 8
    """Rank of LoRA."""
    lora_alpha: float | None = None
    """LoRA is scaled by alpha / rank; none: by 1, the reference's form."""
    lora_dropout: float = 0.0
    """Dropout on LoRA's input while training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    lora_target: list[str] = field(default_factory=lambda: ["all"])
    """Linears that get LoRA: all, or some of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj (wq wk wv wo w1 w3
    w2), or regular expressions. These never leave the language model; projector:all and vision:all reach further."""
    freeze_trainable_layers: int = 2
    """finetuning_type freeze: this many layers train; a positive number counts from the end, a negative one from the
    start."""
    prefix_layers: int | None = None
    """finetuning_type adapter: the last so many layers get prompts; none: all of them."""
    prefix_len: int = 10
    """Rows of an adapter's prompt."""
    use_prefix_new_gate: bool = False
    """An adapter's second gate."""
    train_projector: ProjectorMode | None = None
    """What lies between the vision tower and the language model (Q-Former, projection): frozen, lora, full, or only the
    projection; none: where the data has pictures full, or with norm_bias, bias and norm_bias_lora its biases and norm
    as in the reference, and frozen elsewhere."""
    train_vision: Mode = "frozen"
    """The vision tower: frozen, lora or full."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; none: learning_rate."""
    vision_lr: float | None = None
    """Peak learning rate of the vision tower; none: learning_rate."""

    # ---- data
    stage: Literal["pt", "sft"] = "sft"
    """pt: plain text, every token is learned; sft: conversations, the answers are learned."""
    dataset: list[str] = field(default_factory=list)
    """Names of dataset_info.json, data files or folders (json, jsonl, csv, parquet, txt, packed), or YAML files with a
    META list of them; NAME#N takes N rows. identity and alpaca_en_demo ship with this package."""
    eval_dataset: list[str] = field(default_factory=list)
    """The same, for validation."""
    dataset_dir: str | None = None
    """Folder of dataset_info.json, which names data; none: data."""
    dataset_seed: int | None = None
    """Of the rows kept for validation, and of those that name#N draws; none: seed."""
    val_size: float = 0.0
    """Rows kept for validation: a number of rows, or below 1 a share; excludes eval_dataset."""
    media_dir: str | None = None
    """Pictures are relative to this folder; none: to that of dataset_info.json for names in it, to the root that META
    names, else to the data file's."""
    allow_private_urls: bool = False
    """Pictures may come from URLs of hosts that are not public, such as a server on this host."""
    template: str = ""
    """How conversations are written; without it what the model's folder says, else alpaca. A META entry's prompt_type
    overrides it for its rows."""
    default_system: str | None = None
    """System text of conversations that bring none, captions apart; none: the template's."""
    cutoff_len: int = 2048
    """Most positions of a row; where it is not given, no more than the model's window."""
    packing: bool = True
    """Several rows share one sequence of cutoff_len, none of them seeing another."""
    share_pictures: bool = False
    """packing: rows about the same picture whose beginnings are equal share that picture in one sequence, behind which
    each is a segment of its own. The loss is that of the rows alone, and the vision part runs once per sequence, not
    once per row. For data with several questions on each picture; a random crop is then drawn once for all of them."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a row of more than cutoff_len positions; counted. Pictures and the stop token always stay."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read or makes no sense; skipped ones are counted and named."""
    max_samples: int | None = None
    """Use only the first so many rows of each source."""
    streaming: bool = False
    """Read rows as they are needed, without a first pass over the data; needs max_steps."""
    buffer_size: int = 16384
    """streaming: rows among which the next one is drawn."""
    disable_shuffling: bool = False
    """Take rows in their order."""
    preprocessing_num_workers: int | None = None
    """Processes that tokenise before training; none: the cores of this host, at most 8."""
    dataloader_num_workers: int = 2
    """Processes that load pictures and make batches while training; 0: none."""
    cache_dir: str | None = None
    """Where tokenised data is kept until no run opened it for 90 days; none: below $XDG_CACHE_HOME or ~/.cache."""
    image_transform: str | None = None
    """random_resized_crop, resized_center_crop or padded_resize; none: the model's own."""
    orientation: Literal["keep", "apply"] = "keep"
    """Photographs as they are stored, or turned as their EXIF says."""
    anyres_compat: Literal["llava", "hf"] | None = None
    """Whose tiling and merging of large pictures is followed; none: that of the folder's family."""

    # ---- steps
    output_dir: str = "output/train"
    """Folder for checkpoints, logs and the final model."""
    add_output_dir_suffix: bool = True
    """output_layout swift: each run has a folder of its own below output_dir, and resume auto goes on in the newest one
    that has checkpoints."""
    output_layout: Literal["accessory", "llamafactory", "swift"] = "accessory"
    """Whose names the files of a run have; the two others' checkpoints also hold an adapter or all weights, as their
    tools open them."""
    per_device_train_batch_size: int = 4
    """Rows (packed ones count as one) of a micro-batch on each data-parallel rank."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of each rank per step; the loss is weighted by tokens over all of them."""
    global_batch_size: int | None = None
    """Rows of a step over all ranks, at least; overrides gradient_accumulation_steps."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Steps; above 0 it overrides num_train_epochs."""
    optim: Literal["adamw", "adamw_8bit", "sgd", "muon"] = "adamw"
    """adamw_8bit keeps its state in 8 bits (bitsandbytes); muon: hidden matrices by Muon, the rest by AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.95
    """AdamW's second beta."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The learning rate after warm-up; wsd stays at the peak and falls over the last decay_ratio of the steps."""
    min_lr_ratio: float = 0.0
    """The schedule ends at this share of the peak."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises."""
    warmup_steps: int = 0
    """The same in steps; above 0 it overrides warmup_ratio."""
    decay_ratio: float = 0.1
    """wsd: share of the steps in which the learning rate falls."""
    seed: int = 42
    """Of first weights, order of rows, crops and dropout."""

    # ---- ranks and memory
    tensor_parallel_size: int = 1
    """Ranks that share each layer; the others are data-parallel."""
    zero: Literal[2, 3] = 2
    """Data-parallel ranks share optimiser state, masters and gradients; 3: weights too, gathered layer by layer."""
    cpu_offload: bool = False
    """Masters, gradients and optimiser state live in the host's memory."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: only the input of each layer is kept for the backward pass; selective: products of matrices are kept."""
    torch_compile: bool = False
    """Compile each layer."""
    nproc_per_node: int | None = None
    """Start this many ranks on this host, as torchrun would; none: one per visible GPU."""
    ddp_timeout: float = 1800.0
    """Seconds that a collective may take before the job fails."""

    # ---- watching
    logging_steps: int = 1
    """Steps between two lines of trainer_log.jsonl."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """tensorboard or none."""
    compute_accuracy: bool = False
    """Count the learned tokens that the model itself would have said, in training and validation; costs nothing."""
    plot_loss: bool = True
    """Draw training_loss.png, again and again while training."""
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """When there is validation data: never, every eval_steps, or once per epoch; at the end too. None: steps where
    eval_steps is given, else epoch."""
    eval_steps: int | None = None
    """Steps between two validations."""
    per_device_eval_batch_size: int | None = None
    """Rows of a validation batch; none: as in training."""
    eval_answers: int = 8
    """Validation also answers this many questions and counts exact matches; 0: none."""
    eval_max_new_tokens: int = 64
    """Most tokens of such an answer."""

    # ---- checkpoints
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """Checkpoints every save_steps, at the end of every epoch, or none by steps; those of save_minutes and the final
    model are written anyway."""
    save_steps: int = 500
    """Steps between two checkpoints; 0: none by steps."""
    save_minutes: float = 0.0
    """Minutes between two checkpoints; 0: none by time."""
    save_total_limit: int | None = 2
    """Keep this many checkpoints, and the best one beside them; none: all."""
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint in output_dir; never; or the path of a checkpoint."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that holds a run, whose files are moved aside; a requeued job resumes nevertheless."""
    only_save_trainable: bool = False
    """The final folder holds only what was trained; it opens behind its base."""
    save_adapter: bool | None = None
    """The final folder, and each checkpoint beside its state, hold what was trained as a PEFT adapter; none: with
    finetuning_type lora on a Hugging Face folder."""
    save_dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """Of the final weights; none: the precision of training, fp32 for an adapter."""
    save_format: Literal["hf", "accessory", "safetensors", "pth"] | None = None
    """Of the final weights: hf, a Hugging Face folder (of LoRA an adapter); accessory or safetensors, Accessory's own;
    pth, the reference's layout. None: hf where the model came so and all of it is saved, else accessory."""
    save_shards: int | None = None
    """Files of the final weights in Accessory's form; none: tensor_parallel_size."""

    # ---- looking before running
    dry_run: bool = False
    """Print parts, memory per rank, steps and the first batch's shape, and stop."""
    shape: Literal["7b", "13b", "70b"] | None = None
    """dry_run: a LLaMA 2 of this size, without files."""
    world_size: int | None = None
    """dry_run: plan for this many ranks; none: those that run."""

    def settle(self, dp: int) -> None:
        """Micro-batches per step for `dp` data-parallel ranks, once their number is known."""
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = -(-self.global_batch_size // (self.per_device_train_batch_size * dp))

    def check(self) -> None:
        """ValueError for values that contradict each other or make no sense."""
        _positive(self, "cutoff_len", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
        _positive(self, "tensor_parallel_size", "buffer_size", "lora_rank", "prefix_len", "eval_max_new_tokens")
        _within(self, 0.0, 1.0, "warmup_ratio", "decay_ratio", "min_lr_ratio")
        if self.per_device_eval_batch_size is not None:
            _positive(self, "per_device_eval_batch_size")
        amounts = ("weight_decay", "max_grad_norm", "save_minutes", "val_size", "learning_rate", "save_steps")
        for name in (*amounts, "warmup_steps", "dataloader_num_workers", "eval_answers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if self.eval_steps is not None:
            _positive(self, "eval_steps")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        if self.global_batch_size is not None:
            _positive(self, "global_batch_size")
        for name in ("eval_strategy", "save_strategy"):
            steps = getattr(self, f"{name[:4]}_steps")
            if getattr(self, name) == "steps" and steps is None:
                raise ValueError(f"{name[:4]}_steps: missing beside {name} steps, expected a number of steps; give one")
        if self.use_rslora and self.lora_alpha is None:
            raise ValueError("lora_alpha: missing beside use_rslora, which scales by alpha / sqrt(rank); give one")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: got {self.num_train_epochs}, expected more than 0, or max_steps")
        if self.streaming and self.max_steps <= 0:
            raise ValueError("max_steps: missing, expected the number of steps, which streaming cannot know")
        if self.share_pictures and (self.streaming or not self.packing):
            raise ValueError("share_pictures: got true, expected packing true and streaming false; set them so")
        if self.val_size and self.eval_dataset:
            raise ValueError(f"val_size: got {self.val_size} with an eval_dataset, expected one of them; drop one")
        if self.streaming and self.val_size:
            raise ValueError("val_size: got rows to split off a stream, expected an eval_dataset; give one")
        if self.quantization_bit and self.finetuning_type in ("full", "freeze"):
            raise ValueError(
                f"finetuning_type: got {self.finetuning_type} with quantization_bit 4, expected a method that adds"
                " parameters (lora, norm_bias, norm_bias_lora, bias, adapter), since 4-bit weights are not trained"
            )
        if self.save_adapter and self.finetuning_type not in ("lora", "norm_bias_lora"):
            raise ValueError(
                f"save_adapter: got true with finetuning_type {self.finetuning_type}, expected lora or norm_bias_lora,"
                " which train what an adapter holds; set it false"
            )
        if self.quantization_bit and not (self.only_save_trainable or self.save_adapter):
            raise ValueError(
                "only_save_trainable: got false with quantization_bit 4, expected true, since 4-bit weights are not"
                " written; the final folder then opens behind its base"
            )
        if self.shape is not None and not self.dry_run:
            raise ValueError(f"shape: got {self.shape} without dry_run, expected both; a real run reads its model")
        unknown = set(self.report_to) - {"tensorboard", "none"}
        if unknown:
            raise ValueError(f"report_to: got {', '.join(sorted(unknown))}, expected tensorboard or none")


def _positive(settings: Settings, *names: str) -> None:
    """ValueError where a number is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected at least 1")


def _within(settings: Settings, low: float, high: float, *names: str) -> None:
    """ValueError where a number is out of bounds."""
    for name in names:
        if not low <= getattr(settings, name) <= high:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected {low} to {high}")

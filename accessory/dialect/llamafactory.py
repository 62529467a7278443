"""LLaMA-Factory's words and what they do where nobody says otherwise, made ours.

Must not know settings beyond their names. Versions 0.8 to 0.9; where these differ, the newer one counts.
"""

from __future__ import annotations

from typing import Any

import yaml

from accessory.dialect.deepspeed import read_zero
from accessory.dialect.rules import Sheet, Word, act, choose, each, idle, is_true, number, only, to, written

DTYPES = {
    "auto": None,
    "float32": "fp32",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
}


def template(sheet: Sheet, word: str, value: Any) -> None:
    """A template by its name in this tool; one with its dialect, or the text of a chat template, as it is."""
    name = str(value).strip()
    plain = name and "/" not in name and "{" not in name
    sheet.put("template", f"{sheet.dialect}/{name}" if plain else name, word)


OTHERS = ("huggingface", "hf", "auto", "pt", "sglang", "ktransformers", "lmdeploy")


def backend(sheet: Sheet, word: str, value: Any) -> None:
    """vLLM answers where it is asked for; for the others our own engine does."""
    vllm = written(value) == "vllm"
    if not vllm and written(value) not in OTHERS:
        raise ValueError(f"{word}: got {value}, expected vllm or one of {', '.join(OTHERS)}; leave it out")
    if not vllm:
        sheet.note(f"{word}: {value} is answered for by Accessory's own engine")
    sheet.put(word, "vllm" if vllm else "huggingface", word)


def engine_arguments(value: Any) -> Any:
    """Arguments of vLLM's engine, perhaps as JSON."""
    return yaml.safe_load(value) if isinstance(value, str) else value


def _half(sheet: Sheet, word: str, value: Any) -> None:
    """bf16, fp16, pure_bf16: the precision of computation."""
    if is_true(value, word):
        sheet.put("precision", word.removeprefix("pure_"), word)
        if word == "pure_bf16":
            sheet.note("pure_bf16: computed in bf16; masters of what is trained are fp32 here")


def deepspeed(sheet: Sheet, word: str, value: Any) -> None:
    """A DeepSpeed configuration."""
    if "zero" not in sheet.known:
        sheet.note(f"{word}: nothing to do, several ranks share each layer here (tensor_parallel_size)")
        return
    zero = read_zero(value)
    sheet.put("zero", zero.stage, word)
    sheet.put("cpu_offload", zero.offload, word)
    sheet.note(zero.note)


def _checkpointing(sheet: Sheet, word: str, value: Any) -> None:
    """Gradient checkpointing, said either way round."""
    on = is_true(value, word) != word.startswith("disable")
    sheet.put("activation_checkpointing", "full" if on else "none", word)


def _eval(sheet: Sheet, word: str, value: Any) -> None:
    """eval_strategy, once evaluation_strategy."""
    sheet.put("eval_strategy", "no" if value is False else value, word)


def _schedule(sheet: Sheet, word: str, value: Any) -> None:
    """lr_scheduler_kwargs: only the share of the peak at which a cosine ends."""
    if not isinstance(value, dict) or set(value) - {"min_lr_rate"}:
        raise ValueError(f"{word}: got {value}, expected no key but min_lr_rate; see min_lr_ratio and decay_ratio")
    if "min_lr_rate" in value:
        sheet.put("min_lr_ratio", number(value["min_lr_rate"], word), word)


def _resume(sheet: Sheet, word: str, value: Any) -> None:
    """The path of a checkpoint, or true for the newest one."""
    plain = str(value).lower() in ("true", "false")
    sheet.put("resume", "auto" if plain else value, word)


def _fixed(part: str) -> Word:
    """freeze_vision_tower and freeze_multi_modal_projector: a part that is not frozen is trained as the rest is."""

    def do(sheet: Sheet, word: str, value: Any) -> None:
        lora = str(sheet.words.get("finetuning_type") or "lora") == "lora"
        sheet.put(part, "frozen" if is_true(value, word) else "lora" if lora else "full", word)

    return act(do)


def _freeze_language(sheet: Sheet, word: str, value: Any) -> None:
    """freeze_language_model."""
    if is_true(value, word):
        sheet.put("finetuning_type", "frozen", word)


def _layers(sheet: Sheet, word: str, value: Any) -> None:
    """freeze_trainable_modules: only all of a layer."""
    if each(value) != ["all"]:
        raise ValueError(f"{word}: got {value}, expected all; leave it out")


SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "wsd": "wsd",
}
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
    "sgd": "sgd",
    "muon": "muon",
}
PICTURES = "pictures are given to the tower in the size that its folder asks for"
VOCABULARY = "the vocabulary stays as it is"

MODEL: dict[str, Word] = {
    "template": act(template),
    "infer_backend": act(backend),
    "quantization_method": only("bnb", "bitsandbytes", remedy="4 bits are stored as NF4 here; leave it out"),
    "quantization_type": only("nf4", remedy="4 bits are stored as NF4 here; leave it out"),
    "double_quantization": only(True, remedy="scales are always quantised too; leave it out"),
    "visual_inputs": idle("the model's folder says whether it sees"),
    "vllm_enforce_eager": to("vllm_enforce_eager"),
    "vllm_maxlen": to("max_seq_len"),
    "vllm_gpu_util": to("vllm_gpu_util"),
    "vllm_max_lora_rank": idle("vLLM gets a model that adapters are merged into"),
    "vllm_config": to("vllm_config", engine_arguments),
    "flash_attn": idle("attention is computed as the hardware does it best"),
    "use_unsloth": idle("there is one engine for training"),
    "use_unsloth_gc": idle("there is one engine for training"),
    "enable_liger_kernel": idle("the loss is computed in chunks anyway"),
    "use_fast_tokenizer": idle("a folder's tokenizer is read as it is"),
    "trust_remote_code": idle("code in a model's folder is never run"),
    "low_cpu_mem_usage": idle("a rank reads only what it holds"),
    "offload_folder": idle("nothing is offloaded to a disk"),
    "hf_hub_token": idle("the hub's own HF_TOKEN is read"),
    "cache_dir": idle("the hub's own HF_HOME says where models are kept"),
    "model_revision": only("main", "master", remedy="give the folder of that revision in model_name_or_path"),
    "use_kv_cache": only(True),
    "resize_vocab": only(False, remedy=VOCABULARY),
    "split_special_tokens": only(False),
    "add_tokens": only(None, remedy=VOCABULARY),
    "add_special_tokens": only(None, remedy=VOCABULARY),
    "new_special_tokens": only(None, remedy=VOCABULARY),
    "rope_scaling": only(None, "none", remedy="write it into a JSON file for llama_config"),
    "shift_attn": only(False),
    "mixture_of_depths": only(None, False),
    "upcast_layernorm": idle("what is trained has fp32 masters"),
    "upcast_lmhead_output": idle("the loss is computed in fp32"),
    "print_param_status": idle("what is trained is always printed, part by part"),
    "image_max_pixels": idle(PICTURES),
    "image_min_pixels": idle(PICTURES),
    "image_resolution": idle(PICTURES),
    "video_max_pixels": idle("there are no videos"),
}

DATA: dict[str, Word] = {
    "overwrite_cache": idle("tokenised data is found again by its content"),
    "preprocessing_batch_size": idle("rows are tokenised one by one"),
    "mix_strategy": only("concat", remedy="use name#N for shares of datasets"),
    "interleave_probs": only(None, remedy="use name#N for shares of datasets"),
    "train_on_prompt": only(False),
    "mask_history": only(False),
    "ignore_pad_token_for_loss": only(True),
    "eval_on_each_dataset": only(False),
    "tokenized_path": only(None, remedy="tokenised data is kept and found again by itself; leave it out"),
    "tool_format": only(None),
    "neat_packing": act(lambda sheet, word, on: sheet.put("packing", True, word) if is_true(on, word) else None),
    "data_seed": only(42, remedy="seed decides the order too"),
}

METHOD: dict[str, Word] = {
    "do_train": only(True, remedy="a run that only evaluates is accessory predict"),
    "do_eval": idle("validation follows eval_strategy"),
    "do_predict": only(False, remedy="use accessory predict"),
    "predict_with_generate": act(lambda sheet, word, on: sheet.default(eval_answers=8 if is_true(on, word) else 0)),
    "use_dora": only(False),
    "loraplus_lr_ratio": only(None),
    "loraplus_lr_embedding": idle("there is no LoRA+"),
    "pissa_init": only(False),
    "create_new_adapter": only(False),
    "additional_target": only(None),
    "freeze_trainable_modules": act(_layers),
    "freeze_extra_modules": only(None),
    "freeze_vision_tower": _fixed("train_vision"),
    "freeze_multi_modal_projector": _fixed("train_projector"),
    "freeze_language_model": act(_freeze_language),
    "train_mm_proj_only": only(False, remedy="set finetuning_type frozen and train_projector full"),
    "pure_bf16": act(_half),
    "bf16": act(_half),
    "fp16": act(_half),
    "tf32": idle("matrices in fp32 are multiplied in fp32"),
    "use_galore": only(False),
    "use_badam": only(False),
    "use_apollo": only(False),
    "use_muon": act(lambda sheet, word, on: sheet.put("optim", "muon", word) if is_true(on, word) else None),
    "disable_gradient_checkpointing": act(_checkpointing),
    "gradient_checkpointing": act(_checkpointing),
    "use_reentrant_gc": idle("one form of gradient checkpointing is there"),
    "gradient_checkpointing_kwargs": idle("one form of gradient checkpointing is there"),
    "early_stopping_steps": only(None),
    "neftune_noise_alpha": only(None),
    "label_smoothing_factor": only(0, 0.0),
    "deepspeed": act(deepspeed),
    "fsdp": idle("data-parallel ranks always run FSDP2; zero chooses what they share"),
    "fsdp_config": idle("data-parallel ranks always run FSDP2; zero chooses what they share"),
    "ddp_find_unused_parameters": idle("what is unused is found"),
    "ddp_bucket_cap_mb": idle("FSDP2 chooses its own"),
    "local_rank": idle("the launcher says it"),
    "include_num_input_tokens_seen": idle("the log counts tokens"),
    "include_tokens_per_second": idle("the log counts tokens"),
    "include_effective_tokens_per_second": idle("the log counts tokens"),
}

TRAINER: dict[str, Word] = {
    "eval_strategy": act(_eval),
    "evaluation_strategy": act(_eval),
    "lr_scheduler_type": choose("lr_scheduler_type", SCHEDULES, remedy="choose one"),
    "lr_scheduler_kwargs": act(_schedule),
    "optim": choose("optim", OPTIMIZERS, remedy="choose one"),
    "report_to": to("report_to", each),
    "resume_from_checkpoint": act(_resume),
    "save_only_model": idle("checkpoints hold the optimizer too, so that a run goes on exactly"),
    "save_safetensors": only(True, remedy="set save_format pth for the reference's layout"),
    "save_on_each_node": only(False),
    "load_best_model_at_end": only(False, remedy="the best checkpoint is kept beside the last ones; export that"),
    "metric_for_best_model": only("loss", "eval_loss"),
    "greater_is_better": only(False),
    "logging_dir": idle("curves lie in output_dir"),
    "logging_first_step": idle("logging_steps decides"),
    "logging_strategy": only("steps"),
    "logging_nan_inf_filter": idle("a loss that is no number is named"),
    "run_name": idle("a run is known by its folder"),
    "disable_tqdm": idle("progress is one line per logging_steps"),
    "log_level": idle("what is worth saying is said"),
    "dataloader_pin_memory": idle("memory is pinned where there is a GPU"),
    "dataloader_drop_last": only(False),
    "dataloader_persistent_workers": idle("workers live as long as the run"),
    "dataloader_prefetch_factor": idle("batches are made ahead anyway"),
    "remove_unused_columns": idle("only known columns are read"),
    "group_by_length": idle("packing fills sequences"),
    "length_column_name": idle("lengths are counted"),
    "push_to_hub": only(False),
    "hub_model_id": idle("nothing is pushed"),
    "prediction_loss_only": idle("validation reads the loss first"),
    "torch_empty_cache_steps": idle("memory is planned before the run"),
    "average_tokens_across_devices": idle("the loss is always weighted by tokens over all ranks"),
}

GENERATE: dict[str, Word] = {
    "num_beams": only(1),
    "length_penalty": idle("it belongs to beam search"),
    "max_length": idle("max_new_tokens decides"),
    "skip_special_tokens": only(True),
    "enable_thinking": idle("the template decides"),
}
FOLDER = idle("a folder says whether it holds an adapter")
ASK: dict[str, Word] = {
    **MODEL,
    **DATA,
    **GENERATE,
    "finetuning_type": FOLDER,
    "infer_dtype": choose("precision", DTYPES, remedy="choose one"),
}
EXPORT: dict[str, Word] = {
    **MODEL,
    "finetuning_type": FOLDER,
    "export_dir": to("export_dir"),
    "export_hub_model_id": only(None, remedy="upload the folder with the hub's own command"),
    "infer_dtype": choose("export_dtype", DTYPES, remedy="choose one"),
    "export_quantization_bit": to("export_quantization_bit"),
    "export_quantization_dataset": to("export_quantization_dataset"),
    "export_quantization_nsamples": to("export_quantization_nsamples"),
    "export_quantization_maxlen": to("export_quantization_maxlen"),
}
EVALUATE: dict[str, Word] = {
    **ASK,
    **{name: to(name) for name in ("task", "task_dir", "batch_size", "lang", "n_shot", "save_dir")},
    "download_mode": idle("nothing is downloaded"),
}
PREDICT: dict[str, Word] = {
    **ASK,
    **{name: METHOD[name] for name in ("bf16", "fp16", "pure_bf16", "deepspeed")},
    "do_predict": only(True),
    "predict_with_generate": only(True),
    "do_train": only(False, remedy="training and predicting are two commands"),
    "stage": only("sft"),
}
TRAIN = {**MODEL, **DATA, **METHOD, **TRAINER}

VERBS: dict[str, dict[str, Word]] = {
    "train": TRAIN,
    "predict": PREDICT,
    "export": EXPORT,
    "quantise": EXPORT,
    "eval": EVALUATE,
    "infer": ASK,
    "chat": ASK,
    "api": ASK,
    "webchat": ASK,
    "webui": {},
}
# what its parser takes for any verb, under names that are ours too
SHARED = frozenset(
    "model_name_or_path adapter_name_or_path template finetuning_type quantization_bit dataset dataset_dir media_dir"
    " cutoff_len max_samples streaming buffer_size packing val_size preprocessing_num_workers default_system stage"
    " lora_rank lora_alpha lora_dropout lora_target use_rslora freeze_trainable_layers plot_loss compute_accuracy"
    " disable_shuffling"
    " output_dir overwrite_output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate"
    " num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps weight_decay max_grad_norm adam_beta1"
    " adam_beta2 adam_epsilon optim seed ddp_timeout logging_steps report_to save_steps save_strategy save_total_limit"
    " eval_strategy eval_steps eval_dataset per_device_eval_batch_size dataloader_num_workers torch_compile do_sample"
    " temperature top_p top_k max_new_tokens repetition_penalty export_dir export_size export_device"
    " export_legacy_format infer_backend vllm_gpu_util vllm_enforce_eager vllm_config".split()
)
# words of ours that only this tool has besides: alone they tell it
HINTS = frozenset({"infer_backend", "vllm_gpu_util", "vllm_enforce_eager", "vllm_config"})


def finish(sheet: Sheet) -> None:
    """What LLaMA-Factory does where nobody says otherwise."""
    if sheet.verb == "train":
        _finish_training(sheet)
    if sheet.verb in ("export", "quantise"):
        sheet.default(export_size=5, export_device="cpu", export_form="hf")
    if sheet.verb not in ("train", "export", "quantise"):
        sheet.default(do_sample=True, temperature=0.95, top_p=0.7, top_k=50, max_new_tokens=1024)


def _finish_training(sheet: Sheet) -> None:
    """The defaults of training, which are the Trainer's wherever the tool has none of its own."""
    values = sheet.values
    sheet.default(finetuning_type="lora", packing=values.get("stage") == "pt")
    if values.get("finetuning_type") == "lora":
        sheet.default(lora_rank=8, lora_target=["all"], only_save_trainable=True)
        sheet.default(lora_alpha=2 * number(values["lora_rank"], "lora_rank"))
    sheet.default(train_projector="frozen", train_vision="frozen", activation_checkpointing="full")
    sheet.default(per_device_train_batch_size=8, per_device_eval_batch_size=8, lr_scheduler_type="linear")
    sheet.default(adam_beta2=0.999, logging_steps=500, save_total_limit=None, plot_loss=False, eval_answers=0)
    sheet.default(eval_strategy="no", output_layout="llamafactory")
    if values.get("eval_strategy") == "steps":
        sheet.default(eval_steps=values["logging_steps"])

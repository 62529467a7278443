"""ms-swift's words (2.x) and what they do where nobody says otherwise, made ours.

Must not know settings beyond their names. Of files it reads only what a run of this dialect notes beside its weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from accessory.dialect.llamafactory import DTYPES, OPTIMIZERS, SCHEDULES, backend, deepspeed, template
from accessory.dialect.rules import Sheet, Word, act, choose, each, idle, is_true, number, only, to, written

GLOBAL_BATCH = 16
ARGUMENTS = "sft_args.json"
QKV = ["q_proj", "k_proj", "v_proj"]
_WHOLE = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)")
EVERYWHERE = ["all", "projector:all", "vision:all"]


def read_arguments(folder: str | Path) -> dict[str, Any]:
    """What a run noted beside a checkpoint or in the folder around it: sft_args.json, or train.yaml of a run in our
    words; {} where there is neither. ValueError where it is no mapping.
    """
    for place in (Path(folder), Path(folder).parent):
        for file in (place / ARGUMENTS, place / "train.yaml"):
            if file.is_file():
                return _mapping(file)
    return {}


def checkpoint_model(folder: str | Path) -> dict[str, Any]:
    """model_name_or_path, adapter_name_or_path, model_type and template of a checkpoint of a run, as far as it says.

    A folder of an adapter, or of what alone was trained, lies on the base that its run noted; any other is the model.
    """
    noted, names = read_arguments(folder), _names(folder)
    base = _texts(noted.get("model_id_or_path") or noted.get("model_name_or_path"))
    found: dict[str, Any] = {}
    if "adapter_config.json" in names:
        told = _mapping(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
        base = base or ([] if noted.get("model_type") else _texts(told))
        found["adapter_name_or_path"] = [str(folder)]
    elif any(map(_WHOLE.fullmatch, names)):
        base = [str(folder)]
    elif noted.get("only_save_trainable") or any(name.startswith("state-") for name in names):
        base = [*base, str(folder)]
    else:
        base = [str(folder)]
    found |= {"model_name_or_path": base} if base else {}
    found |= {"model_type": noted["model_type"]} if noted.get("model_type") and base != [str(folder)] else {}
    name = noted.get("template_type") or noted.get("template")
    if name and written(name) != "auto":
        plain = "template_type" in noted and "/" not in name and "{" not in name
        found["template"] = f"swift/{name}" if plain else name
    return found


def _names(folder: str | Path) -> set[str]:
    return {entry.name for entry in Path(folder).iterdir()} if Path(folder).is_dir() else set()


def _texts(value: Any) -> list[str]:
    return [] if not value else [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _mapping(file: Path) -> dict[str, Any]:
    """What a JSON or YAML file says."""
    text = file.read_text(encoding="utf-8")
    try:
        tree = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}; mend it, or name the model itself") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: got a {type(tree).__name__}, expected a mapping; mend it, or name the model itself")
    return tree


def _template(sheet: Sheet, word: str, value: Any) -> None:
    """template_type; AUTO is the model's own."""
    if written(value) not in ("auto", ""):
        template(sheet, word, value)


def _checkpoint(sheet: Sheet, word: str, value: Any) -> None:
    """ckpt_dir: the verbs that know it read it themselves; for others it is the model that lies there."""
    if "ckpt_dir" in sheet.known:
        sheet.put("ckpt_dir", value, word)
        return
    for name, found in checkpoint_model(value).items():
        if name in sheet.known and not sheet.given(name):
            sheet.put(name, found, word)


def _targets(sheet: Sheet, word: str, value: Any) -> None:
    """lora_target_modules: DEFAULT, ALL, AUTO or names."""
    targets: list[str] = []
    for name in each(value):
        if name.upper() in ("EMBEDDING", "LN"):
            raise ValueError(f"{word}: got {name}, expected DEFAULT, ALL or names of linears; leave it out")
        targets += {"DEFAULT": QKV, "AUTO": QKV, "ALL": EVERYWHERE}.get(name.upper(), [name])
    sheet.put("lora_target", targets, word)


def _length(sheet: Sheet, word: str, value: Any) -> None:
    """max_length: of a row, or of the model's window; -1: no limit, which only inference can grant."""
    name = "cutoff_len" if sheet.verb == "train" else "max_seq_len"
    if number(value, word) > 0:
        sheet.put(name, value, word)
    elif sheet.verb == "train":
        raise ValueError(f"{word}: got {value}, expected a number of positions, at most the model's window; give one")


def _quantised(sheet: Sheet, word: str, value: Any) -> None:
    """quantization_bit: 0 is none."""
    if number(value, word):
        sheet.put("quantization_bit", value, word)


def _unset(name: str) -> Word:
    """A limit of which -1 says that there is none."""
    return act(lambda sheet, word, value: sheet.put(name, None if number(value, word) < 0 else value, word))


def _rows(sheet: Sheet, word: str, value: Any) -> None:
    """Rows for validation; an empty share keeps none."""
    if not any(sheet.given(name) for name in ("val_dataset", "custom_val_dataset_path")):
        sheet.put("val_size", value, word)


def _asked(sheet: Sheet, word: str, value: Any) -> None:
    """dataset, where answers are wanted: what is kept for validation comes first."""
    if not any(sheet.given(name) for name in ("val_dataset", "custom_val_dataset_path")):
        sheet.put("dataset", value, word)


def _strategy(sheet: Sheet, word: str, value: Any) -> None:
    """truncation_strategy."""
    kinds = {"delete": "drop", "truncation_left": "truncate"}
    if written(value) not in kinds:
        raise ValueError(f"{word}: got {value}, expected delete or truncation_left; choose one")
    sheet.put("overlong", kinds[written(value)], word)
    if kinds[written(value)] == "truncate":
        sheet.note(f"{word}: what is cut is said by overlong truncate; pictures and the stop token always stay")


def _resume(sheet: Sheet, word: str, value: Any) -> None:
    """The path of a checkpoint; true or auto for the newest run's newest one, false for none."""
    kinds = {"true": "auto", "auto": "auto", "last": "auto", "false": "never", "none": "never", "never": "never"}
    sheet.put("resume", kinds.get(written(value), value), word)


def _frozen(part: str) -> Word:
    """freeze_vit, freeze_aligner: a part that is not frozen is trained as the rest is."""

    def do(sheet: Sheet, word: str, value: Any) -> None:
        lora = str(sheet.words.get("sft_type") or "lora") == "lora"
        sheet.put(part, "frozen" if is_true(value, word) else "lora" if lora else "full", word)

    return act(do)


def _checkpointing(value: Any) -> str:
    return "full" if is_true(value, "gradient_checkpointing") else "none"


def _none(*also: Any) -> Word:
    return only(None, "", "[]", *also)


NO_PUSH = only(False, remedy="upload the folder with the hub's own command")
MODEL: dict[str, Word] = {
    "model_type": to("model_type"),
    "model_id_or_path": to("model_name_or_path"),
    "model_cache_dir": to("model_name_or_path"),
    "model_revision": only("main", "master", None, remedy="give the folder of that revision in model_id_or_path"),
    "template_type": act(_template),
    "dtype": choose("precision", DTYPES, remedy="choose one"),
    "quantization_bit": act(_quantised),
    "quant_method": only("bnb", None),
    "bnb_4bit_comp_dtype": idle("it is computed in the precision of the run"),
    "bnb_4bit_quant_type": only("nf4"),
    "bnb_4bit_use_double_quant": only(True),
    "max_length": act(_length),
    "use_flash_attn": idle("attention is computed as the hardware does it best"),
    "rope_scaling": only(None),
    "system": to("default_system"),
    "ckpt_dir": act(_checkpoint),
    "load_args_from_ckpt_dir": to("load_args_from_ckpt_dir"),
    "load_dataset_config": to("load_dataset_config"),
    "ignore_args_error": only(False, remedy="an unknown word is named"),
    "log_interval": idle("logging_steps decides"),
    "check_model_is_latest": idle("the hub's cache is asked first"),
    "device_map_config_path": only(None, remedy="ranks share each layer; see tensor_parallel_size"),
}
DATA: dict[str, Word] = {
    "dataset": to("dataset"),
    "custom_train_dataset_path": to("dataset"),
    "dataset_test_ratio": act(_rows),
    "dataset_seed": to("dataset_seed"),
    "check_dataset_strategy": choose(
        "on_bad_row", {"none": "error", "error": "error", "discard": "skip", "warning": "skip"}, remedy="choose one"
    ),
    "train_dataset_sample": only(-1, remedy="write name#N"),
    "val_dataset_sample": only(None, -1, remedy="write name#N"),
    "train_dataset_mix_ratio": only(0, 0.0, remedy="write name#N for each dataset"),
    "model_name": idle("data sets are read as they are"),
    "model_author": idle("data sets are read as they are"),
    "preprocess_num_proc": to("preprocessing_num_workers"),
    "self_cognition_sample": only(0),
    "truncation_strategy": act(_strategy),
}
TRAIN: dict[str, Word] = {
    **MODEL,
    **DATA,
    "val_dataset": to("eval_dataset"),
    "custom_val_dataset_path": to("eval_dataset"),
    "sft_type": choose("finetuning_type", {"lora": "lora", "full": "full"}, remedy="choose one"),
    "train_type": choose("finetuning_type", {"lora": "lora", "full": "full"}, remedy="choose one"),
    "tuner_backend": idle("there is one form of LoRA"),
    "lora_target_modules": act(_targets),
    "target_modules": act(_targets),
    "lora_dropout_p": to("lora_dropout"),
    "lora_bias_trainable": only("none"),
    "lora_modules_to_save": _none(),
    "lora_dtype": idle("what is trained has fp32 masters"),
    "lora_lr_ratio": only(None),
    "use_dora": only(False),
    "freeze_parameters": only(0, 0.0, remedy="use finetuning_type freeze"),
    "additional_trainable_parameters": _none(),
    "freeze_vit": _frozen("train_vision"),
    "freeze_aligner": _frozen("train_projector"),
    "vit_lr": to("vision_lr"),
    "aligner_lr": to("projector_lr"),
    "batch_size": to("per_device_train_batch_size"),
    "eval_batch_size": to("per_device_eval_batch_size"),
    "optim": choose("optim", OPTIMIZERS, remedy="choose one"),
    "lr_scheduler_type": choose("lr_scheduler_type", SCHEDULES, remedy="choose one"),
    "evaluation_strategy": to("eval_strategy"),
    "save_total_limit": _unset("save_total_limit"),
    "save_only_model": idle("checkpoints hold the optimizer too, so that a run goes on exactly"),
    "resume_from_checkpoint": act(_resume),
    "gradient_checkpointing": to("activation_checkpointing", _checkpointing),
    "deepspeed": act(deepspeed),
    "dataloader_pin_memory": idle("memory is pinned where there is a GPU"),
    "lazy_tokenize": idle("rows are tokenised once, and kept"),
    "acc_strategy": only("token", remedy="eval_answers counts exact matches of whole answers"),
    "test_oom_error": idle("dry_run true reckons the memory"),
    "predict_with_generate": act(lambda sheet, word, on: sheet.default(eval_answers=8 if is_true(on, word) else 0)),
    "report_to": to("report_to", each),
    "logging_dir": idle("curves lie in output_dir"),
    "logging_first_step": idle("logging_steps decides"),
    "save_on_each_node": only(False),
    "push_to_hub": NO_PUSH,
    "hub_model_id": idle("nothing is pushed"),
    "ddp_backend": idle("nccl on GPUs, gloo on CPUs"),
    "ddp_find_unused_parameters": idle("what is unused is found"),
    "disable_tqdm": idle("progress is one line per logging_steps"),
    "neftune_noise_alpha": _none(),
    "train_sampler_random": act(lambda sheet, word, on: sheet.put("disable_shuffling", not is_true(on, word), word)),
}
GENERATE: dict[str, Word] = {
    "num_beams": only(1),
    "stop_words": to("stop_words", lambda v: v if isinstance(v, list) else [v]),
}
ASK: dict[str, Word] = {
    **MODEL,
    **DATA,
    **GENERATE,
    "dataset": act(_asked),
    "val_dataset": to("dataset"),
    "custom_val_dataset_path": to("dataset"),
    "infer_backend": act(backend),
    "sft_type": idle("a folder says whether it holds an adapter"),
    "merge_device_map": idle("a merge happens where the weights are"),
    "merge_lora": only(False, remedy="use accessory export --ckpt_dir X --merge_lora true"),
    "overwrite_generation_config": idle("no file of the model is changed"),
    "gpu_memory_utilization": to("vllm_gpu_util"),
    "max_model_len": to("max_seq_len"),
    "vllm_enable_lora": idle("adapters are read by the folder"),
    "server_name": to("host"),
    "server_port": to("port"),
}
EXPORT: dict[str, Word] = {
    **MODEL,
    "sft_type": idle("a folder says whether it holds an adapter"),
    "merge_lora": only(True, remedy="an export of a checkpoint merges its adapter"),
    "merge_device_map": choose("export_device", {"auto": "auto", "cpu": "cpu", "none": "cpu"}, remedy="choose one"),
    "to_peft_format": only(False, remedy="adapters have PEFT's form here anyway"),
    "safe_serialization": act(lambda sheet, word, on: sheet.put("export_legacy_format", not is_true(on, word), word)),
    "save_safetensors": act(lambda sheet, word, on: sheet.put("export_legacy_format", not is_true(on, word), word)),
    "dtype": choose("export_dtype", DTYPES, remedy="choose one"),
    "push_to_hub": NO_PUSH,
    "quant_bits": to("export_quantization_bit"),
    "quant_method": to("export_quantization_method"),
    "quant_n_samples": to("export_quantization_nsamples"),
    "quant_seqlen": to("export_quantization_maxlen"),
    "quant_output_dir": to("export_dir"),
    "dataset": to("export_quantization_dataset"),
}
VERBS: dict[str, dict[str, Word]] = {
    "train": TRAIN,
    "predict": {**TRAIN, **ASK},
    "export": EXPORT,
    "quantise": EXPORT,
    "eval": ASK,
    "infer": ASK,
    "chat": ASK,
    "api": ASK,
    "webchat": ASK,
    "webui": {},
}
# what its parser takes under names that are ours too
SHARED = frozenset(
    "output_dir add_output_dir_suffix seed lora_rank lora_alpha use_rslora learning_rate weight_decay adam_beta1"
    " adam_beta2 max_grad_norm warmup_ratio gradient_accumulation_steps num_train_epochs max_steps eval_steps"
    " save_steps save_strategy logging_steps dataloader_num_workers ddp_timeout do_sample temperature top_k top_p"
    " max_new_tokens repetition_penalty show_dataset_sample save_result stream verbose eval_human host port".split()
)
# words of ours that only this tool has besides: alone they tell it
HINTS = frozenset({"model_type", "ckpt_dir", "load_dataset_config", "load_args_from_ckpt_dir"})


def finish(sheet: Sheet) -> None:
    """What ms-swift does where nobody says otherwise."""
    if sheet.verb == "train":
        _finish_training(sheet)
    elif sheet.verb in ("export", "quantise"):
        sheet.default(export_form="hf")
        if sheet.given("ckpt_dir"):
            _refuse_whole(sheet)
            sheet.default(export_dir=f"{str(sheet.words['ckpt_dir']).rstrip('/')}-merged")
    else:
        sheet.default(max_new_tokens=2048, do_sample=True, temperature=0.3, top_k=20, top_p=0.7, show_dataset_sample=10)
        judged = sheet.given("val_dataset") or sheet.given("custom_val_dataset_path")
        if "dataset" in sheet.values and not judged:
            sheet.default(val_size=0.01)


def _refuse_whole(sheet: Sheet) -> None:
    """ValueError where a merge is asked for and the checkpoint holds nothing to merge."""
    folder = str(sheet.words["ckpt_dir"])
    asked = sheet.given("merge_lora") or sheet.words.get("called") == "merge_lora"
    if asked and Path(folder).is_dir() and checkpoint_model(folder).get("model_name_or_path") == [folder]:
        raise ValueError(
            f"merge_lora: got {folder}, which is a whole model already, expected a checkpoint that holds an adapter;"
            " give one"
        )


def _finish_training(sheet: Sheet) -> None:
    """The defaults of training."""
    values = sheet.values
    sheet.default(finetuning_type="lora", packing=False)
    lora = values.get("finetuning_type") == "lora"
    sheet.default(learning_rate=1e-4 if lora else 1e-5, only_save_trainable=lora)
    if lora:
        sheet.default(lora_rank=8, lora_alpha=32, lora_dropout=0.05, lora_target=QKV)
        everywhere = EVERYWHERE == values.get("lora_target")
        sheet.default(**({} if everywhere else {"train_projector": "frozen"}))
    sheet.default(weight_decay=0.1, adam_beta2=0.999, max_grad_norm=0.5, lr_scheduler_type="linear", warmup_ratio=0.05)
    sheet.default(per_device_train_batch_size=1, num_train_epochs=1, overlong="drop", activation_checkpointing="full")
    if "gradient_accumulation_steps" not in values:
        sheet.default(global_batch_size=GLOBAL_BATCH)
    sheet.default(eval_strategy="steps", eval_steps=50, logging_steps=5, eval_answers=0, dataloader_num_workers=1)
    sheet.default(save_steps=values["eval_steps"])
    if "eval_dataset" not in values:
        sheet.default(val_size=0.01)
    if not sheet.env.get("NPROC_PER_NODE") and "quantization_bit" not in values:
        sheet.default(zero=3)
    # a run begins a folder of its own, unless it is told to go on; acc stands in every line of its log
    sheet.default(output_dir="output", output_layout="swift", resume="never", compute_accuracy=True)


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run in this tool's words, as sft_args.json notes them; what `read_arguments` gives back."""
    sources = list(values.get("model_name_or_path") or [])
    name = str(values.get("template") or "AUTO")
    return {
        "model_type": values.get("model_type"),
        "model_id_or_path": sources[0] if sources else None,
        "model_revision": None,
        "sft_type": values.get("finetuning_type"),
        "template_type": name.removeprefix("swift/"),
        "system": values.get("default_system"),
        "dtype": values.get("precision") or "AUTO",
        "quantization_bit": values.get("quantization_bit") or 0,
        "dataset": list(values.get("dataset") or []),
        "val_dataset": list(values.get("eval_dataset") or []),
        "dataset_seed": values.get("seed") if values.get("dataset_seed") is None else values["dataset_seed"],
        "dataset_test_ratio": values.get("val_size"),
        "max_length": values.get("cutoff_len"),
        "output_dir": str(values.get("output_dir")),
    }

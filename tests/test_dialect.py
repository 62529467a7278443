"""Tests of the dialects: which is chosen, how words and defaults of other tools become ours, and what is refused.

Must not open models or data.
"""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import pytest

from accessory.config import parse
from accessory.dialect import LAYOUTS, MODELS, find_model, last_run, pending, run_folder, swift, translate
from accessory.dialect.deepspeed import read_zero
from accessory.dialect.translate import TOOLS, translator
from accessory.dialect.words import GenerationWords, ModelWords
from accessory.export.settings import ExportSettings
from accessory.serve.infer_settings import InferSettings
from accessory.train.settings import Settings

TRAIN = {field.name for field in fields(Settings)}
INFER = {field.name for field in fields(InferSettings)}
ASK = {field.name for words in (ModelWords, GenerationWords) for field in fields(words)} | {"dataset", "val_size"}
EXPORT = {field.name for field in fields(ExportSettings)}


def train(*argv: str) -> Settings:
    return parse(Settings, argv, translate=translator("train"))


def refusal(*argv: str) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        train(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- which dialect


@pytest.mark.parametrize(
    ("words", "dialect"),
    [
        ({}, "accessory"),
        ({"dataset": ["a"], "template": "alpaca"}, "accessory"),
        ({"finetuning_type": "lora", "bf16": True}, "llamafactory"),
        ({"sft_type": "lora"}, "swift"),
        ({"model_type": "llava-next-72b"}, "swift"),
        ({"model_type": "llava-next-72b", "overwrite_cache": True}, "llamafactory"),
        ({"called": "sft"}, "swift"),
        ({"deepspeed": "default-zero2"}, "llamafactory"),
        ({"deepspeed": "default-zero2", "model_type": "llava-next-72b"}, "swift"),
        ({"dialect": "swift", "deepspeed": "default-zero2"}, "swift"),
        ({"lora_rnak": 3}, "accessory"),
    ],
)
def test_the_words_tell_the_dialect(words, dialect):
    assert translate("train", words, known=TRAIN).dialect == dialect


def test_words_of_two_tools_are_refused_in_one_sentence():
    text = refusal("--sft_type", "lora", "--overwrite_cache", "true")
    assert "sft_type (ms-swift's)" in text and "overwrite_cache (LLaMA-Factory's)" in text and "one tool" in text


def test_a_word_that_the_chosen_dialect_lacks_is_refused():
    assert "no such word" in refusal("--dialect", "swift", "--overwrite_cache", "true")
    assert "no such word" in refusal("--dialect", "accessory", "--sft_type", "lora")


def test_an_unknown_word_names_the_nearest_of_any_dialect():
    assert "'lora_target_modules'" in refusal("--lora_target_module", "ALL")
    assert "'learning_rate'" in refusal("--learning_rat", "1")


def test_the_dialect_is_said_once_and_by_the_first_rank_alone(caplog, monkeypatch):
    train("--sft_type", "lora")
    assert caplog.messages == ["dialect: ms-swift, told by its words; its defaults count too"]
    monkeypatch.setenv("RANK", "1")
    train("--sft_type", "lora")
    assert len(caplog.messages) == 1


def test_words_of_our_own_are_not_commented_on_but_whose_defaults_count_is_said(caplog):
    train("--dataset", "a", "--lora_rank", "4")
    assert len(caplog.messages) == 1 and "Accessory" in caplog.messages[0]


def test_what_was_resolved_is_our_own_words_and_reads_back_the_same(tmp_path):
    from accessory.config import dump

    settings = train("--sft_type", "lora", "--model_type", "llava-next-72b", "--dataset", "a")
    dump(settings, tmp_path / "train.yaml")
    assert settings.dialect == "accessory" and train(str(tmp_path / "train.yaml")) == settings


# ---- LLaMA-Factory


def test_llamafactorys_defaults_of_training():
    got = train("--do_train", "true", "--template", "mistral")
    want = ("lora", 8, 16.0, ["all"], False, 8, 5e-5, "linear", 0.999, 500, None, "full", True, "llamafactory/mistral")
    assert want == (
        got.finetuning_type,
        got.lora_rank,
        got.lora_alpha,
        got.lora_target,
        got.packing,
        got.per_device_train_batch_size,
        got.learning_rate,
        got.lr_scheduler_type,
        got.adam_beta2,
        got.logging_steps,
        got.save_total_limit,
        got.activation_checkpointing,
        got.only_save_trainable,
        got.template,
    )
    assert (got.eval_strategy, got.train_projector, got.train_vision) == ("no", "frozen", "frozen")


def test_llamafactorys_alpha_is_twice_the_rank_that_was_given():
    assert train("--do_train", "true", "--lora_rank", "32").lora_alpha == 64


def test_llamafactory_packs_only_when_pretraining():
    assert train("--do_train", "true", "--stage", "pt").packing
    assert not train("--do_train", "true").packing


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--bf16", "true"], "precision", "bf16"),
        (["--fp16", "true"], "precision", "fp16"),
        (["--pure_bf16", "true"], "precision", "bf16"),
        (["--do_train", "true", "--optim", "adamw_torch"], "optim", "adamw"),
        (["--do_train", "true", "--lr_scheduler_type", "constant_with_warmup"], "lr_scheduler_type", "constant"),
        (["--disable_gradient_checkpointing", "true"], "activation_checkpointing", "none"),
        (["--do_train", "true", "--freeze_vision_tower", "false"], "train_vision", "lora"),
        (["--freeze_multi_modal_projector", "false", "--finetuning_type", "full"], "train_projector", "full"),
        (["--resume_from_checkpoint", "out/checkpoint-3"], "resume", "out/checkpoint-3"),
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--do_train", "true", "--eval_strategy", "steps", "--logging_steps", "7"], "eval_steps", 7),
        (["--neat_packing", "true"], "packing", True),
    ],
)
def test_llamafactorys_words_become_ours(argv, name, value):
    assert getattr(train(*argv), name) == value


@pytest.mark.parametrize(
    "argv",
    [
        ["--use_dora", "true"],
        ["--train_on_prompt", "true"],
        ["--neftune_noise_alpha", "5"],
        ["--do_train", "true", "--optim", "lion"],
        ["--quantization_method", "hqq"],
        ["--load_best_model_at_end", "true"],
        ["--model_revision", "v2"],
        ["--do_train", "false"],
        ["--bf16", "true", "--fp16", "true"],
        ["--max_length", "256", "--cutoff_len", "512"],
        ["--dataset", "a", "--bf16", "maybe"],
    ],
)
def test_what_would_change_the_result_and_is_not_offered_is_refused(argv):
    text = refusal(*argv)
    assert "got" in text and "expected" in text


def test_words_without_effect_are_accepted_with_a_line_each():
    words = {"overwrite_cache": True, "use_unsloth": True, "flash_attn": "fa2", "use_galore": False}
    notes = translate("train", words, known=TRAIN).notes
    assert len(notes) == 3 and all("nothing to do" in note for note in notes)


def test_a_null_in_a_file_leaves_the_default(tmp_path):
    (tmp_path / "a.yaml").write_text("do_train: true\neval_dataset: null\nresume_from_checkpoint: null\ndeepspeed:\n")
    got = train(str(tmp_path / "a.yaml"))
    assert (got.eval_dataset, got.resume, got.zero) == ([], "auto", 2)


def test_lists_may_have_commas_and_paths_may_have_them_too(tmp_path):
    file = tmp_path / "a,b.json"
    file.write_text("[]")
    assert train("--dataset", "identity,alpaca_en_demo", str(file)).dataset == ["identity", "alpaca_en_demo", str(file)]
    assert train("--lora_target", "q_proj,k_proj").lora_target == ["q_proj", "k_proj"]


def test_asking_has_llamafactorys_sampling():
    got = translate("chat", {"model_name_or_path": "m", "infer_backend": "vllm", "template": "vicuna"}, known=ASK)
    assert (got.values["temperature"], got.values["top_p"], got.values["top_k"]) == (0.95, 0.7, 50)
    assert got.values["template"] == "llamafactory/vicuna" and got.values["infer_backend"] == "vllm"


# ---- ms-swift


def test_swifts_defaults_of_training(monkeypatch):
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    got = train("--sft_type", "lora", "--model_type", "llava1d6-mistral-7b-instruct", "--dataset", "x.jsonl#20")
    want = (8, 32.0, 0.05, ["q_proj", "k_proj", "v_proj"], 1e-4, 0.1, 0.5, "linear", 0.05, 1, 16, 1.0, 50, 50, 5, 0.01)
    assert want == (
        got.lora_rank,
        got.lora_alpha,
        got.lora_dropout,
        got.lora_target,
        got.learning_rate,
        got.weight_decay,
        got.max_grad_norm,
        got.lr_scheduler_type,
        got.warmup_ratio,
        got.per_device_train_batch_size,
        got.global_batch_size,
        got.num_train_epochs,
        got.eval_steps,
        got.save_steps,
        got.logging_steps,
        got.val_size,
    )
    assert (got.template, got.overlong, got.zero, got.output_layout) == (
        "swift/llava-mistral-instruct",
        "drop",
        3,
        "swift",
    )
    assert (got.dataset, got.train_projector, got.packing) == (["x.jsonl#20"], "frozen", False)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--sft_type", "full"], "learning_rate", 1e-5),
        (["--sft_type", "full"], "only_save_trainable", False),
        (["--max_length", "4096"], "cutoff_len", 4096),
        (["--lora_target_modules", "ALL"], "lora_target", ["all", "projector:all", "vision:all"]),
        (["--lora_target_modules", "q_proj,o_proj"], "lora_target", ["q_proj", "o_proj"]),
        (["--lora_target_modules", "q_proj", "o_proj"], "lora_target", ["q_proj", "o_proj"]),
        (["--sft_type", "lora", "--batch_size", "4"], "per_device_train_batch_size", 4),
        (["--sft_type", "lora", "--gradient_accumulation_steps", "2"], "global_batch_size", None),
        (["--sft_type", "lora", "--eval_steps", "9"], "save_steps", 9),
        (["--sft_type", "lora", "--save_total_limit", "-1"], "save_total_limit", None),
        (["--val_dataset", "v.jsonl", "--dataset", "t.jsonl"], "val_size", 0.0),
        (["--dataset_test_ratio", "0.2"], "val_size", 0.2),
        (["--check_dataset_strategy", "discard"], "on_bad_row", "skip"),
        (["--sft_type", "lora", "--dtype", "AUTO"], "precision", None),
        (["--sft_type", "lora", "--dtype", "fp16"], "precision", "fp16"),
        (["--sft_type", "lora", "--quantization_bit", "0"], "quantization_bit", None),
        (["--sft_type", "lora", "--gradient_checkpointing", "false"], "activation_checkpointing", "none"),
        (["--template_type", "AUTO"], "template", ""),
        (["--template_type", "llava-yi-instruct"], "template", "swift/llava-yi-instruct"),
        (["--freeze_vit", "false"], "train_vision", "lora"),
        (["--resume_from_checkpoint", "c"], "resume", "c"),
        (["--sft_type", "lora", "--system", "be brief"], "default_system", "be brief"),
    ],
)
def test_swifts_words_become_ours(argv, name, value):
    assert getattr(train(*argv), name) == value


def test_batches_make_up_the_global_one_at_any_number_of_ranks():
    got = train("--sft_type", "lora", "--batch_size", "3")
    got.settle(4)
    assert got.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    "argv", [["--sft_type", "vera"], ["--max_length", "-1"], ["--lora_target_modules", "EMBEDDING"]]
)
def test_what_swift_has_and_we_have_not_is_refused(argv):
    assert "expected" in refusal("--sft_type", "lora", *argv) if argv[0] != "--sft_type" else refusal(*argv)


def test_asking_has_swifts_sampling_and_its_share_of_rows():
    got = translate("infer", {"model_type": "llava1d6-yi-34b-instruct", "dataset": ["d.jsonl"]}, known=ASK).values
    assert (got["temperature"], got["top_k"], got["top_p"], got["max_new_tokens"]) == (0.3, 20, 0.7, 2048)
    assert (got["val_size"], got["template"]) == (0.01, "swift/llava-yi-instruct")


def test_rows_for_validation_are_asked_before_the_others():
    got = translate("infer", {"dataset": ["d"], "val_dataset": ["v"], "model_type": "llava-next-72b"}, known=ASK).values
    assert got["dataset"] == ["v"] and "val_size" not in got


def test_merging_a_checkpoint_finds_base_template_and_the_place_beside_it(tmp_path):
    checkpoint = tmp_path / "v0-x" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    noted = {
        "model_type": "llava1d6-mistral-7b-instruct",
        "model_id_or_path": "base",
        "template_type": "llava-qwen-instruct",
    }
    (checkpoint.parent / "sft_args.json").write_text(json.dumps(noted))
    got = translate("export", {"ckpt_dir": str(checkpoint), "merge_lora": "true"}, known=EXPORT)
    assert got.dialect == "swift"
    assert got.values["model_name_or_path"] == ["base"] and got.values["adapter_name_or_path"] == [str(checkpoint)]
    assert got.values["export_dir"] == f"{checkpoint}-merged" and got.values["template"] == "swift/llava-qwen-instruct"


def test_a_merged_checkpoint_is_the_model_itself(tmp_path):
    (tmp_path / "sft_args.json").write_text('{"model_type": "llava-next-72b", "template_type": "llava-qwen-instruct"}')
    assert swift.checkpoint_model(tmp_path) == {
        "model_name_or_path": [str(tmp_path)],
        "template": "swift/llava-qwen-instruct",
    }


def test_notes_that_are_no_mapping_are_refused(tmp_path):
    (tmp_path / "sft_args.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a mapping"):
        swift.checkpoint_model(tmp_path)


def test_what_a_run_notes_in_swifts_words_says_the_same_to_who_reads_it(tmp_path):
    settings = train(
        "--sft_type", "lora", "--model_id_or_path", "base", "--template_type", "llava1_5", "--dataset", "a"
    )
    noted = swift.arguments(vars(settings))
    assert (noted["sft_type"], noted["template_type"], noted["dataset_test_ratio"]) == ("lora", "llava1_5", 0.01)
    assert (noted["model_id_or_path"], noted["dataset_seed"]) == ("base", 42)


# ---- model types


@pytest.mark.parametrize(
    ("name", "hub", "template"),
    [
        ("llava1d6-mistral-7b-instruct", "liuhaotian/llava-v1.6-mistral-7b", "swift/llava-mistral-instruct"),
        ("llava1d6-yi-34b-instruct", "liuhaotian/llava-v1.6-34b", "swift/llava-yi-instruct"),
        ("llama3-llava-next-8b", "lmms-lab/llama3-llava-next-8b", "swift/llama-llava-next"),
        ("llava-next-110b", "lmms-lab/llava-next-110b", "swift/llava-qwen-instruct"),
        ("llava1_6-vicuna-13b-instruct", "llava-hf/llava-v1.6-vicuna-13b-hf", "swift/llava-vicuna"),
        ("LLaVA-1.5-7b-instruct", "llava-hf/llava-1.5-7b-hf", "swift/llava1_5"),
    ],
)
def test_a_model_type_names_weights_and_template(name, hub, template):
    row = find_model(name)
    assert (row.hub, row.template) == (hub, template)


def test_every_template_of_a_model_type_is_there():
    from accessory.data.template import get_template

    assert all(get_template(row.template) for row in MODELS.values())


def test_an_unknown_model_type_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llava-next-72b'"):
        find_model("llava-next-72")


def test_a_folder_that_is_given_wins_over_the_model_types_weights():
    got = train("--model_type", "llava-next-72b", "--model_id_or_path", "here", "--template_type", "llava1_5")
    assert got.model_name_or_path == ["here"] and got.template == "swift/llava1_5"


# ---- deepspeed


@pytest.mark.parametrize(
    ("given", "stage", "offload"),
    [
        ("default-zero2", 2, False),
        ("default-zero3", 3, False),
        ("zero3-offload", 3, True),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}', 3, True),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "bf16": {"enabled": "auto"}},
            2,
            False,
        ),
        ({"zero_optimization": {"stage": 0}}, 2, False),
        ("examples/deepspeed/ds_z3_config.yaml", 3, False),
        ("examples/deepspeed/ds_z2_offload_config.json", 2, True),
    ],
)
def test_deepspeed_is_read_for_stage_and_offload(given, stage, offload):
    zero = read_zero(given)
    assert (zero.stage, zero.offload) == (stage, offload) and "FSDP2" in zero.note


def test_a_deepspeed_file_is_read_by_its_content_and_its_hints_are_named(tmp_path):
    file = tmp_path / "ds_z3_config.json"
    tree = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}, "fp16": {}}
    file.write_text(json.dumps(tree))
    got = train("--do_train", "true", "--deepspeed", str(file))
    assert (got.zero, got.cpu_offload) == (2, True)
    assert "without effect: fp16" in read_zero(str(file)).note


@pytest.mark.parametrize(
    "given", ["nowhere.json", "{", "[1]", '{"zero_optimization": 3}', '{"zero_optimization": {"stage": 7}}']
)
def test_a_deepspeed_that_is_none_is_one_sentence(given, tmp_path):
    if given == "[1]":
        (tmp_path / "a.json").write_text(given)
        given = str(tmp_path / "a.json")
    assert "deepspeed" in refusal("--do_train", "true", "--deepspeed", given)


# ---- output trees, tables


def test_runs_of_swifts_layout_are_numbered_from_the_highest(tmp_path):
    now = datetime(2024, 5, 22, 9, 8, 7)
    first = run_folder(LAYOUTS["swift"], tmp_path, "m", now=now)
    assert first == tmp_path / "m" / "v0-20240522-090807"
    (tmp_path / "m" / "v11-x").mkdir(parents=True)
    assert run_folder(LAYOUTS["swift"], tmp_path, "m", now=now).name == "v12-20240522-090807"
    assert last_run(LAYOUTS["swift"], tmp_path, "m") == tmp_path / "m" / "v11-x"


def test_other_runs_lie_where_output_dir_says(tmp_path):
    assert run_folder(LAYOUTS["llamafactory"], "saves/x", "m", now=datetime(2024, 1, 1)) == Path("saves/x")
    assert last_run(LAYOUTS["accessory"], tmp_path, "m") is None


def test_words_that_are_shared_are_settings_of_some_verb():
    asked = {field.name for field in fields(InferSettings)} | {"host", "port"}
    exported = {field.name for field in fields(ExportSettings)}
    for tool in TOOLS.values():
        assert tool.shared <= TRAIN | asked | exported
        assert not (tool.shared - TRAIN) & {"default_system", "cutoff_len", "seed", "dataset"}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_word_of_training_names_a_setting(tool):
    names = {word.to for word in TOOLS[tool].verbs["train"].values() if word.to is not None}
    others = {"vllm_gpu_util", "vllm_enforce_eager", "vllm_config"}
    assert names - TRAIN <= {"max_seq_len", "load_args_from_ckpt_dir", "load_dataset_config", *others}


def test_words_of_a_tool_that_a_verb_lacks_are_accepted_with_a_line():
    got = translate("chat", {"lora_rank": 8, "infer_backend": "huggingface"}, known=ASK)
    assert any("lora_rank: nothing to do, it says nothing about chat" in note for note in got.notes)


@pytest.mark.parametrize(
    ("verb", "words", "wanted"),
    [
        ("train", {"do_predict": True}, "predict"),
        ("train", {"do_predict": "false"}, "train"),
        ("export", {"export_quantization_bit": 4}, "quantise"),
        ("export", {"quant_bits": "0"}, "export"),
        ("export", {"quant_bits": "4"}, "quantise"),
        ("infer", {"do_predict": True}, "infer"),
    ],
)
def test_words_may_ask_for_another_verb(verb, words, wanted):
    assert pending(verb, words) == wanted

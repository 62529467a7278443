"""The settings and commands that users of LLaMA-Factory and ms-swift own are understood as they stand.

Must not open models or data: that they run is for the tests of the verbs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from accessory import cli
from accessory.config import parse
from accessory.dialect import translator
from accessory.export.settings import ExportSettings
from accessory.serve.api.settings import ApiSettings
from accessory.serve.chat import ChatSettings
from accessory.serve.infer_settings import InferSettings
from accessory.serve.predict_settings import PredictSettings
from accessory.serve.web.main import WebchatSettings
from accessory.train.settings import Settings

LLAMA = "model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct\n"
ADAPTER = "adapter_name_or_path: saves/llama3-8b/lora/sft\n"
TEMPLATE, LORA = "template: llama3\n", "finetuning_type: lora\n"
BACKEND = "infer_backend: huggingface #choices: [huggingface, vllm]\n"
SIZES = "export_size: 2\nexport_device: cpu\nexport_legacy_format: false\n"
PREDICT = """
stage: sft
do_predict: true
finetuning_type: lora
eval_dataset: identity,alpaca_en_demo
template: llama3
max_samples: 50
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/predict
overwrite_output_dir: true
per_device_eval_batch_size: 1
predict_with_generate: true
ddp_timeout: 180000000
"""
TRAIN = """
### what LLaMA-Factory's example of LoRA says
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
EVAL = """
finetuning_type: lora
task: mmlu_test # mmlu_test, ceval_validation, cmmlu_test
template: fewshot
lang: en
n_shot: 5
save_dir: saves/llama3-8b/lora/eval
batch_size: 4
"""
GPTQ = "export_dir: models/llama3_gptq\nexport_quantization_bit: 4\nexport_quantization_dataset: data/c4_demo.json\n"
SEEING = "model_name_or_path: llava-hf/llava-1.5-7b-hf\ntemplate: vicuna\n"
ASKED = {
    "llama3": LLAMA + TEMPLATE,
    "llama3_lora_sft": LLAMA + ADAPTER + TEMPLATE + LORA,
    "llava1_5": SEEING + "visual_inputs: true\n",
    "llama3_vllm": LLAMA + TEMPLATE + "infer_backend: vllm\nvllm_enforce_eager: true\n",
    "llama3_backend": LLAMA + TEMPLATE + BACKEND,
    "llama3_lora_sft_backend": LLAMA + ADAPTER + TEMPLATE + LORA + BACKEND,
    "llava1_5_backend": SEEING + BACKEND,
}
PREDICTED = {
    "predict": LLAMA + ADAPTER + "deepspeed: examples/deepspeed/ds_z3_config.yaml\ncutoff_len: 1024\n" + PREDICT,
    "nlg_eval": LLAMA + ADAPTER + "cutoff_len: 2048\n" + PREDICT,
}


def written(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text)
    return str(file)


def exported(*argv: str) -> ExportSettings:
    return parse(ExportSettings, argv, translate=translator("export"))


# ---- LLaMA-Factory's YAML


def test_the_training_example_means_what_it_says(tmp_path):
    got = parse(Settings, [written(tmp_path, TRAIN)], translate=translator("train"))
    got.check()
    want = {
        "model_name_or_path": ["meta-llama/Meta-Llama-3-8B-Instruct"],
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "lora_target": ["all"],
        "dataset": ["identity", "alpaca_en_demo"],
        "template": "llamafactory/llama3",
        "cutoff_len": 1024,
        "max_samples": 1000,
        "packing": False,
        "output_dir": "saves/llama3-8b/lora/sft",
        "output_layout": "llamafactory",
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "precision": "bf16",
        "ddp_timeout": 180000000.0,
        "val_size": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "only_save_trainable": True,
        "plot_loss": True,
    }
    assert {name: getattr(got, name) for name in want} == want


@pytest.mark.parametrize("name", ["llama3_lora_sft", "llama3_q_lora"])
def test_the_merging_examples_mean_what_they_say(tmp_path, name):
    got = exported(
        written(tmp_path, LLAMA + ADAPTER + TEMPLATE + LORA + "export_dir: models/llama3_lora_sft\n" + SIZES)
    )
    got.check()
    assert got.adapter_name_or_path == ["saves/llama3-8b/lora/sft"] and got.export_dir == "models/llama3_lora_sft"
    assert (got.export_size, got.export_device, got.export_legacy_format) == (2, "cpu", False)
    assert (got.template, got.export_form) == ("llamafactory/llama3", "hf")


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("words", [ChatSettings, InferSettings], ids=["chat", "infer"])
def test_the_asking_examples_mean_what_they_say(tmp_path, name, words):
    verb = "chat" if words is ChatSettings else "infer"
    got = parse(words, [written(tmp_path, ASKED[name])], translate=translator(verb))
    told = yaml.safe_load(ASKED[name])
    assert got.model_name_or_path == [told["model_name_or_path"]]
    assert got.adapter_name_or_path == ([told["adapter_name_or_path"]] if "adapter_name_or_path" in told else [])
    theirs = name != "llama3"  # which has no word that is not ours too
    assert got.template == ("llamafactory/" if theirs else "") + told["template"]
    assert got.temperature == (0.95 if theirs else 0.0)


@pytest.mark.parametrize("verb", ["api", "webchat"])
@pytest.mark.parametrize("name", ASKED)
def test_the_serving_examples_are_understood_without_a_server(tmp_path, capsys, verb, name):
    file = written(tmp_path, ASKED[name])
    assert cli.main([verb, file, "--dry_run", "true"]) == 0
    assert "template" in yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", PREDICTED)
def test_the_predicting_examples_mean_what_they_say(tmp_path, capsys, name):
    file = written(tmp_path, PREDICTED[name])
    assert cli.main(["train", file, "--dry_run", "true"]) == 0
    got = yaml.safe_load(capsys.readouterr().out)
    assert got["eval_dataset"] == ["identity", "alpaca_en_demo"] and got["max_samples"] == 50
    assert (got["per_device_eval_batch_size"], got["template"]) == (1, "llamafactory/llama3")
    assert got["cutoff_len"] == yaml.safe_load(PREDICTED[name])["cutoff_len"] and got["overwrite_output_dir"]
    drawn = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024}
    assert {word: got[word] for word in drawn} == drawn and got["tensor_parallel_size"] is None


def test_the_benchmark_example_is_understood(tmp_path, capsys):
    file = written(tmp_path, LLAMA + ADAPTER + EVAL)
    assert cli.main(["eval", file, "dry_run=true"]) == 0
    got = yaml.safe_load(capsys.readouterr().out)
    assert (got["task"], got["n_shot"], got["batch_size"]) == ("mmlu_test", 5, 4)
    assert cli.main(["eval", file]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_quantising_example_is_understood(tmp_path, capsys):
    file = written(tmp_path, LLAMA + TEMPLATE + GPTQ + SIZES)
    assert cli.main(["export", file, "--dry_run", "true"]) == 0
    got = yaml.safe_load(capsys.readouterr().out)
    assert (got["export_quantization_bit"], got["export_quantization_dataset"]) == (4, ["data/c4_demo.json"])
    assert cli.main(["export", file]) == 1
    assert "quantised export is not part of this version" in capsys.readouterr().err


def test_the_batch_script_is_infer_over_a_dataset():
    argv = ["--model_name_or_path", "merged", "--dataset", "alpaca_en_demo"]
    assert parse(InferSettings, argv, translate=translator("infer")).dataset == ["alpaca_en_demo"]


# ---- ms-swift's commands

MISTRAL, YI = "llava1d6-mistral-7b-instruct", "llava1d6-yi-34b-instruct"
DATA = ["--dataset", "coco-en-2-mini"]


@pytest.mark.parametrize(
    ("model", "more", "kind"),
    [
        (MISTRAL, [], "lora"),
        (YI, [], "lora"),
        (MISTRAL, ["--sft_type", "full", "--deepspeed", "default-zero2"], "full"),
        (YI, ["--sft_type", "full"], "full"),
        (MISTRAL, ["--lora_target_modules", "ALL"], "lora"),
    ],
)
def test_swifts_training_commands_mean_what_they_say(model, more, kind):
    got = parse(Settings, ["--model_type", model, *DATA, *more], translate=translator("train"))
    got.check()
    assert (got.finetuning_type, got.dataset, got.global_batch_size) == (kind, ["coco-en-2-mini"], 16)
    assert got.template == ("swift/llava-yi-instruct" if model == YI else "swift/llava-mistral-instruct")
    assert got.zero == (2 if "default-zero2" in more else 3)


def test_sft_is_train_with_swifts_defaults():
    got = parse(Settings, ["--called=sft", *DATA, "--model_name_or_path", "m"], translate=translator("train"))
    assert (got.lora_alpha, got.output_layout) == (32, "swift")


@pytest.mark.parametrize("model", [MISTRAL, YI])
def test_swifts_interactive_command_means_what_it_says(model):
    got = parse(InferSettings, ["--model_type", model], translate=translator("infer"))
    assert got.interactive and got.model_name_or_path[0].startswith("liuhaotian/") and got.temperature == 0.3


@pytest.mark.parametrize("folder", ["output/m/vx-xxx/checkpoint-xxx", "output/m/vx-xxx/checkpoint-xxx-merged"])
def test_swifts_command_for_a_checkpoint_means_what_it_says(folder):
    argv = ["--ckpt_dir", folder, "--load_dataset_config", "true"]
    got = parse(InferSettings, argv, translate=translator("infer"))
    got.check()
    assert (got.ckpt_dir, got.load_dataset_config, got.max_new_tokens) == (folder, True, 2048)
    assert got.model_name_or_path == []


@pytest.mark.parametrize("called", [[], ["--called=merge_lora"]])
def test_swifts_merging_command_writes_beside_the_checkpoint(called):
    got = exported("--ckpt_dir", "output/m/vx-xxx/checkpoint-xxx", *(called or ["--merge_lora", "true"]), *called)
    assert got.export_dir == "output/m/vx-xxx/checkpoint-xxx-merged"


# ---- the command line


def test_a_verb_by_another_name_is_run_in_swifts_dialect(monkeypatch):
    taken = []
    monkeypatch.setattr(cli, "_run", lambda verb, argv: taken.append((verb, argv)))
    assert cli.main(["merge-lora", "--ckpt_dir", "x"]) == 0 and cli.main(["sft"]) == 0
    assert taken == [("export", ["--ckpt_dir", "x", "--called=merge_lora"]), ("train", ["--called=sft"])]


def test_a_leading_json_is_a_file_of_settings(tmp_path):
    file = tmp_path / "args.json"
    file.write_text(
        '{"model_type": "llava-next-72b", "dataset": ["a"], "sft_type": "full", "lora_bias_trainable": "none"}'
    )
    got = parse(Settings, [str(file), "--batch_size", "2"], translate=translator("train"))
    assert (got.finetuning_type, got.per_device_train_batch_size) == ("full", 2)


@pytest.mark.parametrize("verb", [*cli.VERBS, *cli.LATER])
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0 and "usage: accessory" in capsys.readouterr().out


def test_the_dialect_is_printed_by_the_command_itself(tmp_path):
    file = written(tmp_path, ASKED["llama3_backend"])
    command = [sys.executable, "-m", "accessory", "api", file, "--dry_run", "true"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("dialect: LLaMA-Factory, told by its words")


def test_the_help_of_a_verb_needs_neither_torch_nor_half_a_second_of_a_processor():
    code = (
        "import resource, sys\nfrom accessory.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "sys.exit('torch' in sys.modules or used.ru_utime + used.ru_stime > 0.5)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# ---- our own examples

EXAMPLES = Path(__file__).resolve().parents[1] / "configs" / "examples"
WORDS = {
    "train": Settings,
    "chat": ChatSettings,
    "infer": InferSettings,
    "export": ExportSettings,
    "predict": PredictSettings,
    "api": ApiSettings,
    "webchat": WebchatSettings,
}
FOR = {
    "train_lora": "train",
    "llava_lora": "train",
    "export_merged": "export",
    "infer_dataset": "infer",
    "predict": "predict",
    "llava_chat": "infer",
    "chat": "chat",
    "api": "api",
    "webchat": "webchat",
}


def test_every_example_is_for_a_verb_and_says_so():
    assert {path.stem for path in EXAMPLES.iterdir()} == set(FOR)
    assert all(f"accessory {verb} THIS" in (EXAMPLES / f"{name}.yaml").read_text() for name, verb in FOR.items())


@pytest.mark.parametrize(("name", "verb"), FOR.items())
def test_every_example_is_in_our_own_words(name, verb, caplog):
    file = str(EXAMPLES / f"{name}.yaml")
    settings = parse(WORDS[verb], [file], translate=translator(verb))
    if hasattr(settings, "check"):
        settings.check()
    assert all("dialect: Accessory" in line for line in caplog.messages)

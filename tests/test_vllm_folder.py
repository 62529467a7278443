"""The folder that vLLM runs, the verbs with infer_backend vllm, and LLaMA-Factory's script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import adapters
import hf
import pytest
import torch
import yaml
from engine_toys import ONE, write_model
from vllm_toys import LLMEngine, install

from accessory import cli
from accessory.assemble import open_model
from accessory.dialect.translate import translate
from accessory.dialect.words import ModelWords
from accessory.serve import chat, predict, vllm_infer
from accessory.serve.opening import check_words, start_ranks
from accessory.serve.predict_settings import PredictSettings
from accessory.serve.vllm_folder import folder_of, home

ROOT = Path(__file__).parents[1]
ROWS = [{"instruction": "hello", "output": "fox"}, {"instruction": "the lazy dog", "output": "no"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verbs")


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    return write_model(place / "model", "llama", sees=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, place: Path) -> list[LLMEngine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    return install(monkeypatch)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def words_of(*paths: Path, **more: object) -> ModelWords:
    return ModelWords(model_name_or_path=[str(path) for path in paths], infer_backend="vllm", **more)


@pytest.mark.slow
def test_a_model_in_another_form_is_exported_proven_and_found_again(monkeypatch, folder, tmp_path, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO")
    made = folder_of(words_of(folder), [str(folder)])
    assert made.parent == home() == tmp_path / "accessory" / "vllm" and "verified on 3 prompts" in caplog.text
    assert json.loads((made / "config.json").read_text())["model_type"] == "llama"
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert folder_of(words_of(folder), [str(folder)]) == made and "exported before" in caplog.text
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp and len(list(home().iterdir())) == 1
    assert folder_of(words_of(folder, precision="bf16"), [str(folder)]) != made
    os.utime(folder / "config.json", ns=(1, 1))
    assert folder_of(words_of(folder), [str(folder)]) != made


@pytest.mark.slow
def test_adapters_are_merged_into_the_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = hf.model_of("llama")
    base = hf.write(tmp_path / "base", model)
    both = adapters.attach(model, tmp_path / "lora")
    made = folder_of(words_of(base), [str(base), str(tmp_path / "lora")])
    ids = torch.arange(3, 12)[None]
    assert made != base and not list(made.glob("adapter*"))
    bundle = open_model([made], ranks=ONE, dtype=torch.float32)
    with torch.no_grad():
        hidden = bundle.model(ids, torch.arange(9)[None])
        wanted = both(ids).logits
    assert (bundle.model.output(hidden)[..., : wanted.shape[-1]] - wanted).abs().max() < 1e-3


def test_a_hugging_face_folder_runs_as_it_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = hf.write(tmp_path / "base", hf.model_of("llama"))
    assert folder_of(words_of(base), [str(base)]) == base and not home().exists()


@pytest.mark.slow
def test_a_failed_export_leaves_nothing(monkeypatch, folder, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("accessory.export.run.verify", lambda job, folder: (_ for _ in ()).throw(ValueError("far")))
    with pytest.raises(ValueError, match="far"):
        folder_of(words_of(folder), [str(folder)])
    assert [path.name for path in home().iterdir() if not path.name.endswith(".failed")] == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"quantization_bit": 4}, "quantization_bit: got 4 with infer_backend vllm"),
        ({"image_transform": "padded_resize"}, "pictures are made as the folder says"),
        ({"vllm_gpu_util": 1.5}, "vllm_gpu_util: got 1.5"),
    ],
)
def test_words_that_vllm_cannot_follow_are_refused(folder, more, said) -> None:
    with pytest.raises(ValueError, match=said):
        check_words(words_of(folder, **more))


def test_ranks_are_vllms_own(started, folder, monkeypatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="got vllm in a job of 2 ranks, expected one process"):
        start_ranks(words_of(folder))


def test_a_chat_talks_through_vllm(started, folder, monkeypatch, capfd) -> None:
    def said(backend: str) -> str:
        read, write = os.pipe()
        os.write(write, b"hello\nexit\n")
        os.close(write)
        with os.fdopen(read) as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            words = ["--dialect", "accessory", "--infer_backend", backend, "--max_new_tokens", "8", "--device", "cpu"]
            assert chat.main(["--model_name_or_path", str(folder), "--precision", "fp32", *words]) == 0
        return capfd.readouterr().out

    assert said("vllm") == said("huggingface") and len(started) == 1 and len(started[0].prompts) == 1


@pytest.mark.slow
def test_a_prediction_runs_through_vllm(started, folder, rows, tmp_path) -> None:
    lines = {}
    for backend in ("vllm", "huggingface"):
        out = tmp_path / backend
        settings = PredictSettings(
            model_name_or_path=[str(folder)],
            infer_backend=backend,  # type: ignore[arg-type]
            precision="fp32",
            device="cpu",
            eval_dataset=[str(rows)],
            output_dir=str(out),
            max_new_tokens=6,
            cutoff_len=64,
        )
        assert predict.run(settings)["predict_rouge-1"] >= 0
        lines[backend] = (out / "generated_predictions.jsonl").read_text()
    assert lines["vllm"] == lines["huggingface"] and len(started[0].prompts) == len(ROWS)


@pytest.mark.parametrize("verb", ["chat", "infer", "api", "predict"])
def test_without_vllm_a_verb_says_so_in_one_sentence(verb, folder, rows, capsys) -> None:
    data = ["--eval_dataset", str(rows)] if verb == "predict" else []
    assert cli.main([verb, "--model_name_or_path", str(folder), "--infer_backend", "vllm", *data]) == 1
    said = capsys.readouterr().err
    assert said.count("accessory: error") == 1 and "got vllm, which this Python has not" in said.splitlines()[-1]


def test_the_words_of_other_tools_choose_it() -> None:
    known = {"infer_backend", "vllm_gpu_util", "vllm_enforce_eager", "vllm_config", "max_seq_len", "temperature"}
    theirs = {"infer_backend": "vllm", "vllm_maxlen": 512, "vllm_config": '{"block_size": 16}', "vllm_gpu_util": 0.8}
    got = translate("api", theirs, known=known)
    assert (got.dialect, got.values["infer_backend"], got.values["max_seq_len"]) == ("llamafactory", "vllm", 512)
    assert got.values["vllm_config"] == {"block_size": 16} and got.values["vllm_gpu_util"] == 0.8
    other = translate("chat", {"infer_backend": "sglang"}, known=known)
    assert other.values["infer_backend"] == "huggingface" and "own engine" in other.notes[0]
    swift = {"infer_backend": "vllm", "gpu_memory_utilization": 0.6, "sft_type": "lora"}
    got = translate("infer", swift, known=known)
    assert (got.dialect, got.values["infer_backend"], got.values["vllm_gpu_util"]) == ("swift", "vllm", 0.6)


# ---- LLaMA-Factory's scripts/vllm_infer.py


@pytest.mark.slow
def test_the_script_answers_and_scores_a_dataset(started, folder, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", str(rows), "--temperature", "0", "--max_new_tokens", "6", "--cutoff_len", "64"]
    more = [
        "--matrix_save_name",
        "scores.json",
        "--vllm_config",
        '{"max_num_batched_tokens": 77}',
        "--template",
        "llama2",
    ]
    assert vllm_infer.main(["--model_name_or_path", str(folder), *words, *more]) == 0
    lines = [json.loads(line) for line in Path("generated_predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["fox", "no"] and lines[0]["prompt"] == "<s>[INST] hello [/INST]"
    assert json.loads(Path("scores.json").read_text())["predict_rouge-1"] >= 0
    assert started[0].args.max_num_batched_tokens == 77 and started[0].args.max_model_len == 70


def test_the_script_without_vllm_names_predict(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "vllm_infer.py"), "--model_name_or_path", "path_to_merged_model"]
    ended = subprocess.run(
        [*command, "--dataset", "alpaca_en_demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "accessory predict --model_name_or_path path_to_merged_model --eval_dataset alpaca_en_demo" in ended.stderr


def test_the_script_refuses_what_is_not_offered() -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size: got 2, expected 1"):
        vllm_infer.main(["--model_name_or_path", "m", "--pipeline_parallel_size", "2"])


def test_a_dry_run_needs_no_vllm(folder, capsys) -> None:
    assert cli.main(["chat", "--model_name_or_path", str(folder), "--infer_backend", "vllm", "--dry_run", "true"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["infer_backend"] == "vllm"

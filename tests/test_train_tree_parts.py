"""The pieces of a run's tree: its place, the log in other tools' keys, which form weights get, how targets are hit.

Must not start a run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf
import pytest
import torch
from engine_toys import ONE
from fixtures import toys
from llava_toys import SIZES
from meta import whole_weights
from states import ALONE, pieces_of, steps, values

from accessory.assemble import TINY, build, read_spec
from accessory.checkpoint import Form, write_folder
from accessory.checkpoint.huggingface.adapter_writer import AdapterForm
from accessory.checkpoint.huggingface.writer import HuggingFaceForm
from accessory.config import parse
from accessory.data.tokenizer import open_tokenizer
from accessory.dialect import LAYOUTS
from accessory.dialect.swift import checkpoint_model
from accessory.dialect.translate import translator
from accessory.dist import Ranks
from accessory.model.head import IGNORED, Head
from accessory.train.leaving import leaving
from accessory.train.lines import Lines
from accessory.train.loop import Loop, Pace
from accessory.train.plot import debiased
from accessory.train.save import Saver
from accessory.train.settings import Settings
from accessory.train.start import open_start
from accessory.train.tree import model_name, place
from spawn import run_ranks

# ---- where a run lies


def settings_of(folder: Path, **more: Any) -> Settings:
    """Settings of a run in ms-swift's layout."""
    given = {"output_dir": str(folder), "output_layout": "swift", "model_type": "kind", "resume": "never", **more}
    return Settings(**given)


def number(path: Path) -> str:
    return path.name.partition("-")[0]


def test_a_new_run_has_one_more_than_the_highest_number(tmp_path: Path) -> None:
    for name in ("v0-20240101-000000", "v7-20240101-000000", "version", "v9"):
        (tmp_path / "kind" / name).mkdir(parents=True)
    assert number(place(settings_of(tmp_path), ALONE, None)) == "v8"
    assert number(place(settings_of(tmp_path), ALONE, None)) == "v9", "the folder is taken as soon as it is named"


def test_a_run_that_goes_on_takes_the_newest_one_with_checkpoints(tmp_path: Path) -> None:
    for name in ("v9-a", "v10-b", "v11-c"):
        (tmp_path / "kind" / name).mkdir(parents=True)
    auto = settings_of(tmp_path, resume="auto")
    assert place(auto, ALONE, None).name == "v11-c"
    (tmp_path / "kind" / "v10-b" / "checkpoint-5").mkdir()
    assert place(auto, ALONE, None).name == "v10-b"
    at = tmp_path / "kind" / "v9-a" / "checkpoint-1"
    assert place(settings_of(tmp_path, resume=str(at)), ALONE, None) == at.parent
    assert number(place(settings_of(tmp_path, resume="elsewhere/checkpoint-3"), ALONE, None)) == "v12"


def test_a_requeued_job_goes_on_in_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = place(settings_of(tmp_path), ALONE, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert place(settings_of(tmp_path), ALONE, None) == mine


def place_on(ranks: Ranks, folder: Path) -> Path:
    return place(settings_of(folder), ranks, ranks.host_group)


def test_all_ranks_agree_on_the_folder(tmp_path: Path) -> None:
    first, second = run_ranks(place_on, 2, tmp_path, tp=1)
    assert first == second and len(list((tmp_path / "kind").iterdir())) == 1


def test_without_numbers_a_run_lies_in_output_dir(tmp_path: Path) -> None:
    assert place(settings_of(tmp_path, add_output_dir_suffix=False), ALONE, None) == tmp_path
    assert place(Settings(output_dir="here"), ALONE, None) == Path("here")


def test_runs_are_named_after_the_model(tmp_path: Path) -> None:
    assert model_name(Settings(model_type="llava-next-72b", model_name_or_path=["a/b"])) == "llava-next-72b"
    assert model_name(Settings(model_name_or_path=["org/some-model"])) == "some-model"
    assert model_name(Settings()) == "tiny"


@pytest.mark.parametrize(
    ("given", "resume"),
    [(None, "never"), ("true", "auto"), ("auto", "auto"), ("false", "never"), ("out/checkpoint-3", "out/checkpoint-3")],
)
def test_ms_swift_begins_anew_unless_it_is_told_to_go_on(given: str | None, resume: str) -> None:
    argv = ["--model_type", "llava-next-72b", "--dataset", "a.json", "--sft_type", "lora"]
    argv += [] if given is None else ["--resume_from_checkpoint", given]
    found = parse(Settings, argv, translate=translator("train", say=False))
    assert found.resume == resume and found.compute_accuracy


# ---- the log

LINE = {"current_steps": 3, "total_steps": 9, "loss": 0.1234567891, "acc": 0.5, "grad_norm": 2.0, "lr": 1e-4}
LINE |= {"epoch": 0.25, "percentage": 33.3, "tokens_per_second": 5.0, "memory_gb": 2**30 / 1e9}


def test_a_line_of_ms_swift_has_its_keys_and_eight_digits(tmp_path: Path) -> None:
    lines = Lines(tmp_path, journal=True)
    lines.begin([], 0)
    lines.add(LINE, 6.0)
    lines.add({"current_steps": 3, "eval_loss": 1.0, "eval_accuracy": 0.25, "epoch": 0.25}, 7.0)
    lines.close()
    first, second = map(json.loads, (tmp_path / "logging.jsonl").read_text().splitlines())
    assert list(first) == [
        *("loss", "acc", "grad_norm", "learning_rate", "memory(GiB)", "train_speed(iter/s)", "epoch", "global_step"),
    ]
    assert first["loss"] == 0.12345679 and first["memory(GiB)"] == 1.0 and first["train_speed(iter/s)"] == 0.5
    assert second == {"eval_loss": 1.0, "eval_acc": 0.25, "epoch": 0.25, "global_step": 3}


def test_a_run_that_goes_on_drops_later_lines_and_the_last_word(tmp_path: Path) -> None:
    for first, numbers in ((0, (1, 2, 3)), (2, (3, 4))):
        lines = Lines(tmp_path, journal=True)
        lines.begin([], first)
        for step in numbers:
            lines.add({**LINE, "current_steps": step}, 1.0)
        lines.end({"global_step": numbers[-1]})
        lines.close()
    found = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in found] == [1, 2, 3, 4, 4]
    assert found[-1]["log_history"] == found[:-1]


def test_a_loss_that_is_no_number_ends_up_as_valid_json(tmp_path: Path) -> None:
    lines = Lines(tmp_path, journal=True)
    lines.begin([], 0)
    lines.add({"current_steps": 1, "eval_loss": math.nan}, 1.0)
    lines.end({"global_step": 1})
    lines.draw(title="{}", training=True)
    text = (tmp_path / "logging.jsonl").read_text()
    assert json.loads(text.splitlines()[-1])["log_history"] == [{"eval_loss": "nan", "global_step": 1}]


def test_llama_factorys_history_has_the_trainers_keys_and_no_file(tmp_path: Path) -> None:
    lines = Lines(tmp_path, journal=False)
    lines.begin([{**LINE, "current_steps": 1}], 1)
    lines.add({"current_steps": 3, "eval_loss": 1.0, "eval_accuracy": 0.25}, 7.0)
    first, second = lines.history
    assert set(first) == {"loss", "acc", "grad_norm", "learning_rate", "epoch", "step"} and first["step"] == 1
    assert second == {"eval_loss": 1.0, "eval_accuracy": 0.25, "step": 3} and not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "images").write_text("a file where a folder should be")
    lines = Lines(tmp_path, journal=True)
    lines.begin([], 0)
    lines.add(LINE, 1.0)
    lines.draw(title="{}", training=True)
    assert "cannot be drawn" in caplog.text


def test_the_smoothed_curve_begins_at_the_first_value() -> None:
    assert debiased([4.0, 2.0], 0.9) == pytest.approx([4.0, (0.9 * 4 + 2) / 1.9])


# ---- which form


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA folder of transformers."""
    return hf.write(tmp_path_factory.mktemp("base") / "small", hf.model_of("llama", max_position_embeddings=512))


def form_of(path: Path, **more: Any) -> Any:
    """What a run on a folder leaves."""
    settings = Settings(model_name_or_path=[str(path)], device="cpu", precision="fp32", **more)
    start = open_start(settings, ONE)
    return leaving(start, settings, [name for name, _ in start.model.named_parameters()])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, HuggingFaceForm),
        ({"finetuning_type": "lora"}, AdapterForm),
        ({"finetuning_type": "lora", "save_format": "hf"}, AdapterForm),
        ({"finetuning_type": "lora", "save_format": "accessory"}, Form),
        ({"finetuning_type": "norm_bias"}, Form),
        ({"only_save_trainable": True}, Form),
        ({"save_format": "accessory"}, Form),
        ({"save_format": "pth"}, Form),
    ],
)
def test_the_form_is_that_of_the_folder_unless_save_format_says_another(base: Path, settings: Any, kind: type) -> None:
    assert type(form_of(base, **settings).form) is kind


def test_a_model_in_accessorys_form_keeps_it_unless_asked(tmp_path: Path) -> None:
    assert isinstance(form_of(TINY).form, Form) and form_of(TINY, save_format="pth").form.fmt == "pth"
    with pytest.raises(ValueError, match="which no Hugging Face form describes"):
        form_of(TINY, save_format="hf")
    spm = tmp_path / "tokenizer.model"
    spm.write_bytes(toys.sentencepiece_model())
    config = {**SIZES, "max_seq_len": 2048, "vocab_size": open_tokenizer(spm).size}
    weights = whole_weights(build(read_spec(config, llama_type="llama")))
    write_folder(tmp_path / "ours", weights, config=config, meta={"llama_type": "llama"}, tokenizer=spm)
    found = form_of(tmp_path / "ours", save_format="hf")
    assert found.form.family == "llama" and found.release.config["model_type"] == "llama"


def test_only_other_tools_layouts_have_their_weights_in_checkpoints(base: Path) -> None:
    assert form_of(base).whole is None and form_of(base, output_layout="swift").whole is not None
    assert form_of(base, output_layout="swift").last and not form_of(base).last
    assert LAYOUTS["swift"].final == "last"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"save_format": "hf", "only_save_trainable": True},
            "got hf with only_save_trainable true, expected accessory",
        ),
        ({"save_format": "hf", "finetuning_type": "norm_bias"}, "which plain LLaMA has not"),
        ({"save_shards": 2}, "save_shards: got 2 for a Hugging Face folder, whose shards end at 5 GB"),
    ],
)
def test_forms_that_cannot_hold_the_model_are_refused(base: Path, settings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        form_of(base, **settings)


def test_a_whole_checkpoint_is_a_model_by_itself_and_states_lie_on_their_base(tmp_path: Path) -> None:
    (tmp_path / "sft_args.json").write_text('{"model_id_or_path": "base", "template_type": "accessory/alpaca"}')
    for name in ("state-00000-of-00001.safetensors", "config.json"):
        (tmp_path / name).touch()
    assert checkpoint_model(tmp_path)["model_name_or_path"] == ["base", str(tmp_path)]
    (tmp_path / "model.safetensors").touch()
    found = checkpoint_model(tmp_path)
    assert found["model_name_or_path"] == [str(tmp_path)] and found["template"] == "accessory/alpaca"


# ---- which checkpoints stay


def test_the_best_checkpoint_may_be_one_of_those_that_are_kept(tmp_path: Path) -> None:
    for within, kept in ((True, [1, 4]), (False, [1, 3, 4])):
        folder = tmp_path / str(within)
        with Saver(folder, ALONE, keep=2, best_within=within) as saver:
            saver.best = 1
            for step in (1, 2, 3, 4):
                saver.save(step, pieces_of(values(step)), {})
        assert steps(folder) == kept


# ---- accuracy


def counted(ranks: Ranks) -> tuple[float, float]:
    """Hits by the head and by a plain formula, at any number of ranks; the last row of the vocabulary is padding."""
    generator = torch.Generator().manual_seed(2)
    whole, hidden = torch.randn(33, 16, generator=generator), torch.randn(3, 50, 16, generator=generator)
    labels = torch.randint(0, 33, (3, 50), generator=generator)
    best = (hidden @ whole.T).argmax(-1)
    labels = torch.where(torch.rand(3, 50, generator=generator) < 0.4, best, labels)
    labels[:, :7] = IGNORED
    head = Head(33, 16, shard=ranks.shard, tied=None, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        rows = whole[head.slice.start : head.slice.stop]
        head.weight.zero_()[: len(rows)] = rows
    head.hits = torch.zeros(())
    head(hidden.requires_grad_(), labels)
    with torch.no_grad():
        head(hidden[:1], labels[:1])
    right = (best == labels).sum() + (best[0] == labels[0]).sum()
    return float(head.hits), float(right)


@pytest.mark.parametrize("tp", [1, 2])
def test_hits_are_targets_with_the_largest_logit(tp: int) -> None:
    for found, wanted in run_ranks(counted, tp, tp=tp):
        assert found == wanted > 40


def mean_on(ranks: Ranks) -> tuple[float, float]:
    """Loss and accuracy of a step in which rank n has n + 1 hits of 10 targets in all."""
    trainee = SimpleNamespace(take_hits=lambda: torch.tensor(ranks.rank + 1.0))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    nothing: Any = lambda *_: None  # noqa: E731
    loop = Loop(trainee, optimizer, iter(()), ranks, Pace(1, accuracy=True), nothing, nothing, nothing, nothing)
    loss, accuracy = loop._means([torch.tensor(2.0), torch.tensor(3.0)], 10)
    return float(loss), float(accuracy)


def test_accuracy_is_of_the_targets_of_all_ranks() -> None:
    assert run_ranks(mean_on, 2, tp=1) == [pytest.approx((1.0, 0.3))] * 2

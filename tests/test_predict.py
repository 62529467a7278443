"""`accessory predict` on small models: what it leaves, what it goes on with, what it refuses.

That it survives being killed is for test_predict_kill.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_toys import ONE, opened, picture, write_model

from accessory import cli, metrics
from accessory.data.template import Turn
from accessory.dist import Ranks
from accessory.engine import Engine, Request
from accessory.serve import journal, predict, predictions
from accessory.serve.predict_settings import PredictSettings
from spawn import run_ranks

ROWS: list[dict[str, Any]] = [
    {"instruction": "hello", "output": "the quick brown fox"},
    {"instruction": "name a fox", "input": "quick", "output": "brown fox", "system": "be brief"},
    {"instruction": "and then", "output": "no", "history": [["hi", "ho"]]},
    *({"instruction": f"the lazy dog {n}", "output": f"dog {n}"} for n in range(4, 14)),
]
LIMIT = 12
Run = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("blind") / "model", "llama", sees=False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    logging.getLogger("accessory").handlers.clear()  # they write to a stderr that ends with a test


@pytest.fixture
def settings(folder: Path, rows: Path, tmp_path: Path) -> PredictSettings:
    return PredictSettings(
        model_name_or_path=[str(folder)],
        precision="fp32",
        template="llama2",
        eval_dataset=[str(rows)],
        output_dir=str(tmp_path / "out"),
        per_device_eval_batch_size=4,
        max_new_tokens=LIMIT,
        cutoff_len=128,
    )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(settings: PredictSettings, ranks: Ranks = ONE) -> dict[str, float]:
    settings.check()
    return predict.ask(settings, predict.open_dataset(settings), ranks)


def lines(settings: PredictSettings) -> list[dict[str, Any]]:
    path = Path(settings.output_dir) / "generated_predictions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(settings: PredictSettings, name: str) -> Any:
    return json.loads((Path(settings.output_dir) / name).read_text())


# ---- what it leaves


def test_every_row_has_its_line_in_order_with_the_prompt_as_it_was_asked(settings, folder):
    ask(settings)
    done = lines(settings)
    assert [list(line)[:4] for line in done] == [["prompt", "predict", "label", "id"]] * len(ROWS)
    assert [line["id"] for line in done] == [f"rows.jsonl:{n}" for n in range(1, len(ROWS) + 1)]
    assert [line["label"] for line in done] == [row["output"] for row in ROWS]
    assert done[0]["prompt"] == "<s>[INST] hello [/INST]"
    assert done[1]["prompt"] == "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nname a fox\nquick [/INST]"
    assert done[2]["prompt"] == "<s>[INST] hi [/INST] ho </s><s>[INST] and then [/INST]"
    talked = [Turn("user", "hi"), Turn("assistant", "ho"), Turn("user", "and then")]
    with Engine(opened(folder), ONE, rows=4, deterministic=True) as engine:
        asked = [Request(turns, template="llama2", max_gen_len=LIMIT) for turns in ("hello", talked)]
        assert [done[0]["predict"], done[2]["predict"]] == [result.text for result in engine.generate(asked)]


def test_the_results_are_the_means_of_the_scores_and_join_those_of_training(settings, capsys):
    out = Path(settings.output_dir)
    out.mkdir()
    (out / "all_results.json").write_text('{"train_loss": 1.5, "predict_bleu-4": 3}')
    results = ask(settings)
    scores = [metrics.score(line["predict"], line["label"]) for line in lines(settings)]
    for name, value in metrics.mean(scores).items():
        assert results[f"predict_{name}"] == pytest.approx(value, abs=1e-9)
    told_by = {f"predict_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
    assert told_by | {"predict_model_preparation_time"} <= set(results) and results["predict_samples"] == len(ROWS)
    assert told(settings, "predict_results.json") == results
    assert told(settings, "all_results.json") == {"train_loss": 1.5, **results}
    text = (out / "predict_results.json").read_text()
    assert text == json.dumps(results, indent=4, sort_keys=True) + "\n"
    assert "predict_rouge-l" in capsys.readouterr().out


def test_progress_is_logged_every_five_steps_and_at_the_end(settings):
    ask(replace(settings, per_device_eval_batch_size=1))
    log = [json.loads(line) for line in (Path(settings.output_dir) / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in log] == [5, 10, 13]
    assert {"total_steps": 13, "percentage": 100.0, "remaining_time": "0:00:00"}.items() <= log[-1].items()
    assert set(log[0]) == {"current_steps", "total_steps", "percentage", "elapsed_time", "remaining_time"}


def test_the_settings_beside_the_answers_read_back_the_same(settings):
    from accessory.config import parse

    ask(settings)
    assert parse(PredictSettings, [str(Path(settings.output_dir) / "predict.yaml")]) == settings


def test_a_row_without_an_answer_is_answered_and_not_scored(settings, tmp_path):
    file = write(tmp_path / "open.jsonl", [{"instruction": "hello", "output": ""}, ROWS[0]])
    results = ask(replace(settings, eval_dataset=[str(file)]))
    done = lines(settings)
    assert done[0]["label"] == "" and done[0]["predict"] == done[1]["predict"]
    assert (results["predict_samples"], results["predict_unlabelled"]) == (2, 1)
    assert results["predict_bleu-4"] == metrics.score(done[1]["predict"], done[1]["label"])["bleu-4"]


def test_a_draw_depends_on_seed_and_row_alone(settings, tmp_path):
    file = write(tmp_path / "same.jsonl", [ROWS[0]] * 6)
    drawn = replace(settings, eval_dataset=[str(file)], temperature=5.0, template="none")
    ask(drawn)
    first = [line["predict"] for line in lines(drawn)]
    assert len(set(first)) > 3
    write(file, [ROWS[0]] * 3)
    ask(replace(drawn, overwrite_output_dir=True))
    assert [line["predict"] for line in lines(drawn)] == first[:3]
    ask(replace(drawn, overwrite_output_dir=True, seed=1))
    assert not set(first[:3]) & {line["predict"] for line in lines(drawn)}


def test_pictures_are_shown_and_stand_in_the_prompt(settings, tmp_path):
    seeing = write_model(tmp_path / "seeing" / "model")
    picture(1).save(tmp_path / "noise.png")
    shown = {"query": "<image>what", "response": "x", "images": [str(tmp_path / "noise.png")]}
    file = write(tmp_path / "pictures.jsonl", [shown, {"query": "what", "response": "x"}])
    ask(replace(settings, model_name_or_path=[str(seeing)], template="", eval_dataset=[str(file)]))
    with_picture, without = lines(settings)
    assert "<image>" in with_picture["prompt"] and with_picture["images"] == shown["images"]
    assert "<image>" not in without["prompt"] and with_picture["predict"] != without["predict"]


def test_the_rows_that_a_run_keeps_for_validation_are_answered(settings, rows):
    ask(replace(settings, eval_dataset=[], dataset=[str(rows)], val_size=3))
    held = [line["id"] for line in lines(settings)]
    assert len(held) == 3 and held == sorted(held, key=lambda name: int(name.split(":")[1]))


# ---- what does not fit


def test_a_question_beyond_cutoff_len_loses_its_oldest_text_and_says_so(settings, tmp_path, caplog):
    file = write(tmp_path / "long.jsonl", [{"instruction": "the fox " * 100 + "runs", "output": "x"}, ROWS[0]])
    results = ask(replace(settings, eval_dataset=[str(file)], cutoff_len=20))
    long, short = lines(settings)
    assert long["dropped"] > 50 and long["prompt"].count("fox") == 100 and "dropped" not in short
    assert results["predict_shortened"] == 1 and "1 questions lost their oldest text" in caplog.text


def test_a_question_beyond_cutoff_len_is_a_bad_row_where_that_is_said(settings, tmp_path, caplog):
    file = write(tmp_path / "long.jsonl", [{"instruction": "the fox " * 100 + "runs", "output": "x"}, ROWS[0]])
    strict = replace(settings, eval_dataset=[str(file)], cutoff_len=20, overlong="error")
    with pytest.raises(ValueError, match=r"long\.jsonl:1: .*expected at most 20; .*cutoff_len.*set on_bad_row to skip"):
        ask(strict)
    results = ask(replace(strict, on_bad_row="skip"))
    assert [line["id"] for line in lines(settings)] == ["long.jsonl:2"] and results["predict_refused"] == 1
    assert "1 rows were not asked" in caplog.text


def test_answers_that_the_window_cannot_hold_are_shortened_aloud(settings, caplog):
    ask(replace(settings, max_new_tokens=1024, max_seq_len=40, cutoff_len=30, max_samples=2))
    assert "max_new_tokens: got 1024 in a window of 40 tokens, answers have at most 20" in caplog.text


def test_an_answer_that_fails_is_named_or_skipped_and_counted(settings, monkeypatch):
    finish = Engine._finish

    def failing(self: Engine, running: Any, how: Any, **more: Any) -> Any:
        bad = running.answer.request.turns[-1].text == "name a fox"
        return finish(self, running, "error", error="poisoned") if bad else finish(self, running, how, **more)

    monkeypatch.setattr(Engine, "_finish", failing)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: poisoned; mend the row"):
        ask(settings)
    results = ask(replace(settings, on_bad_row="skip"))
    assert results["predict_refused"] == 1 and len(lines(settings)) == len(ROWS) - 1


# ---- going on


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes runs end at their n-th line, as if killed behind it; 0: no more."""
    append, left = journal.Journal.append, [0]

    def counted(self: journal.Journal, record: dict[str, Any]) -> None:
        append(self, record)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt("killed here")

    monkeypatch.setattr(journal.Journal, "append", counted)
    return lambda after: left.__setitem__(0, after)


def test_a_run_goes_on_where_one_ended_and_equals_an_unbroken_one(settings, tmp_path, stopped):
    whole = replace(settings, output_dir=str(tmp_path / "whole"))
    unbroken = ask(whole)
    path = Path(settings.output_dir) / "generated_predictions.jsonl"
    for count in (1, 3, 2):
        stopped(count)
        with pytest.raises(KeyboardInterrupt):
            ask(settings)
        path.write_bytes(path.read_bytes() + b'{"prompt": "torn')
    stopped(0)
    results = ask(settings)
    assert path.read_bytes() == (tmp_path / "whole" / "generated_predictions.jsonl").read_bytes()
    scored = ("predict_bleu-4", "predict_rouge-l", "predict_samples", "predict_cut")
    assert [results[name] for name in scored] == [unbroken[name] for name in scored]


def test_a_finished_run_is_only_scored_again(settings, monkeypatch):
    first = ask(settings)
    monkeypatch.setattr(predict, "open_bundle", lambda *_: pytest.fail("a model was opened"))
    assert ask(settings) == first


def test_a_run_that_ended_between_its_last_line_and_its_results_is_concluded(settings, monkeypatch):
    for broken in ("_remove", "_sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(journal, broken, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("killed here")))
            with pytest.raises(KeyboardInterrupt):
                ask(settings)
    results = ask(settings)
    assert results["predict_samples"] == len(ROWS) == len(lines(settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.5}, "temperature 0.0, now 0.5"),
        ({"max_samples": 3}, "max_samples None, now 3"),
        ({"adapter_name_or_path": ["x"]}, r"adapter_name_or_path \[\], now \['x'\]"),
    ],
)
def test_answers_of_other_settings_are_not_mixed_with(settings, stopped, change, said):
    stopped(2)
    with pytest.raises(KeyboardInterrupt):
        ask(settings)
    stopped(0)
    with pytest.raises(ValueError, match=f"holds answers of another run \\({said}\\).*overwrite_output_dir true"):
        ask(replace(settings, **change))
    ask(replace(settings, per_device_eval_batch_size=2, device="cpu"))
    assert len(lines(settings)) == len(ROWS)


def test_answers_to_rows_or_of_a_model_that_changed_since_are_not_mixed_with(settings, rows, folder):
    ask(settings)
    before = rows.read_text()
    rows.write_text(before.replace("be brief", "be long"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has changed since it was answered"):
        ask(settings)
    rows.write_text(before + json.dumps(ROWS[0]) + "\n")
    assert ask(settings)["predict_samples"] == len(ROWS) + 1
    rows.write_text(before)
    with pytest.raises(ValueError, match=r"answers to 1 rows that are not there"):
        ask(settings)
    os.utime(folder / "config.json", ns=(1, 1))
    with pytest.raises(ValueError, match="a model whose files have changed since"):
        ask(settings)


def test_a_folder_with_answers_of_somebody_else_is_left_alone(settings):
    path = Path(settings.output_dir) / "generated_predictions.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "a", "predict": "b", "label": "c"}\n')
    (path.parent / "trainer_log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="no settings noted"):
        ask(settings)
    ask(replace(settings, overwrite_output_dir=True, max_samples=2))
    assert len(lines(settings)) == 2
    assert (path.parent / "trainer_log.jsonl").read_text().startswith('{"loss": 1}\n')


def test_overwriting_begins_anew_and_says_what_that_costs(settings, caplog, stopped):
    stopped(2)
    with pytest.raises(KeyboardInterrupt):
        ask(settings)
    stopped(0)
    with caplog.at_level(logging.INFO, logger="accessory"):
        ask(replace(settings, overwrite_output_dir=True, max_samples=3))
    assert "beginning anew; it held 2 answers and not all" in caplog.text
    assert len(lines(settings)) == 3 and told(settings, "predict_results.json")["predict_samples"] == 3


def test_two_runs_at_once_in_one_folder_are_refused(settings, stopped):
    stopped(2)
    with pytest.raises(KeyboardInterrupt):
        ask(settings)
    stopped(0)
    path = Path(settings.output_dir) / "generated_predictions.jsonl"
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing to it"):
            ask(settings)
    ask(settings)


# ---- ranks


def share(ranks: Ranks, settings: PredictSettings, end: int) -> dict[str, float] | None:
    """What one rank does; end: the number of lines after which its run ends, 0 for none."""
    append, left = journal.Journal.append, [end]

    def counted(self: journal.Journal, record: dict[str, Any]) -> None:
        append(self, record)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt("killed here")

    journal.Journal.append = counted
    try:
        return ask(settings, ranks)
    except KeyboardInterrupt:
        return None


def test_data_parallel_ranks_leave_what_one_leaves_and_any_number_goes_on(settings, tmp_path):
    whole = replace(settings, output_dir=str(tmp_path / "whole"))
    ask(whole)
    assert run_ranks(share, 2, settings, 2, tp=1) == [None, None]
    out = Path(settings.output_dir)
    assert (out / "generated_predictions.rank1.jsonl").exists()
    (left,) = run_ranks(share, 1, settings, 3)
    assert left is None
    first, second = run_ranks(share, 2, settings, 0, tp=1)
    assert first is not None and first["predict_samples"] == len(ROWS) and second == {}
    assert lines(settings) == lines(whole) and len(list(out.glob("*.rank*"))) == 0


def test_tensor_parallel_ranks_answer_as_one_does(settings, tmp_path):
    ask(replace(settings, output_dir=str(tmp_path / "one")))
    first, second = run_ranks(share, 2, settings, 0)
    assert first is not None and second == {}
    assert lines(settings) == lines(replace(settings, output_dir=str(tmp_path / "one")))


# ---- the command


def test_training_words_that_ask_for_a_prediction_are_one(settings, tmp_path, capsys, caplog):
    (tmp_path / "predict.yaml").write_text(
        f"stage: sft\ndo_predict: true\npredict_with_generate: true\nfinetuning_type: lora\ntemplate: llama2\n"
        f"model_name_or_path: {settings.model_name_or_path[0]}\neval_dataset: {settings.eval_dataset[0]}\n"
        f"deepspeed: examples/deepspeed/ds_z3_config.yaml\npreprocessing_num_workers: 16\n"
        f"output_dir: {settings.output_dir}\nper_device_eval_batch_size: 2\n"
    )
    argv = ["train", str(tmp_path / "predict.yaml"), "--max_new_tokens", "3", "--max_samples", "3"]
    assert cli.main(argv) == 0
    assert "dialect: LLaMA-Factory" in caplog.text and "predict_bleu-4" in capsys.readouterr().out
    noted = (Path(settings.output_dir) / "predict.yaml").read_text()
    assert "temperature: 0.95" in noted and "top_p: 0.7" in noted and len(lines(settings)) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval_dataset": []}, "got no rows, expected rows to answer"),
        ({"eval_dataset": [], "dataset": ["x"]}, "got dataset without val_size"),
        ({"val_size": 0.1}, "got it together with eval_dataset"),
        ({"val_size": -1.0}, "expected 0 or more"),
        ({"per_device_eval_batch_size": 0}, "got 0, expected at least 1"),
        ({"cutoff_len": 1}, "got 1, expected at least 2"),
        ({"ddp_timeout": 0.0}, "expected more than 0 seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, change, said):
    with pytest.raises(ValueError, match=said):
        replace(settings, **change).check()


def test_without_jieba_nothing_is_begun(settings, monkeypatch):
    metrics._cutter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ModuleNotFoundError, match="pip install jieba"):
        predict.run(settings)
    assert not Path(settings.output_dir).exists()


def test_the_seed_of_a_row_depends_on_both():
    seeds = {predict.seed_of(seed, row) for seed in (1, 2) for row in ("a:1", "a:2")}
    assert len(seeds) == 4 and predict.seed_of(1, "a:1") == predict.seed_of(1, "a:1")


def test_a_digest_tells_rows_apart_by_all_that_is_asked(settings, rows):
    digests = {predictions.digest(row) for row in predict.open_dataset(settings)}
    assert len(digests) == len(ROWS)

"""A run's folder: taken by one run, entered by rules, gone on with from the newest valid checkpoint, left at a signal.

Must not know a model or a loop.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from states import ALONE, equal, mounted, pieces_of, read, steps, values

from accessory.checkpoint import manifest
from accessory.dist.ranks import host_group
from accessory.train import stop
from accessory.train.folder import RunFolder, set_aside
from accessory.train.resume import check_facts, find_checkpoint
from accessory.train.save import Saver
from accessory.train.stop import RESUMABLE, Stopper
from spawn import run_ranks

STATE = "state-00000-of-00001.safetensors"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path):
    """A folder in which a run wrote checkpoints 1, 2 and 3, and a log."""
    return written(tmp_path / "out")


def written(folder, upto=3):
    with RunFolder(folder, ALONE), Saver(folder, ALONE) as saver:
        for step in range(1, upto + 1):
            saver.save(step, pieces_of(values(step)), {"seed": 7})
    (folder / "trainer_log.jsonl").write_text("{}\n")
    return folder


def enter(folder, resume="auto", **options):
    with RunFolder(folder, ALONE, **options) as taken:
        return taken.find(resume)


def shown(folder):
    return sorted(name for name in os.listdir(folder) if name != ".lock")


# ---- which checkpoint


def test_a_run_goes_on_from_its_newest_checkpoint_and_says_so(run, caplog):
    with caplog.at_level(logging.INFO):
        found = enter(run)
    assert (found.step, found.path, found.facts["seed"]) == (3, run / "checkpoint-3", 7)
    assert f"going on from {run / 'checkpoint-3'}, the newest valid one of 3" in caplog.text


def test_an_empty_folder_has_nothing_to_go_on_from(tmp_path):
    assert enter(tmp_path / "new") is None


def shorten(folder):
    content = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(content[:-1])
    return f"{STATE} has {len(content) - 1} bytes instead of {len(content)}"


def empty(folder):
    (folder / STATE).write_bytes(b"")
    return "has 0 bytes instead of"


def lengthen(folder):
    with (folder / STATE).open("ab") as file:
        file.write(b"x")
    return "bytes instead of"


def flip(folder):
    content = bytearray((folder / STATE).read_bytes())
    content[-3] ^= 16
    (folder / STATE).write_bytes(content)
    return "has another SHA-256"


def flip_facts(folder):
    text = (folder / "facts.json").read_text()
    (folder / "facts.json").write_text(text.replace('"seed": 7', '"seed": 8'))
    return "facts.json has another SHA-256"


def lose_shard(folder):
    (folder / STATE).unlink()
    return "expected consolidated.* files"


def lose_manifest(folder):
    (folder / "manifest.json").unlink()
    return "has no manifest.json, so it was not written to its end"


def lose_facts(folder):
    (folder / "facts.json").unlink()
    return "facts.json is missing"


def cut_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:40])
    return "cannot be read as JSON"


def come_from_the_future(folder):
    path = folder / "facts.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    names = [entry.name for entry in folder.iterdir() if entry.name != manifest.NAME]
    manifest.write(folder, names, to=folder / manifest.NAME)
    return "facts.json is of version 9, this program knows 1"


def rename(folder):
    os.rename(folder, folder.with_name("checkpoint-9"))
    return "facts.json says step 3"


@pytest.mark.parametrize(
    "damage",
    [
        shorten,
        empty,
        lengthen,
        flip,
        flip_facts,
        lose_shard,
        lose_manifest,
        lose_facts,
        cut_manifest,
        come_from_the_future,
        rename,
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_moved_aside(run, caplog, damage):
    words = damage(run / "checkpoint-3")
    found = enter(run)
    assert found.step == 2 and equal(read(found.path), values(2))
    assert "is passed over" in caplog.text and words in caplog.text and str(run / "checkpoint-") in caplog.text
    assert steps(run) == [1, 2] and len(os.listdir(run / "previous-1")) == 1


def test_a_folder_of_which_no_checkpoint_is_valid_is_refused(run):
    for step in (1, 2, 3):
        flip(run / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="none of its 3 checkpoints is valid .*SHA-256.*overwrite_output_dir true"):
        enter(run)
    assert steps(run) == [1, 2, 3]


def test_an_older_checkpoint_can_be_named_and_the_newer_ones_are_moved_aside(run, caplog):
    found = enter(run, str(run / "checkpoint-1"))
    assert found.step == 1 and steps(run) == [1]
    assert sorted(os.listdir(run / "previous-1")) == ["checkpoint-2", "checkpoint-3"]
    assert "moved to" in caplog.text


def test_a_checkpoint_of_another_run_can_be_named_for_a_new_folder(run, tmp_path):
    found = enter(tmp_path / "new", str(run / "checkpoint-2"))
    assert found.path == run / "checkpoint-2" and steps(run) == [1, 2, 3]


def test_a_checkpoint_of_another_run_is_not_mixed_with_a_run_that_is_there(run, tmp_path):
    other = written(tmp_path / "other", upto=1)
    with pytest.raises(ValueError, match="holds checkpoint-1 of a run of its own"):
        enter(other, str(run / "checkpoint-2"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("out/checkpoint-9", "expected auto, never, or the folder of a checkpoint"),
        ("out", "which holds checkpoints, expected one of them; give .*checkpoint-3"),
        ("bad", "expected a valid checkpoint: .*has another SHA-256"),
        ("weights", "holds no state of an optimizer; .*model_name_or_path"),
    ],
)
def test_a_named_path_that_holds_no_valid_checkpoint_is_refused(run, tmp_path, path, words):
    from accessory.checkpoint import write_folder

    flip(run / "checkpoint-1")
    os.rename(run / "checkpoint-1", tmp_path / "bad")
    write_folder(tmp_path / "weights", {"norm.weight": torch.ones(4)})
    with pytest.raises(ValueError, match=words):
        enter(tmp_path / "new", str(tmp_path / path))


def test_never_to_resume_in_a_folder_with_a_run_is_refused(run):
    with pytest.raises(ValueError, match="resume: got never .* holds checkpoint-3.*overwrite_output_dir"):
        enter(run, "never")


# ---- whose folder


def test_overwriting_moves_the_old_run_aside_and_deletes_nothing(run):
    before = {name: (run / name) for name in shown(run)}
    assert enter(run, overwrite=True) is None
    assert shown(run) == ["previous-1"] and sorted(os.listdir(run / "previous-1")) == sorted(before)
    assert equal(read(run / "previous-1" / "checkpoint-3"), values(3))


def test_a_second_overwriting_leaves_the_first_one_s_files(run):
    enter(run, overwrite=True)
    written(run, upto=1)
    enter(run, overwrite=True)
    assert shown(run) == ["previous-1", "previous-2"] and steps(run / "previous-2") == [1]


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_requeued_job_goes_on_whatever_the_settings_say(run, monkeypatch, name, resume):
    monkeypatch.setenv(name, "1")
    before = shown(run)
    assert enter(run, resume, overwrite=True).step == 3
    assert shown(run) == before


def test_a_requeued_job_takes_its_own_newest_checkpoint_before_a_named_one(run, tmp_path, monkeypatch):
    other = written(tmp_path / "other", upto=1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert enter(run, str(other / "checkpoint-1")).path == run / "checkpoint-3"
    assert enter(tmp_path / "killed at once", str(other / "checkpoint-1")).path == other / "checkpoint-1"


def test_a_job_that_was_not_requeued_is_told_by_a_zero(run, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert enter(run, overwrite=True) is None


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds thesis.tex but no run of ours.*overwrite_output_dir true"):
        enter(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_other_files_are_never_moved_not_even_by_a_second_overwriting(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for _ in range(2):
        assert enter(tmp_path, overwrite=True) is None
        (tmp_path / "trainer_log.jsonl").write_text("")
    enter(tmp_path, overwrite=True)
    assert shown(tmp_path) == ["previous-1", "previous-2", "thesis.tex"]


def test_a_finished_run_without_checkpoints_is_not_begun_again_silently(tmp_path):
    with RunFolder(tmp_path, ALONE):
        (tmp_path / "consolidated.00-of-01.model.safetensors").write_text("")
    with pytest.raises(ValueError, match="weights of a finished run and no checkpoint"):
        enter(tmp_path)
    assert enter(tmp_path, overwrite=True) is None


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        enter(tmp_path / "out")
    with pytest.raises(OSError, match="cannot be written"):
        enter(tmp_path / "out" / "run")


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        for place in (disk, disk / "run"):
            with pytest.raises(OSError, match="cannot be written .Read-only file system."):
                enter(place)


def test_what_killed_runs_left_half_done_is_removed_and_nothing_else(run):
    left = [".checkpoint-4.0123abcd.tmp", ".checkpoint-1.old", "..final.0123abcd.tmp", ".final"]
    for name in left:
        (run / name).mkdir()
        (run / name / "file").write_text("")
    (run / ".mine.tmp").mkdir()
    assert enter(run).step == 3
    assert shown(run) == [".mine.tmp", "checkpoint-1", "checkpoint-2", "checkpoint-3", "trainer_log.jsonl"]


def test_what_is_set_aside_never_meets_what_was_set_aside_before(tmp_path):
    (tmp_path / "previous-7").mkdir()
    (tmp_path / "previous-notes").mkdir()
    (tmp_path / "a").write_text("")
    assert set_aside(tmp_path, [tmp_path / "a"]) == tmp_path / "previous-8"


# ---- one run at a time


HOLD = """
import os, sys
from states import ALONE
from accessory.train.folder import RunFolder
with RunFolder(sys.argv[1], ALONE):
    if sys.argv[2:] and os.fork() == 0:
        os.read(0, 1)  # a worker that outlives the run
        os._exit(0)
    os.write(1, b"taken")
    os.read(0, 1)
"""


def hold(folder, *options):
    """Another process that holds the folder until it is killed."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.read(5) == b"taken"
    return process


def test_a_second_run_in_one_folder_is_told_who_is_there(run):
    other = hold(run)
    try:
        with pytest.raises(ValueError, match=f"another run is writing .process {other.pid} on {os.uname().nodename}"):
            enter(run, overwrite=True)
        assert steps(run) == [1, 2, 3]
    finally:
        other.kill()
        other.communicate()


def test_a_killed_run_holds_nothing_though_its_workers_live_on(run):
    other = hold(run, "with a worker")
    other.kill()
    other.wait()
    assert enter(run).step == 3
    other.communicate()  # closes the pipe on which the worker waits


def test_a_run_that_ended_lets_the_next_one_in(run):
    enter(run)
    assert enter(run).step == 3


def test_a_file_system_without_locks_is_warned_of(run, monkeypatch, caplog):
    def refuse(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert enter(run).step == 3 and "cannot be locked" in caplog.text


# ---- several ranks


def choose(ranks, folder, damage):
    if damage and ranks.rank == 0:
        flip(folder / "checkpoint-3")
    with RunFolder(folder, ranks) as taken:
        found = taken.find("auto")
    return found.path, found.step, found.facts["seed"]


@pytest.mark.parametrize("damage", [False, True])
def test_all_ranks_learn_the_choice_of_the_first(run, damage):
    step = 2 if damage else 3
    answers = run_ranks(choose, 2, run, damage, tp=1)
    assert answers == [(run / f"checkpoint-{step}", step, 7)] * 2


def choose_by(ranks, folder):
    patient = host_group(timedelta(hours=1))
    with RunFolder(folder, replace(ranks, host_group=None), group=patient) as taken:
        return taken.find("auto").step


def test_the_group_that_is_given_waits_for_the_choice(run):
    assert run_ranks(choose_by, 2, run, tp=1) == [3, 3]


def refused(ranks, folder):
    with pytest.raises(ValueError) as caught:
        enter_with = RunFolder(folder, ranks)
        enter_with.__enter__()
    return str(caught.value)


def test_all_ranks_raise_what_the_first_refuses(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    first, second = run_ranks(refused, 2, tmp_path, tp=1)
    assert first == second and "holds thesis.tex" in first


# ---- facts


FACTS = {"data": "abc", "seed": 7, "optimizer": "adamw", "betas": [0.9, 0.95], "global_batch": 64, "total_steps": 100}


def test_equal_facts_are_silent(caplog):
    check_facts({**FACTS, "sampler": {}}, {**FACTS, "betas": (0.9, 0.95), "other": 1})
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("data", "xyz", "data: got xyz, expected the checkpoint's abc, since rows would be repeated"),
        ("seed", 8, "seed: got 8, expected the checkpoint's 7"),
        ("optimizer", "sgd", "optimizer: got sgd, expected the checkpoint's adamw"),
    ],
)
def test_facts_that_would_make_another_run_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words):
        check_facts(FACTS, {**FACTS, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", [0.9, 0.99]),
        ("learning_rate", 1e-4),
        ("weight_decay", 0.1),
        ("global_batch", 32),
        ("total_steps", 9),
        ("base", ["other"]),
        ("lora", {"alpha": 16.0}),
    ],
)
def test_where_the_config_counts_both_values_are_logged(caplog, name, value):
    saved = {"learning_rate": 5e-5, "weight_decay": 0.0, "base": ["one"], "lora": {"alpha": 8.0}, **FACTS}
    check_facts(saved, {**saved, name: value})
    assert f"{name}: the checkpoint was written with {saved[name]}, from here on the config's {value}" in caplog.text


def test_a_fact_that_matters_and_was_not_saved_is_warned_of(caplog):
    check_facts({name: value for name, value in FACTS.items() if name != "data"}, FACTS)
    assert "does not say its data" in caplog.text


# ---- signals


SIGNALLED = """
import os, signal, sys
from accessory.train import stop
clock = [0.0]
stop.time.monotonic = lambda: clock[0]
with stop.Stopper() as stopper:
    for word in sys.argv[1:]:
        if word.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, word))
        else:
            clock[0] += float(word)
sys.exit(stop.RESUMABLE if stopper() else 0)
"""


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([], 0),
        (["SIGTERM"], RESUMABLE),
        (["SIGUSR1"], RESUMABLE),
        (["SIGTERM", "0.5", "SIGTERM"], RESUMABLE),
        (["SIGUSR1", "60", "SIGTERM"], RESUMABLE),
        (["SIGTERM", "5", "SIGTERM"], -signal.SIGTERM),
        (["SIGUSR1", "5", "SIGUSR1"], -signal.SIGUSR1),
        (["SIGUSR1", "60", "SIGTERM", "5", "SIGTERM"], -signal.SIGTERM),
    ],
)
def test_a_signal_asks_once_and_the_same_again_ends_at_once(events, code):
    assert subprocess.run([sys.executable, "-c", SIGNALLED, *events], check=False).returncode == code


def test_a_signal_is_only_a_flag_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with Stopper() as stopper:
        assert not stopper()
        signal.raise_signal(signal.SIGUSR1)
        assert stopper() and stopper.asked
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_outside_of_the_main_thread_signals_stay_as_they_are_and_that_is_said(caplog):
    before, answers = [signal.getsignal(number) for number in stop.SIGNALS], []

    def work():
        with Stopper() as stopper:
            answers.append(stopper())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False] and "not in the main thread" in caplog.text
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_the_note_of_the_lock_is_json(run):
    note = json.loads((run / ".lock").read_text())
    assert note["pid"] == os.getpid() and note["host"] == os.uname().nodename and note["others"] == []


def test_a_checkpoint_is_found_without_taking_the_folder(run):
    assert find_checkpoint(run, resume="auto").step == 3 and find_checkpoint(run, resume="never") is None

"""Checkpoints beside the training: whole or not at all, exact at any number of ranks, whatever dies or fills up.

Must not know a model: the tensors are a few numbers under names.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from states import ALONE, equal, group_of, in_a_process, local, mounted, pieces_of, read, steps, values

from accessory.checkpoint import manifest, open_folders
from accessory.checkpoint.boxes import Box, read_boxes
from accessory.checkpoint.write import Papers
from accessory.dist import Cut
from accessory.train.resume import checkpoints, find_checkpoint, flaws
from accessory.train.save import Saver, restore
from spawn import run_ranks


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoint-1."""
    with Saver(tmp_path, ALONE) as saver:
        saver.save(1, pieces_of(values(1)), {})
    return tmp_path


# ---- what a checkpoint is


def test_a_checkpoint_holds_state_facts_papers_and_a_manifest_of_all(tmp_path):
    spm = tmp_path / "tokenizer.model"
    spm.write_bytes(b"pieces")
    papers = Papers({"dim": 6}, {"llama_type": "llama"}, spm)
    with Saver(tmp_path / "out", ALONE, papers=papers) as saver:
        saver.save(40, pieces_of(values(1)), {"data": "abc", "base": ["/models/llama"]})
    folder = tmp_path / "out" / "checkpoint-40"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "state-00000-of-00001.safetensors",
        "facts.json",
        "config.json",
        "meta.json",
        "tokenizer.model",
        "manifest.json",
    }
    assert set(manifest.read(folder)) == names - {"manifest.json"}
    assert flaws(folder, hashes=True) == []
    facts = json.loads((folder / "facts.json").read_text())
    assert facts == {"version": 1, "data": "abc", "base": ["/models/llama"], "step": 40, "world": 1}
    opened = open_folders(folder)
    assert opened.tokenizer == folder / "tokenizer.model" and opened.config == {"dim": 6}
    assert equal(read(folder), values(1))
    assert os.listdir(tmp_path / "out") == ["checkpoint-40"]


def test_a_checkpoint_fills_tensors_again_in_place(run):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in values(1).items()}
    restore(run / "checkpoint-1", pieces_of(tensors))
    assert equal(tensors, values(1))


def test_a_tensor_of_another_dtype_is_not_filled(run):
    tensors = {name: tensor.bfloat16() for name, tensor in values(1).items()}
    with pytest.raises(ValueError, match="tok_embeddings.weight is torch.float32, expected torch.bfloat16"):
        restore(run / "checkpoint-1", pieces_of(tensors))


def test_facts_that_are_no_json_are_refused_at_once(tmp_path):
    saver = Saver(tmp_path, ALONE)
    with pytest.raises(ValueError, match="JSON"):
        saver.save(1, pieces_of(values(1)), {"best": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_the_first_release_is_still_read():
    folder = Path(__file__).parent / "fixtures" / "checkpoint-5"  # written once, by two ranks; never write it anew
    assert flaws(folder, hashes=True) == []
    numbers = torch.arange(33 * 2.0).reshape(33, 2)
    wanted = {"model/output.weight": numbers, "optimizer/exp_avg/output.weight": numbers.bfloat16()}
    got = dict(read_boxes(folder, {name: Box.whole(tensor.shape) for name, tensor in wanted.items()}))
    assert equal(got, wanted)
    assert torch.equal(dict(open_folders(folder).tensors({"output.weight": Cut((33, 2))}))["output.weight"], numbers)


# ---- asynchronous


def test_what_was_there_at_the_call_is_written_though_it_changes_right_after(tmp_path, monkeypatch):
    go, pwrite = threading.Event(), os.pwrite

    def held(*args):
        go.wait(60)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", held)
    live = values(1)
    with Saver(tmp_path, ALONE) as saver:
        saver.save(1, pieces_of(live), {})  # returns while not a byte is written
        assert not checkpoints(tmp_path)
        for tensor in live.values():
            tensor.normal_()
        go.set()
    with Saver(tmp_path / "sync", ALONE) as saver:
        saver.save(1, pieces_of(values(1)), {}, final=True)
    name = "state-00000-of-00001.safetensors"
    same = (tmp_path / "checkpoint-1" / name).read_bytes() == (tmp_path / "sync" / "checkpoint-1" / name).read_bytes()
    assert same and equal(read(tmp_path / "checkpoint-1"), values(1))


def test_the_next_save_waits_for_the_one_under_way(tmp_path, monkeypatch):
    order, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(threading.current_thread().name), fsync(handle)))
    with Saver(tmp_path, ALONE) as saver:
        for step in (1, 2, 3):
            saver.save(step, pieces_of(values(step)), {})
    assert order == sorted(order) and set(order) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert all(equal(read(tmp_path / f"checkpoint-{step}"), values(step)) for step in (1, 2, 3))


def test_leaving_the_run_by_an_error_waits_for_the_save_under_way(tmp_path):
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path, ALONE) as saver:
        saver.save(1, pieces_of(values(1)), {})
        raise KeyboardInterrupt
    assert flaws(tmp_path / "checkpoint-1", hashes=True) == []


def test_a_step_that_is_saved_already_is_not_written_again(run, caplog):
    before = (run / "checkpoint-1" / "manifest.json").stat()
    with Saver(run, ALONE) as saver, caplog.at_level(logging.INFO):
        saver.save(1, pieces_of(values(1)), {}, final=True)
    assert (run / "checkpoint-1" / "manifest.json").stat() == before and "there already" in caplog.text


# ---- retention


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path):
    with Saver(tmp_path, ALONE, keep=2) as saver:
        for step in range(1, 7):
            saver.save(step, pieces_of(values(step)), {})
            if step == 2:
                saver.wait()
                saver.best = 2
    assert steps(tmp_path) == [2, 5, 6]


def test_a_damaged_checkpoint_does_not_count_as_kept_and_is_left_alone(tmp_path):
    with Saver(tmp_path, ALONE, keep=2) as saver:
        for step in (1, 2):
            saver.save(step, pieces_of(values(step)), {}, final=True)
        (tmp_path / "checkpoint-2" / "manifest.json").unlink()
        saver.save(3, pieces_of(values(3)), {}, final=True)
        assert steps(tmp_path) == [1, 2, 3]
        saver.save(4, pieces_of(values(4)), {})
    assert steps(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_what_cannot_be_deleted_is_warned_of_and_the_run_goes_on(tmp_path, monkeypatch, caplog, call):
    real = getattr(os, call)

    def refuse(path, *args, **kwargs):
        if "checkpoint-1" in str(path) or call == "unlink":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    with Saver(tmp_path, ALONE, keep=1) as saver:
        saver.save(1, pieces_of(values(1)), {}, final=True)
        monkeypatch.setattr(os, call, refuse)
        saver.save(2, pieces_of(values(2)), {}, final=True)
        monkeypatch.undo()
        assert "checkpoint-1 cannot be deleted (Permission denied)" in caplog.text
        saver.save(3, pieces_of(values(3)), {})
    assert steps(tmp_path) == [3]


def test_to_keep_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit: got 0"):
        Saver(tmp_path, ALONE, keep=0)


# ---- disks


def fail(code, times=1_000_000):
    """An os.pwrite that writes half and then fails with an errno."""
    real, left = os.pwrite, [times]

    def pwrite(handle, data, offset):
        if left[0] <= 0:
            return real(handle, data, offset)
        left[0] -= 1
        real(handle, data[: len(data) // 2], offset)
        raise OSError(code, os.strerror(code))

    return pwrite


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_costs_one_checkpoint_and_training_goes_on(run, monkeypatch, caplog, code):
    with Saver(run, ALONE) as saver:
        monkeypatch.setattr(os, "pwrite", fail(code))
        saver.save(2, pieces_of(values(2)), {})
        saver.wait()
        assert os.listdir(run) == ["checkpoint-1"] and equal(read(run / "checkpoint-1"), values(1))
        assert "the disk is full" in caplog.text and "bytes needed" in caplog.text and "free)" in caplog.text
        assert f"{run / 'checkpoint-1'} still stands" in caplog.text
        monkeypatch.undo()
        saver.save(3, pieces_of(values(3)), {})
    assert steps(run) == [1, 3] and equal(read(run / "checkpoint-3"), values(3))


def test_a_save_that_fails_with_nothing_to_fall_back_to_ends_the_run(tmp_path, monkeypatch):
    saver = Saver(tmp_path, ALONE)
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC))
    saver.save(1, pieces_of(values(1)), {})
    with pytest.raises(OSError, match="checkpoint-1: the disk is full .* bytes needed, .* free"):
        saver.save(2, pieces_of(values(2)), {})
    assert os.listdir(tmp_path) == []


def test_the_last_save_fails_loudly(run, monkeypatch):
    saver = Saver(run, ALONE)
    monkeypatch.setattr(os, "pwrite", fail(errno.EIO))
    with pytest.raises(OSError, match="checkpoint-2: cannot be written"):
        saver.save(2, pieces_of(values(2)), {}, final=True)
    assert os.listdir(run) == ["checkpoint-1"]


def big(step):
    return {"model/a": torch.full((100_000,), float(step))}  # 400 kB


def test_a_disk_that_is_really_full_keeps_what_it_has(tmp_path, caplog):
    with mounted(tmp_path / "disk", "size=1m") as disk, Saver(disk, ALONE) as saver:
        for step in (1, 2, 3):
            saver.save(step, pieces_of(big(step)), {})
        saver.wait()
        assert steps(disk) == [1, 2] and len(os.listdir(disk)) == 2
        assert "the disk is full" in caplog.text and f"{disk / 'checkpoint-2'} still stands" in caplog.text
        assert find_checkpoint(disk, resume="auto").step == 2


def test_a_disk_that_becomes_read_only_keeps_what_it_has(tmp_path, caplog):
    with mounted(tmp_path / "disk", "size=1m") as disk, Saver(disk, ALONE) as saver:
        saver.save(1, pieces_of(big(1)), {}, final=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        saver.save(2, pieces_of(big(2)), {})
        saver.wait()
        assert steps(disk) == [1] and "Read-only file system" in caplog.text
        with pytest.raises(OSError, match="cannot be written"):
            saver.save(3, pieces_of(big(3)), {}, final=True)


def test_a_folder_that_vanished_comes_back_with_the_next_checkpoint(run):
    with Saver(run, ALONE) as saver:
        shutil.rmtree(run)
        saver.save(2, pieces_of(values(2)), {}, final=True)
    assert steps(run) == [2]


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:99], offset))
    with Saver(tmp_path, ALONE) as saver:
        saver.save(1, pieces_of(values(1)), {}, final=True)
    assert flaws(tmp_path / "checkpoint-1", hashes=True) == [] and equal(read(tmp_path / "checkpoint-1"), values(1))


# ---- several ranks


def hand_on(ranks, before, folder):
    """Read a checkpoint as this rank's part, compare, and write it again."""
    pieces = local(ranks, 5)
    wanted = {name: piece.tensor.clone() for name, piece in pieces.items()}
    if before is not None:
        for piece in pieces.values():
            piece.tensor.zero_()
        restore(before, pieces)
    assert equal({name: piece.tensor for name, piece in pieces.items()}, wanted)
    with Saver(folder, ranks, group=group_of(ranks)) as saver:
        saver.save(5, pieces, {})


def test_a_state_handed_on_from_1_to_2_to_4_to_1_ranks_is_bitwise_the_same(tmp_path):
    before = None
    for place, (n, tp) in enumerate([(1, 1), (2, 2), (4, 2), (2, 1), (1, 1)]):
        run_ranks(hand_on, n, before, tmp_path / str(place), tp=tp)
        before = tmp_path / str(place) / "checkpoint-5"
        assert len(list(before.glob("state-*"))) == n and equal(read(before), values(5))


def save_while_collectives_run(ranks, folder):
    """Sums over the job's own groups, again and again, while the thread agrees over another."""
    total = torch.zeros(1)
    with Saver(folder, ranks, keep=2, group=group_of(ranks)) as saver:
        for step in range(1, 6):
            saver.save(step, local(ranks, step), {})
            for _ in range(50):
                one = torch.ones(1)
                torch.distributed.all_reduce(one)
                torch.distributed.all_reduce(one, group=ranks.host_group)
                total += one
    return float(total)


def test_the_thread_s_collectives_never_meet_those_of_the_training(tmp_path):
    assert run_ranks(save_while_collectives_run, 2, tmp_path, tp=1) == [1000.0, 1000.0]
    assert steps(tmp_path) == [4, 5] and equal(read(tmp_path / "checkpoint-5"), values(5))


def one_rank_s_disk_fails(ranks, folder, bad):
    """A good save, one in which a rank's disk is full, a good one, and a last one that fails again."""
    with Saver(folder, ranks, group=group_of(ranks)) as saver:
        saver.save(1, local(ranks, 1), {})
        saver.wait()
        real = os.pwrite
        if ranks.rank == bad:
            os.pwrite = fail(errno.ENOSPC)
        saver.save(2, local(ranks, 2), {})
        saver.wait()
        listing = sorted(os.listdir(folder))
        os.pwrite = real
        saver.save(3, local(ranks, 3), {})
        saver.wait()
        if ranks.rank == bad:
            os.pwrite = fail(errno.ENOSPC)
        try:
            saver.save(4, local(ranks, 4), {}, final=True)
        except OSError as error:
            return listing, str(error)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_full_disk_of_one_rank_is_known_to_all(tmp_path, bad):
    answers = run_ranks(one_rank_s_disk_fails, 2, tmp_path, bad, tp=1)
    for _, text in answers:
        assert text.startswith(f"rank {bad}: {tmp_path / 'checkpoint-4'}: the disk is full")
    assert answers[0][0] == ["checkpoint-1"] and sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-3"]


def the_last_rename_fails(ranks, folder):
    """All files are written, but rank 0 cannot give the folder its name."""

    def rename(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    saver = Saver(folder, ranks, group=group_of(ranks))
    if ranks.rank == 0:
        os.rename = rename
    with pytest.raises(OSError) as caught:
        saver.save(1, local(ranks, 1), {}, final=True)
    return str(caught.value)


def test_a_folder_that_rank_0_cannot_complete_is_known_to_all_and_removed(tmp_path):
    first, second = run_ranks(the_last_rename_fails, 2, tmp_path, tp=1)
    assert first == second and "checkpoint-1: cannot be written (Read-only file system)" in first
    assert os.listdir(tmp_path) == []


def a_host_that_does_not_share(ranks, folder):
    """Rank 1 writes where rank 0 does not look."""
    saver = Saver(folder, ranks, group=group_of(ranks))
    if ranks.rank == 1:
        write = saver._write
        saver._write = lambda path, *rest: (
            (folder / "elsewhere").mkdir(),
            write(folder / "elsewhere" / path.name, *rest),
        )[1]
    with pytest.raises(OSError) as caught:
        saver.save(1, local(ranks, 1), {}, final=True)
    return str(caught.value)


def test_an_output_folder_that_the_hosts_do_not_share_is_said(tmp_path):
    for text in run_ranks(a_host_that_does_not_share, 2, tmp_path, tp=1):
        assert "rank 0 does not see state-00001-of-00002.safetensors" in text and "all hosts share" in text
    assert checkpoints(tmp_path) == []


def die_while_saving(ranks, folder, victim, call):
    """checkpoint-1, then a rank is killed at its first such call of the save of checkpoint-2."""
    saver = Saver(folder, ranks, group=group_of(ranks))
    saver.save(1, local(ranks, 1), {}, final=True)
    if ranks.rank == victim:
        setattr(os, call, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    saver.save(2, local(ranks, 2), {}, final=True)


@pytest.mark.parametrize(("victim", "call"), [(0, "mkdir"), (0, "rename"), (1, "pwrite"), (1, "fsync")])
def test_one_rank_killed_while_saving_leaves_the_checkpoint_before(tmp_path, victim, call):
    with pytest.raises(AssertionError, match=f"rank {victim} died|raised"):
        run_ranks(die_while_saving, 2, tmp_path, victim, call, tp=1)
    assert find_checkpoint(tmp_path, resume="auto").step == 1
    assert equal(read(tmp_path / "checkpoint-1"), values(1))


# ---- killed at every call


KILL_EVERYWHERE = """
import json, os, shutil, signal, sys
import torch
from states import ALONE, equal, pieces_of, read, values
from accessory.checkpoint import staging
from accessory.train.folder import RunFolder
from accessory.train.resume import checkpoints
from accessory.train.save import Saver

work, staging.BLOCK = sys.argv[1], 512
with Saver(work + "/template", ALONE) as saver:
    saver.save(1, pieces_of(values(1)), {})
    saver.save(2, pieces_of(values(2)), {})

def count(limit):
    seen = [0]
    def wrapped(real):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in ("open", "pwrite", "fsync", "mkdir", "rename", "unlink", "rmdir", "stat"):
        setattr(os, name, wrapped(getattr(os, name)))

found, limit, ended = [], 0, False
while not ended:
    limit += 1
    folder = f"{work}/{limit}"
    shutil.copytree(work + "/template", folder)
    child = os.fork()
    if child == 0:
        with RunFolder(folder, ALONE) as run, Saver(run.path, ALONE, keep=2) as saver:
            count(limit)
            saver.save(3, pieces_of(values(3)), {})
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with RunFolder(folder, ALONE) as run:
        chosen = run.find("auto")
        assert equal(read(chosen.path), values(chosen.step)), folder
        assert len(checkpoints(run.path)) >= 2, folder
        assert set(os.listdir(folder)) <= {".lock", "checkpoint-1", "checkpoint-2", "checkpoint-3"}, folder
        with Saver(run.path, ALONE, keep=1) as saver:
            saver.save(4, pieces_of(values(4)), {})
    assert [step for step, _ in checkpoints(run.path)] == [4], folder
    found.append(chosen.step)
    shutil.rmtree(folder)
print(json.dumps(found))
"""


def test_a_kill_at_any_call_of_a_save_leaves_the_one_before_or_the_new_one(tmp_path):
    found = json.loads(in_a_process(KILL_EVERYWHERE, str(tmp_path)).splitlines()[-1])
    assert len(found) > 40 and found == sorted(found) and set(found) == {2, 3}

"""Tests of dist: the place a launcher gives, the groups built there, and how a job of several ranks ends.

Must not need a model, a GPU, a fixed port or a network beyond the loopback device.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accessory import dist
from accessory.dist.place import Place, read_place
from accessory.dist.ranks import _backend
from spawn import run_ranks

LAUNCHED = """
import os, signal, sys
from accessory import dist
from accessory.cli import guard

def main():
    dist.launch(3)
    rank = os.environ["RANK"]
    if rank != "0":
        os.write(1, f"follower {rank} {os.getpid()}\\n".encode())
        if sys.stdin.read() != "" or "fail" in sys.argv and rank == "2":
            raise ValueError("wrong input on purpose")
    if "refuse" in sys.argv:
        raise ValueError("no such folder")
    if rank == "0":
        print("answer", flush=True)
        if "leave" in sys.argv:
            return
    signal.pause()

sys.exit(guard(main))
"""

JOB = """
import os, signal, sys
import torch
from accessory import dist
from accessory.cli import guard

def main():
    dist.setup_logging(int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0))
    if "launch" in sys.argv:
        dist.launch(2)
    ranks = dist.init(device="cpu", timeout=60)
    total = torch.tensor([ranks.rank + 1.0])
    torch.distributed.all_reduce(total, group=ranks.tp_group)
    if ranks.leader:
        print("sum", int(total), flush=True)
    if "die" in sys.argv:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(total, group=ranks.tp_group)
    dist.close()

sys.exit(guard(main))
"""


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    mine = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "RANK", "WORLD"))
    }
    return {**mine, **extra}


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process with pipes, and sees to it that none outlives its test, followers included."""
    with ExitStack() as started:

        def run(argv: list[str], *, stdin: int = subprocess.PIPE, **extra: str) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            process = subprocess.Popen(argv, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environment(**extra))
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield run


def gone(pid: int, within: float = 20.0) -> bool:
    """Whether a process, not necessarily our child, ends in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], within)[0])
    finally:
        os.close(handle)


def followers(process: subprocess.Popen[str], *, count: int) -> list[int]:
    """The pids that the followers of LAUNCHED wrote; their stdout is the leader's stderr."""
    assert process.stderr is not None, "started without a pipe"
    return [int(process.stderr.readline().split()[2]) for _ in range(count)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# ---- the place


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place()),
        ({"SLURM_NTASKS": "8"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(one_host=False)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            Place(5, 8, 1, "env://"),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "ACCESSORY_STORE": "/x/store"},
            Place(1, 2, 1, "file:///x/store", one_host=True),
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[08-09]-ib,m1",
             "SLURM_JOB_ID": "10", "SLURM_STEP_ID": "2"},
            Place(3, 4, 1, "tcp://n08-ib:15312"),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "9", "SLURM_JOB_NODELIST": "a-1,a-2",
             "MASTER_PORT": "77"},
            Place(0, 2, 0, "tcp://a-1:77"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "MASTER_PORT": "7"},
         Place(0, 2, 0, "tcp://10.0.0.1:7")),
    ],
)  # fmt: skip
def test_the_place_is_read_from_the_launchers_variables(env: Mapping[str, str], place: Place):
    assert read_place(env) == place


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: not set, but RANK=0 is"),
        ({"WORLD_SIZE": "2"}, "RANK: not set, but WORLD_SIZE=2 is"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "ACCESSORY_STORE": "x"}, "got 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2", "ACCESSORY_STORE": "x"}, "RANK: got 'one'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": ","}, "set MASTER_ADDR"),
    ],
)
def test_a_contradicting_environment_is_refused(env: Mapping[str, str], said: str):
    with pytest.raises(ValueError, match=said):
        read_place(env)


# ---- shards, cuts, devices, dtypes, logs


def test_a_cut_knows_its_local_shape_with_padding():
    assert dist.Cut((10, 4)).local_shape == (10, 4)
    assert dist.Cut((10, 4), dim=0, start=8, stop=10, pad=2).local_shape == (4, 4)
    assert dist.Cut((10, 4), dim=1, start=0, stop=2).local_shape == (10, 2)


def test_plain_python_is_one_rank_without_any_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    ranks = dist.init(device="cpu")
    assert (ranks.rank, ranks.world, ranks.shard, ranks.leader) == (0, 1, dist.Shard(0, 1), True)
    assert ranks.tp_group is ranks.dp_group is ranks.control is None
    assert not torch.distributed.is_initialized()
    dist.close()


@pytest.mark.parametrize("tp", [0, 2])
def test_a_tp_that_does_not_divide_the_world_is_refused(tp: int):
    with pytest.raises(ValueError, match=f"tp: got {tp} with 1 rank"):
        dist.init(tp=tp, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_and_absent_is_refused_and_auto_is_the_cpu():
    assert dist.pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="use --device cpu"):
            dist.pick_device(name)


@pytest.mark.gpu
def test_a_device_beyond_the_visible_ones_is_refused_and_ranks_beyond_them_share():
    count = torch.cuda.device_count()
    assert dist.pick_device("cuda", count) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=f"got cuda:{count}"):
        dist.pick_device(f"cuda:{count}")


def test_an_unknown_device_or_dtype_is_refused():
    with pytest.raises(ValueError, match="got 'gpu', expected auto, cpu, cuda or cuda:N"):
        dist.pick_device("gpu")
    with pytest.raises(ValueError, match="got 'int8', expected one of fp32, bf16, fp16"):
        dist.dtype_from_name("int8")


def test_the_default_dtype_is_the_checkpoints_on_a_gpu_and_the_fast_one_on_a_cpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert dist.default_dtype(gpu, torch.float16) == torch.float16
    assert dist.default_dtype(cpu, torch.float16) == (torch.bfloat16 if dist.cpu_has_bf16() else torch.float32)


def test_rank_zero_logs_from_info_and_the_others_only_warnings(capsys):
    logger, root = logging.getLogger("accessory"), logging.getLogger()
    before = (logger.level, list(root.handlers))
    try:
        for rank in (0, 1):
            dist.setup_logging(rank)
            logging.getLogger("accessory.somewhere").info("info %d", rank)
            logging.getLogger("accessory.somewhere").warning("warning %d", rank)
    finally:
        logger.handlers.clear()
        logger.setLevel(before[0])
    assert root.handlers == before[1]
    assert capsys.readouterr().err == "info 0\nwarning 0\n[rank 1] warning 1\n"


# ---- groups


def _sums(ranks: dist.Ranks, ones: torch.Tensor) -> tuple[dist.Shard, int, float, float, list[str], bool]:
    """What tp, dp and control groups say about who is in them."""
    tp, dp, names = ones * ranks.rank, ones * ranks.rank, [""] * ranks.shard.size
    torch.distributed.all_reduce(tp, group=ranks.tp_group)
    torch.distributed.all_reduce(dp, group=ranks.dp_group)
    if ranks.control is not None:
        torch.distributed.all_gather_object(names, f"rank {ranks.rank}", group=ranks.control)
    return ranks.shard, ranks.dp_rank, tp.item(), dp.item(), names, ranks.leader


def test_neighbours_form_a_tp_group_and_strides_a_dp_group():
    got = run_ranks(_sums, 4, torch.ones(1), tp=2)
    assert got == [
        (dist.Shard(0, 2), 0, 1.0, 2.0, ["rank 0", "rank 1"], True),
        (dist.Shard(1, 2), 0, 1.0, 4.0, ["rank 0", "rank 1"], False),
        (dist.Shard(0, 2), 1, 5.0, 2.0, ["rank 2", "rank 3"], True),
        (dist.Shard(1, 2), 1, 5.0, 4.0, ["rank 2", "rank 3"], False),
    ]


def test_pure_data_parallel_ranks_need_no_control_group():
    assert [got[:4] for got in run_ranks(_sums, 2, torch.ones(1), tp=1)] == [
        (dist.Shard(0, 1), 0, 0.0, 1.0),
        (dist.Shard(0, 1), 1, 1.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("mine", "others", "backend"),
    [("cpu", ["cpu"], "gloo"), ("cuda", ["host GPU-b"], "nccl"), ("cuda", ["host GPU-a"], "gloo")],
)
def test_ranks_that_share_a_gpu_meet_over_gloo(monkeypatch, caplog, mine: str, others: list[str], backend: str):
    monkeypatch.setattr(socket, "gethostname", lambda: "host")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))
    store = torch.distributed.HashStore()
    store.set("accessory/device/1", others[0])
    assert _backend(dist.Ranks(0, 2, 0, dist.Shard(0, 2), 0, 1, torch.device(mine)), store) == backend
    assert ("share 1 GPU" in caplog.text) == (mine == "cuda" and backend == "gloo")


def test_a_mixture_of_cpu_and_gpu_ranks_is_refused():
    store = torch.distributed.HashStore()
    store.set("accessory/device/1", "host GPU-a")
    with pytest.raises(ValueError, match="expected cpu on all ranks or a GPU on all"):
        _backend(dist.Ranks(0, 2, 0, dist.Shard(0, 2), 0, 1, torch.device("cpu")), store)


def _refused(ranks: dist.Ranks) -> str:
    """Joining a second time is a mistake of the caller."""
    try:
        dist.init(device="cpu")
    except RuntimeError as error:
        return str(error)
    return ""


def test_joining_twice_is_refused():
    assert "call dist.close first" in run_ranks(_refused, 2)[1]


def _fails(ranks: dist.Ranks) -> None:
    """Rank 1 raises while the others wait for it."""
    if ranks.rank == 1:
        raise KeyError("the first cause")
    torch.distributed.barrier()


def test_the_traceback_of_the_rank_that_failed_first_fails_the_test():
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2 raised.*the first cause"):
        run_ranks(_fails, 2)


def _dies(ranks: dist.Ranks) -> None:
    """Rank 0 vanishes without a word."""
    if ranks.rank == 0:
        os._exit(9)
    torch.distributed.barrier()


def test_a_rank_that_dies_fails_the_test():
    with pytest.raises(AssertionError, match="rank 0 died with exit code 9|rank 1 of 2 raised"):
        run_ranks(_dies, 2)


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: this port is in use"):
            dist.init(device="cpu", timeout=5)


def test_ranks_that_never_come_are_one_sentence_within_the_timeout(monkeypatch, tmp_path):
    for name, value in dict(RANK="0", WORLD_SIZE="2", ACCESSORY_STORE=str(tmp_path / "store")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="rank 0 could not meet the 2 ranks of this job"):
        dist.init(device="cpu", timeout=0.2)


# ---- a leader that starts its own ranks; these scripts need no torch


def test_launching_contradicts_neither_the_launcher_nor_sense(monkeypatch):
    dist.launch(1)
    with pytest.raises(ValueError, match="got 0"):
        dist.launch(0)
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    dist.launch(2)
    with pytest.raises(ValueError, match="got 4 in a job of 2"):
        dist.launch(4)


def test_a_killed_follower_ends_the_job_non_zero_and_leaves_no_process(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, LAUNCHED)])
    one, two = followers(leader, count=2)
    os.kill(one, signal.SIGKILL)
    out, err = leader.communicate(timeout=20)
    assert leader.returncode == 1
    assert out in ("answer\n", "")
    assert "was killed by SIGKILL before the work was done" in err and err.count("error:") == 1
    assert gone(one) and gone(two)


def test_followers_die_with_a_killed_leader(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, LAUNCHED)], TMPDIR=str(tmp_path))
    pids = followers(leader, count=2)
    leader.kill()
    leader.communicate(timeout=20)
    assert all(gone(pid) for pid in pids)


def test_a_leader_that_returns_takes_its_followers_along(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, LAUNCHED), "leave"], TMPDIR=str(tmp_path))
    out, _ = leader.communicate(timeout=20)
    assert (leader.returncode, out) == (0, "answer\n")
    assert not list(tmp_path.glob("accessory-*")), "the meeting place was left behind"


def test_a_followers_own_error_is_shown_and_ends_the_job(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, LAUNCHED), "fail"])
    pids = followers(leader, count=2)
    _, err = leader.communicate(timeout=20)
    assert leader.returncode == 1
    assert err.splitlines() == [
        "accessory: error: rank 2: wrong input on purpose",
        "accessory: error: rank 2 ended with exit code 1 before the work was done",
    ]
    assert all(gone(pid) for pid in pids)


def test_an_error_that_all_ranks_share_is_said_once(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, LAUNCHED), "refuse"])
    _, err = leader.communicate(timeout=20)
    assert leader.returncode == 1
    assert [line for line in err.splitlines() if "error" in line] == ["accessory: error: no such folder"]


def test_an_interrupt_from_the_terminal_reaches_the_leader_alone(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, LAUNCHED)])
    pids = followers(leader, count=2)
    assert all(os.getpgid(pid) != os.getpgid(leader.pid) for pid in pids)
    leader.send_signal(signal.SIGINT)
    _, err = leader.communicate(timeout=20)
    assert (leader.returncode, "Traceback" in err) == (130, False)
    assert all(gone(pid) for pid in pids)


RAW = """
import os, signal, sys, termios
from accessory import dist

dist.launch(2)
if os.environ["RANK"] == "0":
    raw = termios.tcgetattr(0)
    raw[3] &= ~(termios.ISIG | termios.ECHO)
    termios.tcsetattr(0, termios.TCSANOW, raw)
    print("raw", flush=True)
else:
    os.write(1, f"follower 1 {os.getpid()}\\n".encode())
signal.pause()
"""


def test_the_terminal_is_restored_when_a_follower_dies(start, tmp_path):
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    leader = start([sys.executable, script(tmp_path, RAW)], stdin=theirs)
    (pid,) = followers(leader, count=1)
    assert leader.stdout is not None and leader.stdout.readline() == "raw\n"
    assert termios.tcgetattr(theirs) != before
    os.kill(pid, signal.SIGKILL)
    leader.communicate(timeout=20)
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


# ---- whole jobs


def test_a_launched_job_computes_and_stdout_carries_the_answer_alone(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, JOB), "launch"])
    out, err = leader.communicate(timeout=120)
    assert (leader.returncode, out) == (0, "sum 3\n"), err
    assert err == "2 ranks: tp 2 x dp 1, gloo over cpu\n"


def test_a_rank_killed_in_a_launched_job_ends_it_with_one_sentence(start, tmp_path):
    leader = start([sys.executable, script(tmp_path, JOB), "launch", "die"])
    out, err = leader.communicate(timeout=120)
    assert (leader.returncode, out) == (1, "sum 3\n")
    errors = [line for line in err.splitlines() if "error" in line]
    assert errors == ["accessory: error: rank 1 was killed by SIGKILL before the work was done"]


def test_a_rank_killed_under_torchrun_ends_the_job_non_zero(start, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = start([*torchrun, script(tmp_path, JOB), "die"])
    out, err = job.communicate(timeout=120)
    assert (job.returncode, out) == (1, "sum 3\n"), err
    assert "accessory: error: another rank of this job ended" in err


def test_an_srun_job_meets_through_slurms_variables(start, tmp_path):
    shared = dict(SLURM_NTASKS="2", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="localhost", MASTER_PORT=free_port())
    path = script(tmp_path, JOB)
    tasks = [start([sys.executable, path], SLURM_PROCID=rank, SLURM_LOCALID=rank, **shared) for rank in "01"]
    ends = [(*task.communicate(timeout=120), task.returncode) for task in tasks]
    assert [(out, code) for out, _, code in ends] == [("sum 3\n", 0), ("", 0)], ends
    assert "waiting for the 2 tasks of srun at tcp://localhost:" in ends[0][1]

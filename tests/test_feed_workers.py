"""Jobs in other processes: order, errors, deaths, hangs, and an end that leaves nothing behind.

Must not know data.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from accessory.data.feed.workers import Workers


def make(slow: float = 0.0):
    """A handler of jobs for these tests."""

    def handle(job):
        if job == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "leave":
            os._exit(3)
        if job == "hang":
            time.sleep(60)
        if job == "slow":
            time.sleep(1)
            job = 1
        if job == "wrong":
            raise ValueError("got wrong, expected right")
        if job == "gone":
            raise FileNotFoundError("no such thing")
        if job == "bug":
            raise KeyError("a bug")
        time.sleep(slow * (job % 3))
        return job * job

    return handle


def run(items, count: int, *, slow: float = 0.0, patience: float = 60.0):
    with Workers(make, (slow,), count) as workers:
        workers.patience = patience
        return list(workers.map(items, lambda item: item, lambda item: f"item {item}"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_come_in_the_order_of_the_items(count):
    assert run(range(20), count, slow=0.002) == [(number, number * number) for number in range(20)]


def test_items_without_a_job_keep_their_turn_and_need_no_process():
    with Workers(make, (0.0,), 2) as workers:
        found = list(workers.map([1, 2, 3], lambda item: None))
        assert found == [(1, None), (2, None), (3, None)] and not multiprocessing.active_children()
        assert list(workers.map([1, 2, 3], lambda item: item if item == 2 else None))[1] == (2, 4)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(("job", "kind"), [("wrong", ValueError), ("gone", FileNotFoundError)])
def test_an_error_comes_in_its_turn_as_what_it_is(count, job, kind):
    with Workers(make, (0.0,), count) as workers:
        walk = workers.map([1, 2, job, 3], lambda item: item)
        assert [next(walk), next(walk)] == [(1, 1), (2, 4)]
        with pytest.raises(kind):
            next(walk)


def test_a_bug_brings_its_traceback():
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        run([1, "bug"], 1)


@pytest.mark.parametrize(("job", "how"), [("die", "signal 9 .Killed."), ("leave", "exit code 3")])
def test_a_worker_that_dies_is_an_error_that_names_its_item(job, how):
    with pytest.raises(ChildProcessError, match=f"a worker died with {how} on item {job}"):
        run([1, job, 2], 1)


def test_a_worker_that_hangs_is_an_error_that_names_its_item():
    with pytest.raises(TimeoutError, match="no answer for 1 seconds on item hang"):
        run(["hang"], 1, patience=1.0)


def test_leaving_ends_the_processes_also_in_the_middle_of_a_job():
    begin = time.monotonic()
    with Workers(make, (0.0,), 2) as workers:
        walk = workers.map(["hang", "hang"], lambda item: item)
        walk.close()
        list(workers._hire())
    assert not multiprocessing.active_children() and time.monotonic() - begin < 20


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from accessory.data.feed.workers import Workers
from test_feed_workers import make
workers = Workers(make, (0.0,), 2)
walk = workers.map([1, 2, {job!r}, {job!r}], lambda item: item)
next(walk)
print("ready", *[process.pid for process, _ in workers._crew], flush=True)
{then}
"""


def gone(pids: list[str]) -> bool:
    """Whether processes end within some seconds."""
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid: str) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("end", ["SIGINT", "SIGKILL", "exit"])
def test_no_process_outlives_the_one_that_hired_it(end):
    then = "sys.exit(0)" if end == "exit" else "next(walk); next(walk)"
    job = "slow" if end == "SIGKILL" else "hang"  # whoever works notices at the end of its job
    script = SCRIPT.format(tests=os.path.dirname(__file__), then=then, job=job)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _, *pids = process.stdout.readline().split()
    if end != "exit":
        for pid in pids if end == "SIGINT" else []:  # a terminal sends it to all of them
            os.kill(int(pid), signal.SIGINT)
        process.send_signal(getattr(signal, end))
    _, errors = process.communicate(timeout=30)
    assert len(pids) == 2 and gone(pids)
    assert end != "SIGINT" or errors.strip().endswith("KeyboardInterrupt") and errors.count("Traceback") == 1

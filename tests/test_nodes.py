"""NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE: one command on each host, whose ranks meet.

Must not need a second host: two commands on this one stand for two.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import command, defaults, environment, log_of, sums

from accessory.dist.place import Nodes, read_nodes, read_nproc
from accessory.train.dry import describe
from accessory.train.settings import Settings

MASTER = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK = """
import json, os, sys
from accessory.dist.crew import launch
from accessory.dist.place import Nodes
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCESSORY_STORE")
write = "import json, os; print(json.dumps({name: os.environ.get(name) for name in %r}))" % (names,)
launch(3, argv=[sys.executable, "-c", write], nodes=Nodes(2, 1))
from accessory.dist import crew
crew.closing()
print(json.dumps({name: os.environ.get(name) for name in names}), file=sys.stderr)
crew.dismiss()
"""


def free_port() -> str:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


def test_without_nnodes_there_is_one_host():
    assert read_nodes({}) == Nodes() and read_nodes({"NNODES": "1"}) == Nodes()


def test_a_host_knows_its_number():
    assert read_nodes(MASTER) == Nodes(2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"NODE_RANK": ""}, "NODE_RANK: not set beside NNODES=2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: not set"),
        ({"NODE_RANK": "2"}, "NODE_RANK: got 2"),
        ({"NNODES": "two"}, "NNODES: got 'two'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000"),
    ],
)
def test_what_cannot_be_is_one_sentence(change, said):
    with pytest.raises(ValueError, match=said):
        read_nodes({**MASTER, **change})


@pytest.mark.parametrize(("told", "count"), [("", None), ("gpu", None), ("4", 4)])
def test_nproc_per_node_is_obeyed(told, count):
    assert read_nproc({"NPROC_PER_NODE": told}) == count


@pytest.mark.parametrize("told", ["0", "four"])
def test_an_nproc_per_node_that_is_none_is_refused(told):
    with pytest.raises(ValueError, match="NPROC_PER_NODE: got"):
        read_nproc({"NPROC_PER_NODE": told})


def test_the_ranks_of_the_second_host_follow_those_of_the_first():
    env = {name: value for name, value in environment().items() if name not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run([sys.executable, "-c", RANK], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    places = sorted((json.loads(line) for line in ended.stderr.splitlines()), key=lambda place: place["RANK"])
    assert [place["RANK"] for place in places] == ["3", "4", "5"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1", "2"]
    assert {(place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"]) for place in places} == {("6", "3")}
    assert {place["ACCESSORY_STORE"] for place in places} == {None}


def test_one_command_on_each_of_two_hosts_is_one_run(tmp_path: Path):
    settings = {"dataset": sums(tmp_path, 8), "max_steps": 2, "save_steps": 0, "cutoff_len": 64, "precision": "fp32"}
    settings |= {"finetuning_type": "norm_bias", "per_device_train_batch_size": 1}
    port, hosts = free_port(), []
    for number in (0, 1):
        told = {**MASTER, "NODE_RANK": str(number), "MASTER_PORT": port, "NPROC_PER_NODE": "1", "FORCE_TORCHRUN": "1"}
        env = environment(GLOO_SOCKET_IFNAME="lo", **told)
        line = command(**defaults(tmp_path), output_dir=tmp_path / "two", **settings)
        hosts.append(subprocess.Popen(line, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
    said = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    assert "the trained model, after 2 steps" in said[0] and "the trained model" not in said[1]
    assert len(log_of(tmp_path / "two")) == 2


def test_a_dry_run_counts_the_ranks_of_all_hosts(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**MASTER, "NPROC_PER_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert "ranks   8 on" in describe(Settings(dry_run=True, shape="7b"))

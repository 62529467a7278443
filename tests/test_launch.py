"""exps/launch.sh and the sbatch files: which launcher they choose, and what becomes of words, signals and exit codes.

Must not need SLURM or a GPU: python, srun and scontrol are stubs that write down what they were given. Only one test,
a slow one, trains.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALPACA = ROOT / "exps/finetune/sg/alpaca.sh"
CONFIG = str(ROOT / "configs/train/finetune/sg/alpaca.yaml")
TRAIN = ["-m", "accessory", "train", CONFIG]
OURS = (
    "SLURM",
    "RANK",
    "WORLD_SIZE",
    "NNODES",
    "NODE_RANK",
    "MASTER",
    "NPROC",
    "LAUNCHER",
    "PYTHON",
    "DATA",
    "REQUEUE",
)

Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str, str], None]:
    """Makes an executable in tmp_path/bin that writes its words to <name>.words, one a line, then runs `body`."""
    (tmp_path / "bin").mkdir()

    def make(name: str, body: str = "") -> None:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"{tmp_path}/{name}.words"\n{body}\n')
        path.chmod(0o755)

    for name in ("python", "srun", "scontrol"):
        make(name)
    return make


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**env, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **more}


@pytest.fixture
def launch(stub: Callable[[str, str], None], tmp_path: Path) -> Launch:
    """Runs a script among the stubs, in tmp_path."""

    def run(*words: str | Path, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", *map(str, words)]
        where = environment(tmp_path, **env)
        return subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, timeout=60, check=False)

    return run


def words(tmp_path: Path, name: str = "python") -> list[str]:
    path = tmp_path / f"{name}.words"
    return path.read_text().splitlines() if path.exists() else []


def test_on_one_node_the_verb_starts_its_ranks_itself(launch: Launch, tmp_path: Path):
    assert launch(ALPACA).returncode == 0
    assert words(tmp_path) == [*TRAIN, "--output_dir=output/alpaca"]
    launch(ALPACA, NPROC_PER_NODE="4")
    assert words(tmp_path)[-1] == "--nproc_per_node=4"


def test_words_with_spaces_stars_and_quotes_arrive_as_they_were(launch: Launch, tmp_path: Path):
    given = [
        "PRETRAINED=my models/7b",
        "PRETRAINED=a delta",
        "TOKENIZER=a b.model",
        "OUTPUT=the output",
        "media_dir=p *'\"",
    ]
    assert launch(ALPACA, *given, "--learning_rate", "1e-5").returncode == 0
    expected = [
        "--output_dir=the output",
        "--model_name_or_path",
        "my models/7b",
        "a delta",
        "--tokenizer_path=a b.model",
    ]
    assert words(tmp_path) == [*TRAIN, *expected, "media_dir=p *'\"", "--learning_rate", "1e-5"]
    assert (tmp_path / "the output/output.log").exists()


@pytest.mark.parametrize("given", [["output_dir=there"], ["--output_dir", "there"], ["--output_dir=there"]])
def test_the_setting_output_dir_is_the_same_as_OUTPUT(launch: Launch, tmp_path: Path, given: list[str]):
    launch(ALPACA, *given)
    assert words(tmp_path)[-1] == "--output_dir=there" and (tmp_path / "there/output.log").exists()


def test_data_and_the_checkout_reach_python_by_the_environment(launch: Launch, stub, tmp_path: Path):
    stub("python", 'echo "data $DATA, path ${PYTHONPATH%%:*}"')
    assert f"data data, path {ROOT}\n" in launch(ALPACA).stdout
    assert "data there," in launch(ALPACA, DATA="there").stdout
    assert "data my data," in launch(ALPACA, "DATA=my data", DATA="there").stdout
    stub("other", "echo the other python")
    assert "the other python" in launch(ALPACA, PYTHON="other").stdout


def test_several_nodes_are_torchruns_with_the_port_that_was_given(launch: Launch, tmp_path: Path):
    nodes = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "12345"}
    assert launch(ALPACA, **nodes).returncode == 0
    place = ["--nnodes=4", "--node-rank=2", "--master-addr=node0", "--master-port=12345", "--nproc-per-node=gpu"]
    assert words(tmp_path) == ["-m", "torch.distributed.run", *place, *TRAIN, "--output_dir=output/alpaca"]
    assert (tmp_path / "output/alpaca/output-2.log").exists(), "one log per node"
    for name in list(nodes)[1:]:
        ended = launch(ALPACA, **{key: value for key, value in nodes.items() if key != name})
        assert ended.returncode == 2 and f"{name}: not set" in ended.stderr and ended.stderr.count("\n") == 1


def test_torchrun_on_one_node_takes_a_port_of_its_own(launch: Launch, tmp_path: Path):
    launch(ALPACA, LAUNCHER="torchrun", NPROC_PER_NODE="2")
    assert words(tmp_path)[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_a_slurm_allocation_is_sruns(launch: Launch, tmp_path: Path):
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert launch(ALPACA, SLURM_CPUS_PER_TASK="6", **batch).returncode == 0
    head = ["--kill-on-bad-exit=1", "--cpus-per-task=6", "python"]
    assert words(tmp_path, "srun") == [*head, *TRAIN, "--output_dir=output/alpaca"]
    interactive = {**batch, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    launch(ALPACA, "max_steps=3", **interactive)
    assert words(tmp_path, "srun")[-1] == "max_steps=3", "the shell of salloc is no step to stay in"


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"},
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"RANK": "1", "WORLD_SIZE": "2"},
    ],
    ids=["a task of srun", "srun --pty", "a rank of torchrun"],
)
def test_inside_somebodys_ranks_nothing_is_started_twice(launch: Launch, tmp_path: Path, env: dict[str, str]):
    assert launch(ALPACA, **env).returncode == 0
    assert words(tmp_path)[:3] == TRAIN[:3] and not words(tmp_path, "srun")


def test_a_dry_run_starts_one_process_and_leaves_nothing(launch: Launch, stub, tmp_path: Path):
    stub("python", "exit 9")
    for given in ("dry_run=true", "--dry_run", "--dry_run=true"):
        assert launch(ALPACA, given, SLURM_JOB_ID="7").returncode == 9
        assert words(tmp_path) == [*TRAIN, "--output_dir=output/alpaca", given] and not words(tmp_path, "srun")
    assert not (tmp_path / "output").exists()


def test_the_exit_code_is_trainings_and_the_log_grows(launch: Launch, stub, tmp_path: Path):
    stub("python", "echo a line; echo an error >&2; exit 3")
    for _ in range(2):
        ended = launch(ALPACA)
        assert ended.returncode == 3 and "a line\nan error\n" in ended.stdout
    assert (tmp_path / "output/alpaca/output.log").read_text() == "a line\nan error\n" * 2
    assert [path.name for path in (tmp_path / "output/alpaca").iterdir()] == ["output.log"]


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_ID": "7"}, {"LAUNCHER": "torchrun"}], ids=["node", "srun", "torchrun"])
def test_what_rank_0_writes_down_is_the_exit_code(launch: Launch, stub, tmp_path: Path, env: dict[str, str]):
    for name in ("python", "srun"):
        stub(name, 'echo 75 >"$ACCESSORY_EXIT_FILE"; exit 0')
    assert launch(ALPACA, **env).returncode == 75
    assert [path.name for path in (tmp_path / "output/alpaca").iterdir()] == ["output.log"]


@pytest.mark.parametrize("name", ["7b", "13b", "70b"])
def test_a_batch_job_is_queued_again_at_75_and_at_nothing_else(launch: Launch, stub, tmp_path: Path, name: str):
    script, env = ROOT / f"exps/slurm/{name}.sbatch", {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    for code in (0, 1, 75):
        stub("srun", f"exit {code}")
        assert launch(script, ALPACA, "max_steps=3", **env).returncode == code
        assert words(tmp_path, "srun")[-1] == "max_steps=3"
        assert words(tmp_path, "scontrol") == (["requeue", "7"] if code == 75 else [])
    (tmp_path / "scontrol.words").unlink()
    assert launch(ALPACA, **env).returncode == 75 and not words(tmp_path, "scontrol"), "only sbatch files ask for it"
    stub("scontrol", "exit 1")
    ended = launch(script, ALPACA, **env)
    assert ended.returncode == 75 and "submit it again" in ended.stderr


@pytest.mark.parametrize("name", ["7b", "13b", "70b"])
def test_a_batch_file_without_a_recipe_says_what_it_wants(launch: Launch, tmp_path: Path, name: str):
    for given, code in (([], 2), (["max_steps=3"], 2), (["--help"], 0)):
        ended = launch(ROOT / f"exps/slurm/{name}.sbatch", *given)
        assert ended.returncode == code and f"usage: sbatch exps/slurm/{name}.sbatch exps/" in ended.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nothing"], "configs/train/nothing.yaml: no such recipe"),
        (["my.yaml"], "my.yaml: no such recipe"),
        (["finetune/sg/alpaca", "--output_dir"], "--output_dir: no value"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(launch: Launch, given: list[str], said: str):
    ended = launch(ROOT / "exps/launch.sh", *given)
    assert ended.returncode == 2 and said in ended.stderr and ended.stderr.count("\n") == 1


def test_an_unknown_launcher_is_said_in_a_line(launch: Launch):
    ended = launch(ALPACA, LAUNCHER="mpirun")
    assert ended.returncode == 2 and "LAUNCHER: got mpirun, expected node, torchrun" in ended.stderr


def test_a_yaml_of_ones_own_is_launched_too(launch: Launch, tmp_path: Path):
    (tmp_path / "my.yaml").write_text("max_steps: 3\n")
    assert launch(ROOT / "exps/launch.sh", "my.yaml").returncode == 0
    assert words(tmp_path) == ["-m", "accessory", "train", "my.yaml", "--output_dir=output/my"]
    assert "usage: launch.sh RECIPE|CONFIG.yaml" in launch(ROOT / "exps/launch.sh").stdout


RANK = """
hear() { echo "rank heard $1"; exit CODE; }
trap 'hear INT' INT; trap 'hear TERM' TERM; trap 'hear USR1' USR1
echo ready
for _ in {1..600}; do sleep 0.05; done  # a test that fails must leave nobody behind
"""
AGENT = """
trap 'echo agent heard TERM; exit 1' TERM
for rank in 0 1; do bash -c "$RANK_BODY" & done
wait; wait
exit 1
"""


def signalled(
    tmp_path: Path, number: int, *given: str, mark: str = "ready", ready: int = 1, **env: str
) -> tuple[int, str]:
    """Exit code and output of the alpaca script after a signal, sent once it has said the mark so many times."""
    command, where = ["bash", str(ALPACA), *given], environment(tmp_path, **env)
    process = subprocess.Popen(command, cwd=tmp_path, env=where, stdout=subprocess.PIPE, text=True)
    log, limit = tmp_path / "output/alpaca/output.log", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if log.exists() and log.read_text().count(mark) >= ready:
            break
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "heard", "env"),
    [
        (signal.SIGTERM, "TERM", {}),
        (signal.SIGUSR1, "USR1", {}),
        (signal.SIGHUP, "TERM", {}),
        (signal.SIGINT, "INT", {}),
        (signal.SIGTERM, "USR1", {"SLURM_JOB_ID": "7"}),
        (signal.SIGUSR1, "USR1", {"SLURM_JOB_ID": "7"}),
    ],
)
def test_signals_reach_the_ranks_and_their_answer_counts(stub, tmp_path: Path, number: int, heard: str, env: dict):
    for name in ("python", "srun"):
        stub(name, RANK.replace("CODE", "75"))
    code, said = signalled(tmp_path, number, **env)
    assert code == 75 and f"rank heard {heard}" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchruns_ranks_are_asked_past_torchrun(stub, tmp_path: Path, number: int):
    stub("python", AGENT)
    body = RANK.replace("exit CODE", 'echo 75 >"$ACCESSORY_EXIT_FILE"; exit 0')
    code, said = signalled(tmp_path, number, ready=2, LAUNCHER="torchrun", RANK_BODY=body)
    assert said.count("rank heard USR1") == 2 and "agent heard" not in said and code == 75


@pytest.mark.parametrize(
    ("env", "rank", "code"),
    [
        ({}, 0, 75),
        ({"ACCESSORY_STORE": "a file"}, 1, 0),
        ({"ACCESSORY_EXIT_FILE": "note"}, 0, 0),
        ({"ACCESSORY_EXIT_FILE": "note"}, 8, 0),
    ],
    ids=["alone", "a follower", "told where to write", "the first of another node"],
)
def test_a_rank_ends_with_a_code_that_its_parent_understands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], rank: int, code: int
):
    from accessory.train.main import _exit_code

    monkeypatch.chdir(tmp_path)
    for name in ("ACCESSORY_EXIT_FILE", "ACCESSORY_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert _exit_code(75, rank=rank, local_rank=rank % 8) == code
    assert [path.read_text() for path in tmp_path.iterdir()] == ["75"] * ("ACCESSORY_EXIT_FILE" in env)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["node", "torchrun"])
def test_a_recipe_trains_on_two_ranks_stops_at_a_signal_and_goes_on(tmp_path: Path, launcher: str):
    rows = [{"instruction": f"Say {number}.", "output": f"{number} it is"} for number in range(64)]
    (tmp_path / "alpaca_gpt4_data.json").write_text(json.dumps(rows))
    small = ["cutoff_len=128", "max_seq_len=512", "gradient_accumulation_steps=1", "max_steps=100000", "save_steps=0"]
    given = [f"PRETRAINED={ROOT / 'accessory/tiny'}", "DATA=.", *small, "device=cpu", "plot_loss=false"]
    env = {"PYTHON": sys.executable, "LAUNCHER": launcher, "NPROC_PER_NODE": "2"}
    for turn, number in enumerate((signal.SIGTERM, signal.SIGUSR1), start=1):
        code, said = signalled(tmp_path, number, *given, mark="\nstep ", ready=turn, **env)
        assert code == 75, said
        assert "stopped by a signal" in said and ("going on from" in said) == (turn == 2), said
    kept = {path.name for path in (tmp_path / "output/alpaca").iterdir()}
    assert "output.log" in kept and not any(name.startswith((".exit", "previous")) for name in kept)

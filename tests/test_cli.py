"""Tests of the console command and of the guard: what they print where, and the exit codes.

Must not need a model; verbs here are stand-ins.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest

import accessory
from accessory import cli


def raises(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.fixture
def verb(monkeypatch):
    """A stand-in verb `try`, whose main returns the number of its arguments, or fails."""
    module = ModuleType("stand_in")
    module.main = lambda argv: len(argv) if argv != ["fail"] else raises(ValueError("not like this"))()
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(cli.VERBS, "try", ("stand_in", "a stand-in"))


def test_the_help_names_every_verb_and_needs_neither_torch_nor_half_a_second():
    code = "import sys; from accessory.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - began)
        assert ended.returncode == 0, "the help imported torch"
        assert all(f"  {name} " in ended.stdout for name in cli.VERBS)
    assert min(times) < 0.5, times


def test_python_dash_m_is_the_console_command():
    ended = subprocess.run(
        [sys.executable, "-m", "accessory", "--version"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, f"accessory {accessory.__version__}\n")


def test_a_verb_gets_the_arguments_after_it_and_gives_the_exit_code(verb):
    assert cli.main(["try"]) == 0
    assert cli.main(["try", "c.yaml", "key=value"]) == 2


def test_a_verbs_error_is_one_line(verb, capsys):
    assert cli.main(["try", "fail"]) == 1
    assert capsys.readouterr().err == "accessory: error: not like this\n"


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["inspct", "x"]) == 2
    assert capsys.readouterr().err == "accessory: error: unknown verb 'inspct'; did you mean 'inspect'?\n"
    assert cli.main(["zzz"]) == 2
    assert "expected one of train, infer" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_a_module_with_a_main(name: str):
    assert find_spec(cli.VERBS[name][0]) is not None
    assert callable(import_module(cli.VERBS[name][0]).main)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a: got 1,\nexpected 2"), "a: got 1, expected 2"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "x.png: No such file or directory"),
        (PermissionError("no right to write there"), "no right to write there"),
        (ModuleNotFoundError("No module named 'gradio'"), "No module named 'gradio'"),
    ],
)
def test_what_a_user_can_mend_is_one_line_without_traceback(capsys, error: Exception, said: str):
    assert cli.guard(raises(error)) == 1
    assert capsys.readouterr().err == f"accessory: error: {said}\n"


def test_a_bug_shows_its_traceback(capsys):
    assert cli.guard(raises(KeyError("layer"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("accessory: error: unexpected KeyError: 'layer'\n")


def test_debugging_shows_every_traceback(capsys, monkeypatch):
    monkeypatch.setenv("ACCESSORY_DEBUG", "1")
    assert cli.guard(raises(ValueError("wrong"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_lost_rank_is_one_line_and_an_ordinary_runtime_error_is_not_one(capsys):
    import_module("torch")
    gone = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert cli.guard(raises(gone)) == 1
    assert capsys.readouterr().err.startswith("accessory: error: another rank of this job ended")
    assert cli.guard(raises(RuntimeError("shape mismatch"))) == 1
    assert "unexpected RuntimeError" in capsys.readouterr().err


def test_an_interrupt_is_130_without_a_word(capsys, monkeypatch):
    set_to = []
    monkeypatch.setattr(cli.signal, "signal", lambda *how: set_to.append(how))
    assert cli.guard(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "" and set_to == [(signal.SIGINT, signal.SIG_DFL)]


def test_a_second_interrupt_is_no_traceback_either(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, signal, sys\nfrom accessory.cli import guard\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.exit(guard(lambda: os.kill(os.getpid(), signal.SIGINT)))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom accessory.cli import guard\nsys.exit(guard(lambda: print('x' * 10**6)))\n")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_ranks_own_error_carries_its_number(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert cli.guard(raises(ValueError("mine alone"))) == 1
    assert capsys.readouterr().err == "accessory: error: rank 3: mine alone\n"


def test_the_face_names_its_rooms_and_refuses_other_names():
    assert "Llama" in dir(accessory)
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        _ = accessory.Lama


@pytest.mark.parametrize("name", accessory.__all__)
def test_the_face_hands_every_name_on(name: str):
    assert getattr(accessory, name) is not None


def test_importing_the_face_imports_no_room():
    code = "import sys, accessory; sys.exit(any(name.startswith('accessory.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

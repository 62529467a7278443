"""The laws of the house, read off the sources: floors, sizes, words, annotations.

Must not import what it judges; a law that cannot be checked from the syntax tree does not belong here.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "accessory").rglob("*.py"))
SCRIPTS = sorted(path for name in ("demos", "tools", "exps") for path in (ROOT / name).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*LIBRARY, *SCRIPTS]}

FLOORS = [
    {"config", "dialect", "dist", "metrics", "native"},
    {"model", "vision", "checkpoint", "data"},
    {"peft", "quant", "release"},
    {"assemble"},
    {"engine"},
    {"export"},
    {"train", "serve", "eval", "inspect", "calibrate"},
    {"bench", "face"},
    {"cli", "__init__"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAY_PRINT = {"cli", "serve", "inspect", "bench"}
FILE_LINES, FUNCTION_LINES = 400, 60


def room(path: Path) -> str:
    """The room a library file belongs to."""
    return path.relative_to(ROOT / "accessory").parts[0].removesuffix(".py")


def seen(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package in a file: lazy ones, relative ones, and names in strings."""
    package = ["accessory", *path.relative_to(ROOT / "accessory").parts[:-1]]
    for node in ast.walk(TREES[path]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base] if base != "accessory" else [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"accessory(\.[a-z_]\w*)+", node.value) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "accessory" and parts[1:] != ["__version__"]:
                yield node.lineno, parts[1] if len(parts) > 1 else "__init__"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def low_imports(path: Path) -> Iterator[str]:
    here = room(path)
    if here not in FLOOR:
        yield f"1: {here} is not on the map of rooms"
        return
    for line, other in seen(path):
        if other not in FLOOR:
            yield f"{line}: {other} is not a room (the library imports from rooms, not through the package face)"
        elif other != here and FLOOR[other] >= FLOOR[here]:
            yield f"{line}: {here} (floor {FLOOR[here]}) imports {other} (floor {FLOOR[other]})"


def long_files(path: Path) -> Iterator[str]:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > FILE_LINES:
        yield f"1: {lines} lines, at most {FILE_LINES}"


def long_functions(path: Path) -> Iterator[str]:
    for node in functions(path):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"


def missing_annotations(path: Path) -> Iterator[str]:
    for node in functions(path):
        spec = node.args
        given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
        bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
        if node.returns is None:
            bare.append("its result")
        if bare:
            yield f"{node.lineno}: {node.name} lacks types on {', '.join(bare)}"


def missing_room_sentences(path: Path) -> Iterator[str]:
    text = ast.get_docstring(TREES[path]) or ""
    if len(re.findall(r"[.:;?!](?:\s|$)", text)) < 2:
        yield "1: the module docstring says what this is, and then what it must not know"


def prints(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if room(path) not in MAY_PRINT:
                yield f"{node.lineno}: print; use the module's log"


def bare_excepts(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: except without a type"


def silent_errors(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield f"{node.lineno}: assert without a message"
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = isinstance(node.exc, ast.Call)
            words = [*node.exc.args, *node.exc.keywords] if isinstance(node.exc, ast.Call) else []
            thrown = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            is_class = isinstance(thrown, ast.Name) and thrown.id[0].isupper()
            if (called or is_class) and not words:
                yield f"{node.lineno}: raise without a message"


def unfinished(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.isascii():
            yield f"{number}: a character beyond ASCII; write it as an escape"
        if re.search(r"\bTO" + r"DO\b|NotImplemented" + r"Error|\bFIX" + r"ME\b", line):
            yield f"{number}: unfinished work"


@pytest.mark.parametrize(
    ("law", "paths"),
    [
        (low_imports, LIBRARY),
        (missing_room_sentences, LIBRARY),
        (prints, LIBRARY),
        (missing_annotations, [*LIBRARY, *SCRIPTS]),
        (long_files, [*LIBRARY, *SCRIPTS]),
        (long_functions, [*LIBRARY, *SCRIPTS]),
        (bare_excepts, [*LIBRARY, *SCRIPTS]),
        (silent_errors, [*LIBRARY, *SCRIPTS]),
        (unfinished, [*LIBRARY, *SCRIPTS]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_house_keeps_its_law(law: Callable[[Path], Iterator[str]], paths: list[Path]):
    offenders = [f"{path.relative_to(ROOT)}:{fault}" for path in paths for fault in law(path)]
    assert not offenders, "\n".join(["", *offenders])


@pytest.mark.parametrize(
    ("path", "source", "faults"),
    [
        ("model/x.py", "from accessory.dist import Shard", 0),
        ("model/x.py", "from accessory.model.rope import angles\nfrom .cache import Cache", 0),
        ("model/x.py", "from accessory import data", 1),
        ("model/x.py", "def f():\n    from accessory.engine import Engine", 1),
        ("model/x.py", "from ..vision import tower", 1),
        ("model/x.py", "import_module('accessory.vision.tower')", 1),
        ("engine/x.py", "from accessory import Llama", 1),
        ("helpers/x.py", "import os", 1),
    ],
)
def test_the_floors_law_sees_every_kind_of_import(monkeypatch, path: str, source: str, faults: int):
    file = ROOT / "accessory" / path
    monkeypatch.setitem(TREES, file, ast.parse(source))
    assert len(list(low_imports(file))) == faults


def test_the_lock_names_every_dependency_plainly():
    lock = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lock if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lock}
    named = re.findall(r'^    "([\w-]+)[<>=]+[\d.]+",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(named) > 15 and {name.replace("_", "-") for name in named} <= locked


def test_without_a_python_the_environment_asks_for_one(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    command = [str(tmp_path / "bash"), str(ROOT / ".ci" / "env")]
    ended = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "install python3.11" in ended.stderr

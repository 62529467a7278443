"""The verbs as functions: settings in, a dictionary of results out, as ms-swift's sft_main and its siblings have it.

Must not know what a verb does: it hands settings over and reads what was left.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from accessory.config import parse
from accessory.dialect.translate import translator

_VERB = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told['path'];"
    " from accessory.cli import main; sys.exit(main(told['argv']))"
)


class Arguments:
    """Words of a verb in the dialect of a tool: `SftArguments(model_type=..., dataset=[...])`."""

    def __init__(self, dialect: str = "swift", **words: Any) -> None:
        self.words: dict[str, Any] = {"dialect": dialect, **words}

    def __repr__(self) -> str:
        return f"Arguments({', '.join(f'{name}={value!r}' for name, value in self.words.items())})"


SftArguments = partial(Arguments, "swift")
InferArguments = partial(Arguments, "swift")
ExportArguments = partial(Arguments, "swift")


def sft_main(args: Any) -> dict[str, Any]:
    """Train, in a process of its own; what the run left.

    args: Arguments, a mapping of words, a list as on a command line, or the settings' dataclass. The result has
    output_dir, last_model_checkpoint, best_model_checkpoint, best_metric, global_step, log_history, and what
    all_results.json says. Raises ValueError where the run ended with an error, which it said on stderr.
    """
    began = time.time()
    with _argv(args) as argv:
        done = subprocess.run([sys.executable, "-c", _VERB, _told("train", argv)], check=False)
        if done.returncode:
            raise ValueError(f"train: ended with exit code {done.returncode}, expected 0; its reason stands above")
        return _left(_output(argv), began)


def infer_main(args: Any) -> dict[str, Any]:
    """Answer a dataset or a person; {"result": records, "result_path": their file or None}. Raises as the verb does."""
    from accessory.serve.infer import run
    from accessory.serve.infer_settings import InferSettings

    with _argv(args) as argv:
        settings = parse(InferSettings, argv, prog="infer", translate=translator("infer"))
        done = run(settings, argv=[sys.executable, "-c", _VERB, _told("infer", argv)])
        return {"result": done.records, "result_path": done.path}


def export_main(args: Any) -> dict[str, Any]:
    """Merge or convert a model; {"export_dir": the folder}. Raises as the verb does."""
    from accessory.export.main import main
    from accessory.export.settings import ExportSettings

    with _argv(args) as argv:
        main(argv)
        return {"export_dir": parse(ExportSettings, argv, translate=translator("export", say=False)).export_dir}


def merge_lora_main(args: Any) -> dict[str, Any]:
    """An export that merges the adapter of a checkpoint. Raises as `export_main` does."""
    words = args.words if isinstance(args, Arguments) else args
    if isinstance(words, Mapping):
        return export_main({**words, "merge_lora": True})
    return export_main([*args, "--merge_lora", "true"])


@contextmanager
def _argv(args: Any) -> Iterator[list[str]]:
    """The command line that says `args`: a file that lives as long as the verb."""
    if isinstance(args, Sequence) and not isinstance(args, str):
        yield [str(each) for each in args]
        return
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        args = {**dataclasses.asdict(args), "dialect": "accessory"}
    words = args.words if isinstance(args, Arguments) else args
    if not isinstance(words, Mapping):
        raise ValueError(f"arguments: got {args!r:.60}, expected Arguments, a mapping of words or a list of flags")
    with tempfile.TemporaryDirectory(prefix="accessory-") as folder:
        file = Path(folder) / "words.yaml"
        file.write_text(yaml.safe_dump(_plain(dict(words)), allow_unicode=True), encoding="utf-8")
        yield [str(file)]


def _told(verb: str, argv: Sequence[str]) -> str:
    """What a process of ours is told: where to import from, and its command line."""
    return json.dumps({"path": sys.path, "argv": [verb, *argv]})


def _plain(value: Any) -> Any:
    """Values that YAML can write."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value).removeprefix("torch.")


def _output(argv: Sequence[str]) -> Path:
    """The folder that a training run was told to write to."""
    from accessory.train.settings import Settings

    settings = parse(Settings, list(argv), prog="train", translate=translator("train", say=False))
    return Path(settings.output_dir)


def _left(output: Path, began: float) -> dict[str, Any]:
    """What a run that began then left below a folder, in numbers."""
    notes = [file for file in output.rglob("train.yaml") if file.stat().st_mtime >= began - 1]
    folder = max(notes, key=lambda file: file.stat().st_mtime).parent if notes else output
    found = sorted(folder.glob("checkpoint-*"), key=_step)
    found = [path for path in found if _step(path) >= 0]
    facts = _json(found[-1] / "facts.json") if found else {}
    best = facts.get("best") or {}
    log = next((folder / name for name in ("logging.jsonl", "trainer_log.jsonl") if (folder / name).is_file()), None)
    lines = [] if log is None else [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]
    told = lines.pop() if lines and "log_history" in lines[-1] else {}
    results = {**_json(folder / "all_results.json"), **told}
    return {
        **results,
        "output_dir": str(folder),
        "last_model_checkpoint": str(found[-1]) if found else None,
        "best_model_checkpoint": str(folder / f"checkpoint-{best['step']}") if best.get("step") else None,
        "best_metric": best.get("loss"),
        "global_step": _step(found[-1]) if found else 0,
        "log_history": lines,
    }


def _step(path: Path) -> int:
    """The number of a checkpoint; -1 for a folder that is none."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

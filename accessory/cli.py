"""The console command `accessory VERB [config.yaml] [key=value ...]`, and the guard that every script runs under.

Must not import a verb, torch or any other room before its verb was named: the help answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from accessory import __version__

VERBS: dict[str, tuple[str, str]] = {  # verb: (module with a main(argv), one line of help)
    "train": ("accessory.train.main", "train a model: pretraining, finetuning of all or few parameters, with pictures"),
    "infer": ("accessory.serve.infer", "ask a model in a terminal, or let it answer a dataset"),
    "predict": ("accessory.serve.predict", "answer a dataset, score the answers, and keep both"),
    "chat": ("accessory.serve.chat", "a conversation in a terminal or through a pipe"),
    "webchat": ("accessory.serve.web.main", "a conversation in a browser, for several people at once"),
    "api": ("accessory.serve.api.main", "serve a model to programs, through OpenAI's interface"),
    "export": ("accessory.export", "merge, convert, write and verify a model's folder"),
    "inspect": ("accessory.inspect", "print what a checkpoint folder holds, and verify it"),
    "bench": ("accessory.bench", "measure decode, prefill, loading, training and serving, beside a peer"),
}

# What only --dry_run answers (the words are accessory.dialect's), and how other tools call our verbs. "quantise" is an
# export with a number of bits. Written here so that the help imports nothing.
LATER = ("eval", "webui", "quantise")
ALIASES = {
    "sft": "train",
    "merge_lora": "export",
    "app_ui": "webchat",
    "web_ui": "webui",
    "deploy": "api",
}
MANY = ("train", "export")  # verbs whose words may ask for another one

# How gloo says that another rank is gone: its exceptions are plain RuntimeErrors.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "timeout caused pair closure")
_GRACE = 0.5  # seconds that ranks above 0 hold an error back, so that one which all ranks share is printed once


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 1 (an error, said on stderr), 2 (no such verb) or 130 (Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        sys.stdout.write(f"accessory {__version__}\n")
        return 0
    called = argv[0].replace("-", "_")
    verb = ALIASES.get(called, called)
    if verb not in VERBS and verb not in LATER:
        import difflib

        close = difflib.get_close_matches(argv[0], [*VERBS, *LATER, *ALIASES], n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join((*VERBS, *LATER))}"
        sys.stderr.write(f"accessory: error: unknown verb {argv[0]!r}; {remedy}\n")
        return 2
    return guard(lambda: _run(verb, [*argv[1:], *([f"--called={called}"] if called != verb else [])]))


def guard(body: Callable[[], int | None]) -> int:
    """Run a script's main and turn what ends it into an exit code, with one line on stderr for what a user can mend.

    ValueError, OSError, a package that is not installed and a lost rank are one line and 1; Ctrl-C is 130; anything
    else is a bug of ours: its traceback and 1. ACCESSORY_DEBUG=1 shows every traceback. After an error in a job of
    several ranks it does not return but ends the process at once, since open groups would delay an ordinary end.
    Use: `sys.exit(guard(main))`.
    """
    try:
        code = body() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):  # outside of the main thread Python allows no handlers
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one, while the interpreter leaves, is no traceback
        return _leave(130)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _leave(141)
    except Exception as error:
        _report(error)
        return _leave(1)


def _run(verb: str, argv: list[str]) -> int | None:
    """Run a verb, or the one that its words ask for by themselves: train with do_predict is predict."""
    if verb in MANY and not {"-h", "--help"} & set(argv):
        from accessory.config import collect
        from accessory.dialect.translate import pending, translator

        said = collect(argv, others=translator(verb).names)
        verb = pending(verb, {name: given.value for name, given in said.items()})
    return import_module(VERBS[verb][0]).main(argv) if verb in VERBS else _show(verb, argv)


def _show(verb: str, argv: list[str]) -> int:
    """The settings of a verb that only --dry_run true answers. ValueError without it."""
    import dataclasses

    import yaml

    from accessory.config import parse
    from accessory.dialect.later import LATER as WORDS
    from accessory.dialect.translate import translator

    words, missing = WORDS[verb]
    about = {"prog": f"accessory {verb}", "description": words.__doc__ or ""}
    if not parse(words, argv, **about, translate=translator(verb, say=False)).dry_run:
        raise ValueError(f"{verb}: {missing}")
    settings = parse(words, argv, **about, translate=translator(verb))
    sys.stdout.write(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True, width=120))
    return 0


def _report(error: Exception) -> None:
    """Say what went wrong, once for the whole job."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    lost, usual = _is_lost_rank(error), isinstance(error, (ValueError, OSError, ModuleNotFoundError))
    if rank != "0":
        threading.Event().wait(_GRACE)
    if os.environ.get("ACCESSORY_DEBUG") == "1" or not (lost or usual):
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if lost:
        text = f"{import_module('accessory.dist').lost_rank()} ({text[:200]})"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif not usual:
        text = f"unexpected {type(error).__name__}: {text}"
    sys.stderr.write(f"accessory: error: {'' if rank == '0' else f'rank {rank}: '}{text}\n")


def _leave(code: int) -> int:
    """The exit code; in a job of several ranks, the end of this process and of the followers it started."""
    crew, torch = sys.modules.get("accessory.dist.crew"), sys.modules.get("torch")
    if crew is not None:
        crew.abandon()
    if torch is not None and torch.distributed.is_initialized():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    if type(error).__name__.startswith("Dist") and type(error).__module__.startswith("torch"):
        return True
    return type(error) is RuntimeError and "torch" in sys.modules and any(words in str(error) for words in _LOST)


def _help() -> str:
    """The list of verbs."""
    lines = ["usage: accessory VERB [CONFIG.yaml] [--KEY VALUE | KEY=VALUE ...]", ""]
    lines += [f"  {verb:<10}{text}" for verb, (_, text) in VERBS.items()]
    lines += ["", "Understood with --dry_run true, and not there yet:", f"  {', '.join(LATER)}"]
    lines += ["", f"Also: {', '.join(f'{name} ({verb})' for name, verb in ALIASES.items())}."]
    return "\n".join([*lines, "", "accessory VERB --help explains a verb's settings.", ""])

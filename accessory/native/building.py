"""Compiles the kernels once for a machine and opens them.

Must not know what they compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", *(f"-m{name}" for name in INSTRUCTIONS))
OFF = "ACCESSORY_NATIVE"
"""Environment: 0 for torch's kernels alone."""
PATIENCE = 120  # seconds that a compiler may take
KEPT = 90 * 24 * 3600  # seconds that what was compiled is kept, once something newer is
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
CALLS = {
    "pack": "ppnnni",
    "multiply": "pnpppnnni",
    "attends": "n",
    "attend": "ppppppnnnnnnnnfi",
    "attend_many": "ppppppnnnnnnnnfi",
    "norm": "pnppnnfi",
    "swiglu": "ppnpnni",
    "norm_backward": "pppppnnfi",
    "swiglu_backward": "pppppni",
    "rotate": "pnppnnnii",
    "store": "ppnnppppnnnnnnni",
}
"""What each kernel takes, a letter an argument."""


def available() -> bool:
    """Whether the kernels can be called here."""
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they are switched off, or the processor or the compiler lacks something.

    They share torch's OpenMP library, and so its threads.
    """
    if os.environ.get(OFF) == "0" or not suits(processor()):
        return None
    try:
        kernels = _opened(SOURCES)
    except Exception as error:  # whatever it is, torch's kernels are there
        said = getattr(error, "stderr", None)
        text = said if isinstance(said, str) and said.strip() else str(error)
        log.warning("no kernels of our own, torch's are slower here: %s", text.strip().partition("\n")[0])
        return None
    for name, letters in CALLS.items():
        getattr(kernels, name).argtypes = [TYPES[letter] for letter in letters]
    return kernels


def _opened(sources: Path) -> ctypes.CDLL:
    """The kernels; what cannot be opened, as another system's compiler made it, is compiled again."""
    file = built(sources)
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        file.unlink()
        return ctypes.CDLL(str(built(sources)))


def suits(flags: set[str]) -> bool:
    """Whether a processor with these flags is one that the kernels are for: AMX does better, through oneDNN."""
    needed = {name.replace("avx512bf16", "avx512_bf16") for name in INSTRUCTIONS}
    return platform.machine() == "x86_64" and needed <= flags and "amx_bf16" not in flags


def processor() -> set[str]:
    """What the processor says of itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def built(sources: Path) -> Path:
    """What a folder's sources compile to, below $XDG_CACHE_HOME/accessory/native (~/.cache); made where it is missing.

    Raises OSError without a compiler or a place to write, CalledProcessError for what does not compile.
    """
    openmp, texts = _openmp(), [path.read_text(encoding="utf-8") for path in sorted(sources.glob("*.[ch]*"))]
    name = hashlib.sha256("\0".join([*texts, *FLAGS, openmp]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accessory" / "native"
    target = folder / f"kernels-{name}.so"
    if target.exists():
        return target
    named = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(named[0]) is None:
        raise OSError(f"{named[0]}: got no such compiler, expected g++; install it")
    log.info("compiling the kernels for this machine, once ...")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:  # several ranks may be at it
        parts, whole = [], Path(made) / "kernels.so"
        for source in sorted(sources.glob("*.cpp")):
            parts.append(f"{made}/{source.stem}.o")
            _call([*named, *FLAGS, "-c", str(source), "-o", parts[-1]])
        _call([*named, "-shared", "-Wl,-z,defs", *parts, openmp, "-o", str(whole)])
        whole.replace(target)
    for old in folder.glob("kernels-*.so"):
        if old.stat().st_mtime < time.time() - KEPT:
            old.unlink(missing_ok=True)
    return target


def _openmp() -> str:
    """The OpenMP library that torch has opened; OSError where it is not GNU's."""
    torch.get_num_threads()
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        found = {parts[5].rstrip("\n") for line in maps if len(parts := line.split(maxsplit=5)) == 6}
    named = sorted(path for path in found if Path(path).name.startswith("libgomp"))
    home = str(Path(torch.__file__).parent)
    if not named:
        raise OSError("libgomp: got a torch without it, expected torch's wheel for Linux")
    return next((path for path in named if path.startswith(home)), named[0])


def _call(command: list[str]) -> None:
    """Run a compiler; what it says comes with the error."""
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=PATIENCE)

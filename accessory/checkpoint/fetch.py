"""Fetches released LLaMA2-Accessory weights from the hub: which files, and whether they arrived whole.

Must not know what the files hold.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accessory.checkpoint.files import few
from accessory.checkpoint.manifest import sha256
from accessory.checkpoint.stage import FULL

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger(__name__)

REPO = "Alpha-VLLM/LLaMA2-Accessory"
SIZES = ("7B", "13B", "34B", "70B", "180B")
RELEASED: dict[str, tuple[str, ...]] = {
    "finetune/sg": (
        "alpaca",
        "alpaca_internLM_en",
        "alpaca_internLM_zh",
        "alpaca_llamaPeft_normBias",
        "dialog_flan",
        "dialog_lima",
        "dialog_moss",
        "dialog_platypus",
        "dialog_sharegpt",
        "dialog_sharegpt_70b",
        "dialog_ultra",
        "dialog_wizardcode",
        "dialog_wizardcode_codellama",
        "dialog_wizardcode_loadcode220k",
        "dialog_wizardLM",
        "gorilla",
    ),
    "finetune/mm": (
        "alpacaLlava_llamaQformerv2",
        "alpacaLlava_llamaQformerv2_13b",
        "alpacaLlava_llamaQformerv2Peft_13b",
        "caption_llamaQformerv2",
        "caption_llamaQformerv2_13b",
        *(f"SPHINX/SPHINX{kind}" for kind in ("", "-1k", "-v2-1k", "-MoE", "-MoE-1k", "-Tiny", "-Tiny-1k")),
    ),
    "convert/sg": ("InternLM", "Falcon", "Falcon_180b", "mixtral-8x7b-32kseqlen"),
    "convert/mm": (),
}
_DELTA = re.compile(r".*\.model-diff\.\w+")
_STATE = re.compile(r".*\.(optimizer|other)\.\w+|.*/rank-specific-.*")


@dataclass(frozen=True)
class Wanted:
    """What to fetch: a folder of the repository, or None, and single files."""

    folder: str | None
    files: tuple[str, ...]
    delta: bool = False
    """Of the folder, delta weights only; otherwise full weights where it has them."""

    def __str__(self) -> str:
        """The paths in the repository."""
        kind = "*.model-diff.*" if self.delta else "*"
        return ", ".join([*([f"{self.folder}/{kind}"] if self.folder else []), *self.files])


def plan(
    name: str | None,
    *,
    group: str = "finetune/sg",
    config: Literal["", "internLM_", "code_"] | None = None,
    size: str = "7B",
    delta: bool = False,
) -> Wanted:
    """Return what to fetch for a released name; nothing is asked of the network.

    group: train type and input type. config: also fetch the tokenizer and the params.json of `size`, of LLaMA 2 (""),
    InternLM or CodeLlama; None: do not. Raises ValueError for an unknown name (with the nearest) or nothing to fetch.
    """
    if size not in SIZES:
        raise ValueError(f"--model_size: got {size!r}, expected one of {', '.join(SIZES)}")
    if name is None and config is None:
        raise ValueError("nothing to fetch: give --model_name, --down_config or both")
    files = () if config is None else (f"config/{config}tokenizer.model", f"config/{config}{size}_params.json")
    return Wanted(None if name is None else f"{group}/{_known(name, group)}", files, delta)


def choose(paths: Iterable[str], wanted: Wanted) -> list[str]:
    """Of the files in the wanted folder, return those to fetch: one kind of weights and the small files beside them.

    Raises ValueError when there are none of the kind asked for.
    """
    paths = [path for path in paths if not _STATE.fullmatch(path)]
    if outside := [path for path in paths if path.startswith("/") or ".." in Path(path).parts]:
        raise ValueError(f"{wanted.folder}: the hub names files outside of it ({few(outside)}), which are not fetched")
    deltas = [path for path in paths if _DELTA.fullmatch(path)]
    weights = [path for path in paths if Path(path).name.startswith("consolidated.") and path not in deltas]
    small = [path for path in paths if path not in deltas and path not in weights]
    if wanted.delta and not deltas:
        raise ValueError(f"{wanted.folder}: holds no delta weights ({few(paths)}); leave --down_diff out")
    if not weights and not deltas:
        raise ValueError(f"{wanted.folder}: holds no weights ({few(paths)}); check --model_name on the release page")
    return sorted([*small, *(deltas if wanted.delta or not weights else weights)])


def check(path: Path, *, size: int, digest: str) -> str | None:
    """Return what is wrong with a fetched file, None when it is whole.

    digest: SHA-256 (64 hex digits, large files), or git's SHA-1 of the blob (40, small ones), as the hub states it.
    """
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if len(digest) == 64:
        found = sha256(path)
    else:
        found = hashlib.sha1(f"blob {size}\0".encode() + path.read_bytes(), usedforsecurity=False).hexdigest()
    return None if found == digest else f"has the digest {found[:12]}... instead of {digest[:12]}..."


def fetch(wanted: Wanted, target: str | Path) -> list[Path]:
    """Fetch into `target`, under the paths of the repository; files that are there and whole are not fetched again.

    An interrupted file goes on where it stopped. Every file is compared with the hub's size and digest. Raises OSError,
    naming what it was to fetch, when the hub cannot be reached, and when a file does not arrive whole.
    """
    import huggingface_hub

    target, done = Path(target), []
    try:
        revision, files = _listing(wanted)
        for file in files:
            path, digest = target / file.path, file.lfs.sha256 if file.lfs else file.blob_id
            if check(path, size=file.size, digest=digest) is not None:
                log.info("fetching %s (%s bytes)", file.path, f"{file.size:,}")
                huggingface_hub.hf_hub_download(REPO, file.path, revision=revision, local_dir=target)
                if fault := check(path, size=file.size, digest=digest):
                    path.unlink(missing_ok=True)
                    raise _Damaged(f"{path}: {fault} after fetching it, and was removed; run the command again")
            done.append(path)
    except Exception as error:
        if isinstance(error, _Damaged) or not is_of_network(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{REPO} on the hub cannot be reached ({reason}); to be fetched into {target} were {wanted}: run it again"
            " with a connection, or copy them there"
        ) from error
    return done


class _Damaged(OSError):
    """A file that arrived with another content."""


def _listing(wanted: Wanted) -> tuple[str, list[RepoFile]]:
    """The repository's present revision, and its entries of the files to fetch."""
    from huggingface_hub import HfApi

    api = HfApi()
    revision = api.repo_info(REPO, timeout=30).sha  # unlike the calls below it is not retried for half a minute
    found: list[RepoFile] = []
    if wanted.folder:
        tree = api.list_repo_tree(REPO, wanted.folder, recursive=True, revision=revision)
        entries = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        found += [entries[path] for path in choose(entries, wanted)]
    if wanted.files:
        singles = {entry.path: entry for entry in api.get_paths_info(REPO, list(wanted.files), revision=revision)}
        if absent := [path for path in wanted.files if path not in singles]:
            raise ValueError(f"{REPO}: has no {few(absent)}; choose another --model_size")
        found += [singles[path] for path in wanted.files]
    return revision, found


def is_of_network(error: Exception) -> bool:
    """Whether an error is the hub's or the network's: the hub's client has changed its HTTP library several times."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        return False  # it is the disk's
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "huggingface_hub")


def _known(name: str, group: str) -> str:
    """The released name, by its last parts too (`SPHINX-1k`). ValueError with the nearest for any other."""
    for names in (RELEASED[group], tuple(known.rpartition("/")[2] for known in RELEASED[group])):
        if name in names:
            return RELEASED[group][names.index(name)]
    elsewhere = [other for other, names in RELEASED.items() if name in names]
    if elsewhere:
        kinds = dict(zip(("--train_type", "--input_type"), elsewhere[0].split("/"), strict=True))
        flags = " ".join(f"{flag} {kind}" for flag, kind in kinds.items())
        raise ValueError(f"--model_name: {name} is released under {elsewhere[0]}, not {group}; say {flags}")
    every = [known for names in RELEASED.values() for known in names]
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.3)
    remedy = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(every)}"
    raise ValueError(f"--model_name: got {name!r}, which is not among the released names; {remedy}")

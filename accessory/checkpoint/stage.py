"""Files appear in a folder whole and together, or not at all.

Must not know what the files hold.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from accessory.checkpoint import manifest

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stage:
    """A place to write the files of `target` under temporary names; `commit` makes them appear, the manifest last.

    A target that does not exist is written as a hidden sibling folder and renamed. In one that does, each file gets a
    temporary name, and `.unfinished` lies beside them until the manifest is there; files already in it stay untouched.
    Leaving the `with` block without `commit` removes everything that was written.
    """

    def __init__(self, target: Path, names: Iterable[str], *, nbytes: int) -> None:
        """`names`: the files to come; `nbytes`: about what they take. OSError when they cannot be written there."""
        self.target = target.resolve()
        self.names, self.nbytes = [*names], nbytes
        self.fresh = not self.target.exists()
        if self.target.exists() and not self.target.is_dir():
            raise ValueError(f"{target}: is a file, expected a folder to write to; choose another output path")
        self.folder = self.target
        if self.fresh:
            self.folder = self.target.parent / f".{self.target.name}.{secrets.token_hex(4)}.tmp"
        self.appeared: list[Path] = []  # files under their final names, of a commit under way
        self.done = False

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`; a name that was not announced is added."""
        if name not in self.names:
            self.names.append(name)
        return self.folder / (name if self.fresh else f".{name}.tmp")

    def commit(self, known: Mapping[str, manifest.Entry] | None = None) -> None:
        """Flush every file to the disk, write the manifest, and let all appear under their names.

        known: files that were flushed and hashed when they were written, by this process or another one.
        """
        known = known or {}
        with self.explained():
            for name in self.names:
                if name not in known:
                    flush(self.path(name))
            if self.fresh:
                self._write_manifest(self.folder / manifest.NAME, known)
                flush(self.folder)
                os.rename(self.folder, self.target)
            else:
                for name in self.names:
                    self._refuse_taken([name])
                    os.rename(self.path(name), self.target / name)
                    self.appeared.append(self.target / name)
                temporary = self.target / f".{manifest.NAME}.tmp"
                self._write_manifest(temporary, known)
                flush(self.target)
                os.rename(temporary, self.target / manifest.NAME)
                (self.target / manifest.UNFINISHED).unlink()
            self.done = True
            flush(self.target)
            flush(self.target.parent)

    def explained(self) -> _Explained:
        """A context in which an OSError of writing becomes one sentence with the bytes needed and free."""
        return _Explained(self)

    def __enter__(self) -> Stage:
        """Create the place, after checking that it is free of such files and that the disk has room."""
        with self.explained():
            parent = next(folder for folder in (self.target, *self.target.parents) if folder.exists())
            free = shutil.disk_usage(parent).free
            if free < self.nbytes:
                raise OSError(errno.ENOSPC, "no room")
            if self.fresh:
                self.folder.mkdir(parents=True)
                return self
            if (self.target / manifest.UNFINISHED).exists():
                raise ValueError(
                    f"{self.target}: holds {manifest.UNFINISHED}: another process is writing here or was killed"
                    " doing so; choose another output path, or delete the folder once that process is gone"
                )
            self._refuse_taken([*self.names, manifest.NAME])
            (self.target / manifest.UNFINISHED).touch(exist_ok=False)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove what was written unless it was committed."""
        if self.done:
            return
        if self.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in (*self.appeared, *(self.folder / f".{name}.tmp" for name in (*self.names, manifest.NAME))):
            path.unlink(missing_ok=True)
        (self.target / manifest.UNFINISHED).unlink(missing_ok=True)

    def _refuse_taken(self, names: Iterable[str]) -> None:
        """Raise ValueError when files of these names lie in the target."""
        taken = [name for name in names if os.path.lexists(self.target / name)]
        if taken:
            raise ValueError(
                f"{self.target}: already holds {', '.join(taken[:4])}, which are never replaced; choose another"
                " output path, or move them away"
            )

    def _write_manifest(self, to: Path, known: Mapping[str, manifest.Entry]) -> None:
        """Write the manifest of the files, wherever they now are, and flush it."""
        manifest.write(self.folder, self.names, to=to, known=known)
        flush(to)


class _Explained:
    """Turns an OSError into a sentence for the user."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raise the sentence in place of the error."""
        if isinstance(error, OSError):
            raise explain(error, self.stage.target, nbytes=self.stage.nbytes) from error


def explain(error: OSError, target: Path, *, nbytes: int) -> OSError:
    """One sentence for an error of writing `nbytes` to `target`: what, why, the bytes needed and free, the remedy."""
    parent = next(folder for folder in (target, *target.parents) if folder.exists())
    if error.errno in FULL:
        return OSError(
            f"{target}: the disk is full or its quota used up ({nbytes:,} bytes needed,"
            f" {shutil.disk_usage(parent).free:,} free); make room or choose another output path"
        )
    reason = error.strerror or str(error)
    return OSError(f"{target}: cannot be written ({reason}); choose an output path that you may write to")


def flush(path: Path) -> None:
    """Make a file's or a folder's content survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

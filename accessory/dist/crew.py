"""A leader that starts its own ranks: the current process becomes rank 0, and its followers live and die with it.

Must not know groups, devices or what the ranks work on; torchrun and srun bring their own watchmen.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence

from accessory.dist.place import CREW, Nodes, read_place

_PR_SET_PDEATHSIG = 1
_FAREWELL = 15.0  # seconds that followers get to end by themselves once the leader closes
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", CREW)
_STORE = "ACCESSORY_STORE"

_crew: _Crew | None = None


def launch(n: int, *, argv: Sequence[str] | None = None, nodes: Nodes | None = None) -> None:
    """Become rank 0 of `n` ranks on this host: start n-1 followers that run `argv`, or this process's own command.

    nodes: other hosts do the same (NNODES), and all of them meet at MASTER_ADDR and MASTER_PORT; None: there are none.

    Call it early in `main`, before `init`: in the leader, and in the followers too, where it only ties them to the
    leader. It does nothing at n = 1, nor under torchrun or srun. Followers read no terminal, hear no Ctrl-C and write
    to stderr. When one of them dies before `close`, this process says so and exits with 1; when this process dies,
    however that happens, they die.
    Raises ValueError when n contradicts torchrun or srun, or when there is no command that followers could run.
    """
    global _crew
    world, nodes = read_place(os.environ).world, nodes or Nodes()
    if n < 1 or (world > 1 and n not in (1, world, int(os.environ.get(CREW, 1)))):
        raise ValueError(
            f"ranks: got {n} in a job of {world}; expected a positive number that agrees with the launcher"
        )
    if world > 1:
        follow()
    elif n * nodes.count > 1:
        if n > 1 and argv is None and not hasattr(sys.modules["__main__"], "__file__"):
            raise ValueError(f"ranks: got {n} in an interactive Python, expected a script; use torchrun or one rank")
        _crew = _Crew()
        _crew.start(n, nodes, [sys.executable, *sys.orig_argv[1:]] if argv is None else list(argv))


def follow() -> None:
    """In a follower: die with the leader. Linux kills at once; elsewhere a thread sees the leader's pipe end."""
    leash = os.environ.pop("ACCESSORY_LEASH", None)
    if leash is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        os.read(int(leash), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def closing() -> None:
    """The leader is about to leave: followers may end from now on."""
    if _crew is not None:
        _crew.closing = True


def dismiss() -> None:
    """Wait for the followers to end; ChildProcessError when one of them did not end well."""
    if _crew is not None:
        _crew.dismiss()


def abandon() -> None:
    """After an error in the leader: kill the followers of `launch`, if there are any."""
    if _crew is not None:
        _crew.end()


def lost_rank() -> str:
    """For a rank whose collective failed: a sentence on why. In a launched job the watcher, who knows, speaks first."""
    if _crew is not None and not _crew.closing:
        threading.Event().wait(5.0)  # the watcher names the rank and ends this process meanwhile
    return "another rank of this job ended, or can no longer be reached"


class _Crew:
    """The followers of a leader: started together, watched by a thread each, ended together."""

    def __init__(self) -> None:
        self.closing = False
        self.verdict = threading.Lock()
        self.followers: list[subprocess.Popen[bytes]] = []
        self.folder = tempfile.mkdtemp(prefix="accessory-")
        self.screen = _screen()

    def start(self, n: int, nodes: Nodes, argv: list[str]) -> None:
        """Start the host's other ranks and make this process its first one."""
        leash, self.hold = os.pipe()  # the write end closes with this process, however it dies
        first = nodes.number * n
        place = zip(_NAMES, map(str, (first, 0, nodes.count * n, n, n)), strict=True)
        os.environ.update(place)
        if nodes.count == 1:
            os.environ[_STORE] = f"{self.folder}/store"
        atexit.register(self.end)
        for rank in range(1, n):
            follower = subprocess.Popen(
                argv,
                env={**os.environ, "RANK": str(first + rank), "LOCAL_RANK": str(rank), "ACCESSORY_LEASH": str(leash)},
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout carries the leader's answer and nothing else
                pass_fds=[leash],
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
            self.followers.append(follower)
        os.close(leash)
        for rank, follower in enumerate(self.followers, start=1):
            threading.Thread(target=self.watch, args=(first + rank, follower), daemon=True).start()

    def watch(self, rank: int, follower: subprocess.Popen[bytes]) -> None:
        """Wait for one follower, and end the whole job when it goes before its time."""
        code = follower.wait()
        if self.closing or not self.verdict.acquire(blocking=False):
            return
        try:
            self.kill()  # without forgetting the crew: the main thread, if it fails too, leaves the word to this one
            if self.screen is not None:
                import termios

                termios.tcsetattr(self.screen[0], termios.TCSANOW, self.screen[1])
            sys.stderr.write(f"accessory: error: rank {rank} {_fate(code)} before the work was done\n")
            sys.stderr.flush()
        finally:
            os._exit(1)

    def dismiss(self) -> None:
        """Let the followers end by themselves, then make sure."""
        codes = []
        for follower in self.followers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.wait(_FAREWELL)
            codes.append(follower.poll())
        self.end()
        for rank, code in enumerate(codes, start=1):
            if code != 0:
                fate = "did not end and was stopped" if code is None else _fate(code)
                raise ChildProcessError(f"rank {rank} {fate} when the work was done")

    def end(self) -> None:
        """Kill what still runs, and be one process again."""
        global _crew
        self.closing, _crew = True, None
        self.kill()
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.hold)
            del self.hold
        for name in (*_NAMES, _STORE):
            os.environ.pop(name, None)
        atexit.unregister(self.end)

    def kill(self) -> None:
        """Kill and reap the followers, and remove their meeting place."""
        for follower in self.followers:
            follower.kill()
        for follower in self.followers:
            follower.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _fate(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"


def _screen() -> tuple[int, list] | None:
    """The terminal and its settings, to be restored when the job ends suddenly; None without a terminal."""
    if os.name != "posix" or sys.stdin is None or not sys.stdin.isatty():
        return None
    import termios

    return sys.stdin.fileno(), termios.tcgetattr(sys.stdin.fileno())

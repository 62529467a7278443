"""Questions from a terminal or a pipe, and Ctrl-C that stops an answer or clears a line instead of ending the job.

Must not know models. Under torchrun the launcher hears Ctrl-C too and would end every rank; so while an answer is made
or a line is edited, the terminal sends no signal, and ^C is read as the byte it is. Only rank 0 may come here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType

_CTRL_C, _CTRL_D, _ERASE = b"\x03", b"\x04", (b"\x7f", b"\x08")


class Keyboard:
    """Standard input, as a context: outside it Ctrl-C is a signal as ever.

    What is typed while an answer is made is kept for the next question, but for what precedes ^C. Where GNU readline
    or stdout's terminal is missing, Ctrl-C at a prompt stays a signal. prompts: those who feed a pipe get the prompts
    on stdout too, as a scripted session of a known protocol has them.
    """

    def __init__(self, *, prompts: bool = False) -> None:
        self._prompts = prompts
        self.terminal = os.name == "posix" and sys.stdin is not None and sys.stdin.isatty()
        """Whether a person sits there."""
        self._typed = b""
        self._readline = _open_readline() if self.terminal and sys.stdout.isatty() else None
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> Keyboard:
        if self.terminal:
            _restore_on_sigterm(sys.stdin.fileno())
        if self._readline is not None:
            import termios

            self._modes.enter_context(_without(sys.stdin.fileno(), termios.ISIG))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._modes.close()

    def ask(self, prompt: str) -> str | None:
        """One line without its end; None at the end of the input (Ctrl-D). A pipe sees no prompt unless it wants to."""
        if sys.stdin is None:
            return None
        if not self.terminal:
            if self._prompts:
                sys.stdout.write(prompt)
                sys.stdout.flush()
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        ahead, self._typed = _edited(self._typed), b""
        line, end, rest = ahead.partition(b"\n")
        if ahead.startswith(_CTRL_D):
            return None
        if end:
            self._typed = rest
            text = line.decode(errors="replace")
            _show(f"{prompt}{text}\n")
            return text
        return self._read(prompt, line.decode(errors="replace"))

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[], bool]]:
        """While the block runs, the function that it gets says whether ^C was pressed since it was last asked."""
        if not self.terminal:
            yield lambda: False
            return
        import termios

        fd = sys.stdin.fileno()
        with _without(fd, termios.ICANON | termios.ECHO | termios.ISIG):
            try:
                yield lambda: self._pressed(fd)
            finally:
                self._pressed(fd)

    def _pressed(self, fd: int) -> bool:
        """Take what was typed; True where ^C was among it, or the terminal is gone."""
        try:
            while select.select([fd], [], [], 0)[0] and (data := os.read(fd, 4096)):
                self._typed += data
        except OSError:
            return True
        _, pressed, rest = self._typed.rpartition(_CTRL_C)
        if pressed:
            self._typed = rest
        return bool(pressed)

    def _read(self, prompt: str, begun: str) -> str | None:
        """A line from the terminal, which may have been begun; ^C begins it anew."""
        readline = self._readline
        try:
            if readline is None:
                _show(prompt + begun)
                line = sys.stdin.readline()
                return begun + line.rstrip("\r\n") if line else None
            while True:
                readline.set_startup_hook(functools.partial(_begin, readline, begun))
                line = input(prompt)
                if _CTRL_C.decode() not in line:
                    return line
                readline.remove_history_item(readline.get_current_history_length() - 1)
                begun = ""
        except EOFError:
            _show("\n")
            return None


def _open_readline() -> ModuleType | None:
    """GNU readline, which gives `input` its arrow keys and history; None where there is none."""
    try:
        import readline
    except ImportError:
        return None
    if "libedit" in (readline.__doc__ or ""):  # cannot bind ^C so
        return None
    readline.parse_and_bind(r'"\C-c": "\C-v\C-c\C-m"')  # the byte itself, then the end of the line
    return readline


def _begin(readline: ModuleType, begun: str) -> None:
    """When readline has set up the terminal, which makes ^C a signal again: undo that, and type what was begun."""
    import termios

    fd = sys.stdin.fileno()
    modes = termios.tcgetattr(fd)
    modes[3] &= ~termios.ISIG
    termios.tcsetattr(fd, termios.TCSANOW, modes)
    readline.insert_text(begun)


@contextlib.contextmanager
def _without(fd: int, flags: int) -> Iterator[None]:
    """The terminal without these local modes, and at the end as it was. Without ICANON a read does not wait."""
    import termios

    before, changed = termios.tcgetattr(fd), termios.tcgetattr(fd)
    changed[3] &= ~flags
    if flags & termios.ICANON:
        changed[6][termios.VMIN] = changed[6][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, changed)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)


def _restore_on_sigterm(fd: int) -> None:
    """Let SIGTERM, by which torchrun ends its ranks, give the terminal back as it is now before it ends this process.

    In a thread, since the main one may be waiting for a lost rank inside a collective, where it runs no handler.
    """
    import termios

    before = termios.tcgetattr(fd)
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while os.read(source, 1) != bytes([signal.SIGTERM]):
            pass
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _edited(typed: bytes) -> bytes:
    """Keys typed unseen, as the terminal would have edited them: an erase takes a character of its line away."""
    text = bytearray()
    for key in (typed[i : i + 1] for i in range(len(typed))):
        if key not in _ERASE:
            text += key
            continue
        while text and text[-1] & 0xC0 == 0x80:  # the rest of a UTF-8 character
            text.pop()
        if text and text[-1:] != b"\n":
            text.pop()
    return bytes(text)


def _show(text: str) -> None:
    """Write to the person: on stdout where it is the terminal, else on stderr."""
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    stream.write(text)
    stream.flush()

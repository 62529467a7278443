"""Where the page listens, and who may see it: words that the verb and the demos share.

Must not import gradio or torch: they are read before the first rank starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

LOCAL = ("127.0.0.1", "localhost", "::1")


def _port() -> int:
    """GRADIO_SERVER_PORT, else 7860. ValueError where it is none."""
    told = os.environ.get("GRADIO_SERVER_PORT", "").strip() or "7860"
    if not (told.isascii() and told.isdecimal()) or int(told) > 65535:
        raise ValueError(f"GRADIO_SERVER_PORT: got {told!r}, expected 0 to 65535; correct or unset it")
    return int(told)


def _host() -> str:
    """GRADIO_SERVER_NAME, else this host alone."""
    return os.environ.get("GRADIO_SERVER_NAME", "").strip() or "127.0.0.1"


@dataclass
class WebWords:
    """The address of the page, and its password."""

    host: str = field(default_factory=_host)
    """Address to listen at; 0.0.0.0 lets other hosts in. GRADIO_SERVER_NAME says it too."""
    port: int = field(default_factory=_port)
    """Port to listen at; 0: any free one. GRADIO_SERVER_PORT says it too."""
    key: str | None = field(default_factory=lambda: os.environ.get("WEBCHAT_KEY") or None)
    """Password that the page asks for; WEBCHAT_KEY says it too, and keeps it out of lists of processes."""

    def check_web(self) -> None:
        """ValueError for an address that cannot be."""
        if not self.host:
            raise ValueError("host: got nothing, expected an address such as 127.0.0.1 or 0.0.0.0; give one")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: got {self.port}, expected 0 to 65535; 0 takes any free one")
        if self.key is not None and not self.key.strip():
            raise ValueError("key: got an empty password, expected at least one character; leave it out for none")

"""How much of an unfinished answer is shown: whole words, so that no shown text is ever taken back or split.

Must not know who shows it.
"""

from __future__ import annotations

# blocks of Han characters, between which no spaces are written
_HAN = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def safe_length(text: str) -> int:
    """Characters of an unfinished text that may be shown: all after a newline or a Han character, else up to and with
    the last space."""
    if not text:
        return 0
    last = ord(text[-1])
    if text[-1] == "\n" or any(first <= last <= final for first, final in _HAN):
        return len(text)
    return text.rfind(" ") + 1

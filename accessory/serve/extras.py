"""Packages that only some verbs need, asked for by name before anything is opened.

Must not import them, nor know what a verb does with them.
"""

from __future__ import annotations

from importlib.util import find_spec


def need(verb: str, *modules: str, extra: str = "serve") -> None:
    """Raises ModuleNotFoundError, in one sentence with the remedy, for modules that are not installed."""
    missing = [name for name in modules if not _there(name)]
    if missing:
        raise ModuleNotFoundError(
            f"{verb}: got no {', '.join(missing)} in this Python, expected the packages that serving needs; "
            f"pip install 'accessory[{extra}]'"
        )


def _there(name: str) -> bool:
    """Whether a module can be found, without importing more than its parents."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False

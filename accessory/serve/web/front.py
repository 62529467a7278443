"""What the page says about its model, and what it offers at first.

Must not know gradio, nor how an answer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accessory.serve.opening import TINY
from accessory.serve.web.talk import Wishes

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.engine import Engine


@dataclass(frozen=True)
class Front:
    """The page's words and first values."""

    name: str
    """Of the model, short."""
    about: Sequence[str] = ()
    """Facts on the model, a few words each."""
    source: str = ""
    """Where the model comes from."""
    wishes: Wishes = field(default_factory=Wishes)
    window: int = 4096
    sees: bool = False
    several: bool = True
    """Whether more than one picture can come with a question."""
    remembers: bool = True
    picture: Path | None = None
    """In view when the page opens."""
    examples: Sequence[tuple[str, Path | None]] = ()
    """Questions to begin with, and their pictures."""


def front_of(
    bundle: Bundle,
    engine: Engine,
    *,
    template: str,
    wishes: Wishes,
    remembers: bool = True,
    picture: Path | None = None,
) -> Front:
    """The page of an open model."""
    from accessory.data.template import label

    vision = getattr(bundle.model, "vision", None)
    source = str(bundle.source)
    tiny = source == TINY
    names = [Path(part).name if Path(part).exists() else part for part in source.split(", ")]
    dtype = str(bundle.dtype).removeprefix("torch.")
    about = [bundle.llama_type, dtype, f"template {label(template)}", f"window {engine.window}"]
    offered = [("What is in this picture?", Path(TINY) / "example.png")] if tiny else []
    return Front(
        name="Accessory tiny" if tiny else " + ".join(names),
        about=[*about, "text and pictures" if vision is not None else "text"],
        source=source,
        wishes=wishes,
        window=engine.window,
        sees=vision is not None,
        several=bool(vision is not None and vision.slots),
        remembers=remembers,
        picture=picture,
        examples=offered,
    )


def first_picture(paths: Sequence[str], *, sees: bool) -> Path | None:
    """The picture to begin with. Raises ValueError or OSError for one that cannot be shown."""
    from accessory.data.image import load_picture

    if not paths:
        return None
    if not sees:
        raise ValueError(f"image: got {paths[0]!r}, but the model has no vision; leave it out")
    load_picture(Path(paths[0]).expanduser())
    return Path(paths[0]).expanduser()

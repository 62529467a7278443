"""What names a picture - a path, an http(s) URL, a data: URL, base64 text, bytes - to its bytes and its header.
Decodes no pixel and needs no torch: sizes are judged before anything is unpacked.

Only formats whose decoders stay inside this process are tried (PostScript, for one, would start another program).
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from accessory.data import address, fetch

MAX_PIXELS = 89_000_000
"""Default limit of width x height."""
MAX_BYTES = 64 << 20
"""Default limit of a picture file."""
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
"""Formats that are opened, by Pillow's names."""

PictureSource = str | Path | bytes | Image.Image
_SCHEME = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):")
_BLANK = re.compile(rb"\s+")
_CODED = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")
_SHORTEST = 40  # characters of a picture in base64; a GIF of one pixel has more
_MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM|II\*\x00|MM\x00\*|\x00\x00\x01\x00|P[1-6]\s"
    rb"|\x00\x00\x00\x0cjP  |....ftypavi[fs]|\xff\x4f\xff\x51",
    re.DOTALL,
)


def kind_of(source: str) -> str:
    """What a text names: "url", "data" (a data: URL), "base64" or "path".

    Text is base64 where it could be nothing else and begins as a picture does; "/9j/..." is a JPEG, not a path.
    """
    scheme = _SCHEME.match(source)
    if scheme and scheme[1].lower() in ("http", "https"):
        return "url"
    if scheme and scheme[1].lower() == "data":
        return "data"
    if len(source) >= _SHORTEST and _CODED.fullmatch(source[:200]) and _MAGIC.match(_head(source)):
        return "base64"
    return "path"


def shown(source: str) -> str:
    """A picture's name for a sentence or a log: short, without a URL's query and without coded pixels."""
    kind = kind_of(source)
    if kind == "url":
        return address.shown(source.strip())
    if kind == "path":
        return source if len(source) <= 300 else f"{source[:200]}..."
    return f"{source[:30].split(',')[0]},... ({len(source)} characters)" if kind == "data" else "in base64"


def as_name(given: Any) -> str:
    """What a row has for a picture as one text: a path, a URL, or a data: URL for bytes and base64.

    given: text, bytes, or a mapping with "bytes" or "path" (or "url"). ValueError for anything else.
    """
    if isinstance(given, Mapping):
        inside = given.get("bytes")
        given = inside if inside else given.get("path") or given.get("url")
        if isinstance(inside, str) and inside and kind_of(inside) == "path":
            raise ValueError(f"image: got the bytes {inside!r:.40}, expected base64 of a picture; mend the row")
    if isinstance(given, (bytes, bytearray, memoryview)):
        return "data:;base64," + base64.b64encode(given).decode("ascii")
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise ValueError(f"image: got {given!r:.60}, expected a path, a URL, a data: URL or bytes of a picture")
    given = given.strip()
    kind = kind_of(given)
    if kind == "path" and "://" in given[:64]:
        raise ValueError(f"image: got {given[:60]!r}, expected a path, an http(s) or a data: URL; fetch the picture")
    return f"data:;base64,{given}" if kind == "base64" else given


def locate(name: str, root: str | None) -> str:
    """Where a row's picture is: a path below `root`, or from the working directory where only that is there."""
    if kind_of(name) != "path":
        return name
    below = os.path.join(root or "", name)
    return name if not os.path.exists(below) and os.path.isfile(name) else below


def open_picture(
    source: PictureSource,
    *,
    allow_private_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    cache: str | Path | None = None,
) -> tuple[str, Image.Image]:
    """A picture's name for sentences, and the picture with its header read and no pixel decoded.

    allow_private_urls: URLs of hosts that are not public are fetched, too. cache: folder of what was fetched.
    max_pixels bounds width x height, max_bytes the file. Raises FileNotFoundError for a missing file, ConnectionError
    for a host that gives no answer, and ValueError that names the source for everything else that is no usable picture.
    """
    if isinstance(source, Image.Image):
        name, image = getattr(source, "filename", "") or "picture", source
    else:
        name, data = _read(source, allow_private_urls, max_bytes, cache)
        image = _open(name, data)
    width, height = image.size
    if width * height > max_pixels or not width * height:
        raise ValueError(
            f"picture {name}: got {width} x {height} pixels, expected 1 to {max_pixels} in all; "
            "make it smaller or raise max_pixels"
        )
    return name, image


def read_picture(
    source: str | Path | bytes,
    *,
    allow_private_urls: bool = False,
    max_bytes: int = MAX_BYTES,
    cache: str | Path | None = None,
) -> bytes:
    """The bytes of a picture as they are stored, which nobody has looked at. Raises as `open_picture` does."""
    return _read(source, allow_private_urls, max_bytes, cache)[1]


def _read(
    source: str | Path | bytes, allow_private_urls: bool, max_bytes: int, cache: str | Path | None
) -> tuple[str, bytes]:
    """The name and the bytes of a source, never more than `max_bytes`."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "from memory", bytes(source)
    else:
        kind = kind_of(source) if isinstance(source, str) else "path"
        name = shown(os.fspath(source))
        if kind == "url":
            data = _fetch(str(source), allow_private_urls, max_bytes, cache)
        elif kind == "path":
            data = _read_file(name, source, max_bytes)
        else:
            data = _decode(name, str(source), max_bytes)
    if len(data) > max_bytes:
        raise ValueError(f"picture {name}: got more than {max_bytes} bytes; make it smaller or raise max_bytes")
    if not data:
        raise ValueError(f"picture {name}: got an empty file, expected a picture; save or fetch it again")
    return name, data


def _fetch(url: str, allow_private: bool, max_bytes: int, cache: str | Path | None) -> bytes:
    """What a URL leads to."""
    try:
        limits = replace(fetch.LIMITS, size=max_bytes)
        return fetch.fetch(url, allow_private=allow_private, cache=cache, limits=limits)
    except ValueError as error:
        raise ValueError(f"picture {error}") from error
    except ConnectionError as error:
        raise ConnectionError(f"picture {error}") from error


def _read_file(name: str, source: str | Path, max_bytes: int) -> bytes:
    """The bytes of a file, and one more where it is too large."""
    scheme = _SCHEME.match(os.fspath(source)) if "://" in os.fspath(source)[:64] else None
    if scheme:
        remedy = "name the file by its path" if scheme[1].lower() == "file" else "fetch the picture and name its file"
        raise ValueError(f"picture {name}: got the scheme {scheme[1]}, expected a path, http(s) or data:; {remedy}")
    try:
        path = Path(source)
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"picture {name}: got {kind}, expected a picture file; name a file")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"picture {name}: no such file; check the path") from None
    except OSError as error:
        raise ValueError(f"picture {name}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:
        if str(error).startswith("picture "):
            raise
        raise ValueError(f"picture {name!r}: is no path ({error}); check the path") from error


def _decode(name: str, text: str, max_bytes: int) -> bytes:
    """The bytes in a data: URL (RFC 2397) or in base64 (RFC 4648); blanks and missing `=` at the end are forgiven."""
    coded, too_large = True, f"picture {name}: got more than {max_bytes} bytes; make it smaller or raise max_bytes"
    if len(text) > 3.3 * max_bytes + 1000:  # before any copy of it is made
        raise ValueError(too_large)
    text = text.strip()
    if kind_of(text) == "data":
        head, comma, text = text[len("data:") :].partition(",")
        media, *more = [part.strip().lower() for part in head.split(";")]
        coded = "base64" in more
        if not comma:
            raise ValueError(f"picture {name}: has no comma, expected data:image/png;base64,...; mend it")
        if media and not media.startswith("image/") and media != "application/octet-stream":
            raise ValueError(f"picture {name}: got a data: URL of {media:.40}, expected one of a picture; check it")
    if coded and len(text) > 1.5 * max_bytes + 100:
        raise ValueError(too_large)
    raw = unquote_to_bytes(text) if "%" in text or not coded else text.encode("ascii", "replace")
    if not coded:
        return raw
    raw = _BLANK.sub(b"", raw).rstrip(b"=")
    try:
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"picture {name}: its base64 is broken ({error}); encode it again") from error


def _head(text: str) -> bytes:
    """The first bytes of base64."""
    letters = "".join(text[:80].split())
    try:
        return base64.b64decode(letters[: len(letters) // 4 * 4])
    except binascii.Error:
        return b""


def _open(name: str, data: bytes) -> Image.Image:
    """Read the header of an encoded picture."""
    Image.init()
    formats = [known for known in FORMATS if known in Image.OPEN]
    try:
        with warnings.catch_warnings():  # between its warning and its error lie sizes that the caller judges
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture {name}: {error}; make it smaller") from error
    except Image.UnidentifiedImageError as error:
        start = data[:4096].lower()
        drawing, page = b"<svg" in start, b"<html" in start or b"<!doctype html" in start
        found = "a file that is none of " + ", ".join(formats)
        found = "an SVG drawing, not pixels" if drawing else "a web page" if page else found
        remedy = "save it as PNG" if drawing else "convert it to PNG, or fetch it again if it should be a picture"
        raise ValueError(f"picture {name}: got {found}; {remedy}") from error
    except Exception as error:  # a damaged header, or text chunks beyond Pillow's limits
        raise ValueError(f"picture {name}: its header cannot be read ({error}); save or fetch it again") from error

"""The pictures of a request: pixels within data: URLs, and, where that is allowed, what http(s) URLs lead to.

Must not know models. A path of this host is never opened, whatever it looks like.
"""

from __future__ import annotations

import base64
import tempfile
from typing import TYPE_CHECKING

from accessory.data.fetch import Limits, fetch
from accessory.data.image import load_picture
from accessory.data.picture import kind_of
from accessory.serve.api.errors import ApiError

if TYPE_CHECKING:
    from PIL.Image import Image

    from accessory.serve.api.settings import ApiSettings

_PIECE = 1 << 18  # characters of base64
_REMOTE = Limits(connect=5.0, read=10.0, total=20.0, size=20 << 20, hops=3, waits=())


def open_image(url: str, settings: ApiSettings, *, param: str) -> Image:
    """The picture of an image_url, upright and without what else its file holds. ApiError where there is none."""
    kind = kind_of(url)
    if kind == "url" and not settings.allow_remote_images:
        raise _refused("got an http URL, expected a data: URL, since nothing is fetched here", param)
    if kind not in ("url", "data"):
        raise _refused("got neither a data: nor an http(s) URL, expected data:image/png;base64,...", param)
    try:
        source: str | bytes = url if kind == "url" else _decoded(url) or url
        if kind == "url":
            with tempfile.TemporaryDirectory() as folder:  # what strangers name is not kept
                source = fetch(url, allow_private=settings.allow_private_urls, cache=folder, limits=_REMOTE)
        turned = settings.orientation or "apply"
        picture = load_picture(source, orientation=turned, max_pixels=settings.max_pixels)
    except (ValueError, OSError) as error:
        raise _refused(" ".join(str(error).split())[:300], param) from error
    picture.info = {}
    return picture


def _decoded(url: str) -> bytes | None:
    """The bytes of a base64 data: URL without blanks, in pieces, so that no other thread waits long; None for any other
    one, which `load_picture` reads, or says what is wrong with it."""
    head, _, coded = url.partition(",")
    if not head.lower().startswith("data:image/") or not head.lower().endswith(";base64") or len(coded) % 4:
        return None
    try:
        pieces = [base64.b64decode(coded[at : at + _PIECE], validate=True) for at in range(0, len(coded), _PIECE)]
    except ValueError:
        return None
    if any(len(piece) < _PIECE // 4 * 3 for piece in pieces[:-1]):  # something ended in the middle
        return None
    return b"".join(pieces)


def _refused(why: str, param: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", param=param, code="invalid_image_url")

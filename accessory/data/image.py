"""Pictures from anywhere to RGB, and RGB to what a vision tower takes.
Knows no tower: size, mean and standard deviation are values that the caller has.

Sizes are checked from the header before a pixel is decoded, and only formats whose decoders stay inside this process
are tried (PostScript, for one, would start another program).
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 89_000_000
"""Default limit of width x height."""
MAX_BYTES = 64 << 20
"""Default limit of a picture file."""
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
"""Formats that are opened, by Pillow's names."""

_ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Orientation = Literal["keep", "apply"]


def load_picture(
    source: str | Path | bytes | Image.Image,
    *,
    orientation: Orientation = "keep",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """A picture as an RGB image of its own; of an animation the first frame, what is transparent on white.

    orientation: "keep" leaves the pixels as stored, "apply" turns them as EXIF says. max_pixels bounds width x height,
    max_bytes the file. Raises FileNotFoundError for a missing file, and ValueError that names the source for everything
    else that is no usable picture.
    """
    if orientation not in ("keep", "apply"):
        raise ValueError(f"orientation: got {orientation!r}, expected 'keep' or 'apply'; choose one of these")
    if isinstance(source, Image.Image):
        name, image = getattr(source, "filename", "") or "picture", source
    else:
        name, data = _read(source, max_bytes)
        image = _open(name, data)
    width, height = image.size
    if width * height > max_pixels or not width * height:
        raise ValueError(
            f"picture {name}: got {width} x {height} pixels, expected 1 to {max_pixels} in all; "
            "make it smaller or raise max_pixels"
        )
    try:
        image.load()
        turned = _UPRIGHT.get(image.getexif().get(_ORIENTATION)) if orientation == "apply" else None
        rgb = _to_rgb(image)
        return rgb if turned is None else rgb.transpose(turned)
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise ValueError(
            f"picture {name}: its {image.format or image.mode} data cannot be decoded "
            f"({error or type(error).__name__}); save or fetch it again"
        ) from error


def _read(source: str | Path | bytes, max_bytes: int) -> tuple[str, bytes]:
    """The name and the bytes of a source, never more than `max_bytes`."""
    if isinstance(source, bytes):
        name, data = "from memory", source
    else:
        name = os.fspath(source)
        try:
            path = Path(source)
            if path.exists() and not path.is_file():
                kind = "a folder" if path.is_dir() else "no regular file"
                raise ValueError(f"picture {name}: got {kind}, expected a picture file; name a file")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError:
            raise FileNotFoundError(f"picture {name}: no such file; check the path") from None
        except OSError as error:
            raise ValueError(f"picture {name}: cannot be read ({error.strerror or error}); check the path") from error
        except ValueError as error:
            if str(error).startswith("picture "):
                raise
            raise ValueError(f"picture {name!r}: is no path ({error}); check the path") from error
    if len(data) > max_bytes:
        raise ValueError(f"picture {name}: got more than {max_bytes} bytes; make it smaller or raise max_bytes")
    if not data:
        raise ValueError(f"picture {name}: got an empty file, expected a picture; save or fetch it again")
    return name, data


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
        drawing = b"<svg" in data[:4096].lower()
        found = "an SVG drawing, not pixels" if drawing else "a file that is none of " + ", ".join(formats)
        remedy = "save it as PNG" if drawing else "convert it to PNG, or fetch it again if it should be a picture"
        raise ValueError(f"picture {name}: got {found}; {remedy}") from error
    except Exception as error:  # a damaged header, or text chunks beyond Pillow's limits
        raise ValueError(f"picture {name}: its header cannot be read ({error}); save or fetch it again") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as 8-bit RGB without loss of the range that a viewer would show."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _to_bytes(grey: np.ndarray) -> np.ndarray:
    """Grey values of a wider type as uint8: 0-1 (floats), 0-255 and 0-65535 by their meaning, others by their range."""
    wide = grey.dtype.itemsize == 2
    values = grey.astype(np.float32)
    finite = values[np.isfinite(values)] if grey.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if wide or (low >= 0 and 255 < high <= 65535):
        values /= 257
    elif grey.dtype.kind == "f" and low >= 0 and high <= 1:
        values *= 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    return np.round(values).astype(np.uint8)


TRANSFORMS = ("random_resized_crop", "resized_center_crop", "padded_resize")
Transform = Callable[..., torch.Tensor]


def transform(name: str, *, size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """A picture transform: `apply(image, generator=None)`, RGB in, float32 [3, size, size] out, (x / 255 - mean) / std.

    random_resized_crop: a crop of 90-100 % of the area at an aspect of 3:4 to 4:3, stretched to the square (training);
    its dice are the generator's, else torch's own. resized_center_crop: the shorter side to `size`, then the middle.
    padded_resize: the whole picture on a square of the mean colour. All are bicubic, and equal torchvision's.
    """
    crops = {
        "random_resized_crop": _random_resized_crop,
        "resized_center_crop": _resized_center_crop,
        "padded_resize": _padded_resize,
    }
    if name not in crops:
        raise ValueError(f"image_transform: got {name!r}, expected one of {', '.join(crops)}; choose one of these")
    crop = crops[name]
    colour = tuple(int(value * 255) for value in mean)
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def apply(image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        square = crop(image, size, colour, generator)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div_(255).sub_(shift).div_(scale)

    return apply


Colour = tuple[int, ...]
_BICUBIC = Image.Resampling.BICUBIC
_LARGEST_STRIP = 16_000_000  # pixels of a resized picture before its middle is cut out


def _random_resized_crop(
    image: Image.Image, size: int, colour: Colour, generator: torch.Generator | None
) -> Image.Image:
    """Szegedy et al.'s crop (arXiv 1409.4842): ten tries at a random one, else the largest allowed in the middle."""
    left, top, width, height = _random_box(*image.size, generator)
    return image.crop((left, top, left + width, top + height)).resize((size, size), _BICUBIC)


def _random_box(
    width: int, height: int, generator: torch.Generator | None, *, area: float = 0.9, narrow: float = 0.75
) -> tuple[int, int, int, int]:
    """(left, top, width, height). Dice are cast in torchvision's order, so that equal seeds give equal crops."""
    wide = 1.3333
    logs = torch.log(torch.tensor((narrow, wide)))
    for _ in range(10):
        surface = width * height * torch.empty(1).uniform_(area, 1.0, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(logs[0].item(), logs[1].item(), generator=generator)).item()
        w, h = round(math.sqrt(surface * aspect)), round(math.sqrt(surface / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return left, top, w, h
    w = min(width, round(height * wide)) if width > height * wide else width
    h = min(height, round(width / narrow)) if width < height * narrow else height
    return (width - w) // 2, (height - h) // 2, w, h


def _resized_center_crop(
    image: Image.Image, size: int, colour: Colour, generator: torch.Generator | None
) -> Image.Image:
    """The shorter side to `size`, then the middle square."""
    short, long = min(image.size), max(image.size)
    length = int(size * long / short)
    start = round((length - size) / 2)
    landscape = image.width > image.height
    if length * size > _LARGEST_STRIP:  # only the part that is kept is computed; the rounding differs
        box = (start * long / length, 0, (start + size) * long / length, short)
        return image.resize((size, size), _BICUBIC, box=box if landscape else (box[1], box[0], box[3], box[2]))
    full = (length, size) if landscape else (size, length)
    resized = image if image.size == full else image.resize(full, _BICUBIC)
    left, top = (start, 0) if landscape else (0, start)
    return resized.crop((left, top, left + size, top + size))


def _padded_resize(image: Image.Image, size: int, colour: Colour, generator: torch.Generator | None) -> Image.Image:
    """The whole picture in the middle of a square of `colour`, then to `size`."""
    side = max(image.size)
    if side * side > MAX_PIXELS:  # a strip: shrink before padding, since the square itself would not fit in memory
        scale = size / side
        image = image.resize(tuple(max(1, round(length * scale)) for length in image.size), _BICUBIC)
        side = size
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square if side == size else square.resize((size, size), _BICUBIC)

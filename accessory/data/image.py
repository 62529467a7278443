"""Pictures from anywhere to RGB, and RGB to what a vision tower takes.
Knows no tower: size, mean and standard deviation are values that the caller has.

torch is imported by what makes pixels alone.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from accessory.data.picture import FORMATS as FORMATS
from accessory.data.picture import MAX_BYTES, MAX_PIXELS, PictureSource, open_picture

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

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
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
Orientation = Literal["keep", "apply"]


def load_picture(
    source: PictureSource,
    *,
    orientation: Orientation = "keep",
    allow_private_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    cache: str | Path | None = None,
) -> Image.Image:
    """A picture as an RGB image of its own; of an animation the first frame, what is transparent on white.

    source: a path, an http(s) URL, a data: URL, base64 text, bytes, or a Pillow image. orientation: "keep" leaves the
    pixels as stored, "apply" turns them as EXIF says. The rest, and what is raised: `picture.open_picture`; pixels that
    cannot be decoded are a ValueError that names the source, too.
    """
    if orientation not in ("keep", "apply"):
        raise ValueError(f"orientation: got {orientation!r}, expected 'keep' or 'apply'; choose one of these")
    name, image = open_picture(
        source, allow_private_urls=allow_private_urls, max_pixels=max_pixels, max_bytes=max_bytes, cache=cache
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


def picture_size(
    source: PictureSource,
    *,
    orientation: Orientation = "keep",
    allow_private_urls: bool = False,
    cache: str | Path | None = None,
) -> tuple[int, int]:
    """Width and height that `load_picture` would give, from the header alone; of a file no more than that is read.

    What is raised: `picture.open_picture`.
    """
    if isinstance(source, str | Path) and os.path.isfile(source):
        try:
            with warnings.catch_warnings():  # between its warning and its error lie sizes that are judged here
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN]) as image:
                    return _size(image, orientation)
        except Exception as error:  # whatever a damaged header makes decoders raise; said below, with the source
            log.debug("%s: %s", source, error)
    name, image = open_picture(source, allow_private_urls=allow_private_urls, cache=cache)
    try:
        return _size(image, orientation)
    except Exception as error:
        raise ValueError(f"picture {name}: its EXIF cannot be read ({error}); save or fetch it again") from error


def _size(image: Image.Image, orientation: Orientation) -> tuple[int, int]:
    """The size of a picture that was opened, turned where its EXIF is to be applied."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"got {image.width} x {image.height} pixels, expected 1 to {MAX_PIXELS} in all")
    if orientation == "keep" or image.format == "TIFF":  # Pillow turns TIFFs by itself, in their headers too
        return image.size
    turned = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    return image.size if turned not in _SIDEWAYS else (image.height, image.width)


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


TRANSFORMS = ("random_resized_crop", "resized_center_crop", "padded_resize", "clip_center_crop")
Transform = Callable[..., "torch.Tensor"]


def transform(name: str, *, size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """A picture transform: `apply(image, generator=None)`, RGB in, float32 [3, size, size] out, (x / 255 - mean) / std.

    random_resized_crop: a crop of 90-100 % of the area at an aspect of 3:4 to 4:3, stretched to the square (training);
    its dice are the generator's, else torch's own. resized_center_crop: the shorter side to `size`, then the middle.
    padded_resize: the whole picture on a square of the mean colour. All are bicubic, and equal torchvision's.
    clip_center_crop: resized_center_crop as CLIP's own processor rounds, up and to the left.
    """
    crops = {
        "random_resized_crop": _random_resized_crop,
        "resized_center_crop": _resized_center_crop,
        "padded_resize": _padded_resize,
        "clip_center_crop": _clip_center_crop,
    }
    if name not in crops:
        raise ValueError(f"image_transform: got {name!r}, expected one of {', '.join(crops)}; choose one of these")
    crop = crops[name]
    colour = tuple(int(value * 255) for value in mean)

    def apply(image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        return to_pixels(crop(image, size, colour, generator), mean=mean, std=std)

    return apply


def to_pixels(image: Image.Image, *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """RGB as float32 [3, height, width], (x / 255 - mean) / std."""
    import torch

    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).sub_(shift).div_(scale)


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
    import torch

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
    return _middle(image, size, lambda surplus: round(surplus / 2))


def _clip_center_crop(image: Image.Image, size: int, colour: Colour, generator: torch.Generator | None) -> Image.Image:
    """The same, half a pixel to the left of the middle or above it where the surplus is odd."""
    return _middle(image, size, lambda surplus: surplus // 2)


def _middle(image: Image.Image, size: int, half: Callable[[int], int]) -> Image.Image:
    """The shorter side to `size`, then the square that begins at half of the surplus."""
    short, long = min(image.size), max(image.size)
    length = int(size * long / short)
    start = half(length - size)
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

"""Pictures: every mode, size and pixel limits, damaged files, orientation, and the transforms against torchvision.

Must not need a file from outside.
"""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as peer

from accessory.data.image import FORMATS, TRANSFORMS, load_picture, transform

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(224, 224), (640, 480), (480, 641), (97, 301), (1000, 40), (3, 2), (1, 1), (1, 40), (53, 1)]


def noise(width: int, height: int) -> Image.Image:
    dice = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(chunk: bytes) -> bytes:
    """A small PNG with one more chunk after the header."""
    plain = encoded(noise(4, 4))
    return plain[:33] + chunk + plain[33:]


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds hardly any data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
)
def test_every_mode_of_a_red_or_grey_picture_stays_what_it_is(mode):
    colour = noise(8, 8).point(lambda _: 0)
    colour.paste((200, 30, 40), (0, 0, 8, 8))
    if mode in ("RGBa", "PA", "La"):
        image = {"RGBa": lambda: colour.convert("RGBA"), "PA": lambda: colour.convert("P"), "La": lambda: colour}[
            mode
        ]()
        image = image.convert("LA") if mode == "La" else image
        image = image.convert(mode)
    elif mode == "LAB":
        image = colour.convert("RGB").convert("LAB")
    else:
        image = colour.convert("L").convert(mode) if mode in ("I", "F") else colour.convert(mode)
    got = np.asarray(load_picture(image)).astype(int).mean((0, 1))
    grey = mode in ("1", "L", "LA", "La", "I", "F")
    wanted = np.asarray(colour.convert("L").convert("RGB")).astype(int).mean((0, 1)) if grey else (200, 30, 40)
    assert np.abs(got - wanted).max() <= (25 if mode in ("1", "P", "PA") else 4), got


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(order):
    values = np.linspace(0, 65535, 256).astype(order).reshape(16, 16)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (16, 16), values.tobytes())
    got = np.asarray(load_picture(image))[..., 0].ravel()
    assert np.array_equal(got, np.arange(256))


def test_a_sixteen_bit_png_is_scaled():
    image = Image.frombytes("I;16", (2, 1), np.array([0, 65535], "<u2").tobytes())
    assert np.asarray(load_picture(encoded(image)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), float("inf")], [0, 0, 0]),
        ([0.0, 65535.0, 257.0], [0, 255, 1]),
    ],
)
def test_float_pixels_are_read_by_their_range(values, wanted):
    image = Image.fromarray(np.array([values], np.float32))
    assert np.asarray(load_picture(image))[0, :, 0].tolist() == wanted


def test_what_is_transparent_becomes_white():
    for image in (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("LA", (2, 2), (0, 0))):
        assert np.asarray(load_picture(encoded(image))).min() == 255
    half = load_picture(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0))
    assert half == (255, 127, 127)


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    picture = load_picture(encoded(image, transparency=0))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = load_picture(data).getpixel((0, 0))
        assert red > 240 and blue < 15, kind


def test_orientation_is_kept_or_applied(tmp_path):
    file = tmp_path / "turned.jpg"
    for value, corner in [(3, (3, 1)), (6, (1, 0)), (8, (0, 3)), (2, (3, 0)), (1, (0, 0)), (99, (0, 0))]:
        image = Image.new("RGB", (4, 2), "black")
        image.putpixel((0, 0), (255, 255, 255))
        exif = Image.Exif()
        exif[0x0112] = value
        image.save(file, "PNG", exif=exif)
        assert load_picture(file).getpixel((0, 0)) == (255, 255, 255)
        applied = load_picture(file, orientation="apply")
        assert applied.size == ((2, 4) if value in (6, 8) else (4, 2))
        assert applied.getpixel(corner) == (255, 255, 255), value


def test_a_picture_is_a_copy_of_a_given_image():
    given = noise(3, 3)
    before = given.getpixel((0, 0))
    load_picture(given).putpixel((0, 0), (1, 2, 3))
    assert given.getpixel((0, 0)) == before


def test_a_wrong_extension_does_not_matter(tmp_path):
    (tmp_path / "picture.txt").write_bytes(encoded(noise(3, 4), "JPEG"))
    assert load_picture(str(tmp_path / "picture.txt")).size == (3, 4)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("empty.png", b"", "empty file"),
        ("text.png", b"no picture at all\n" * 9, "none of PNG"),
        ("drawing.svg", b"<?xml version='1.0'?><svg xmlns='x'></svg>", "SVG"),
        ("cut.png", encoded(noise(64, 64))[:600], "cannot be decoded"),
        ("cut.jpg", encoded(noise(64, 64), "JPEG")[:900], "cannot be decoded"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG"),
    ],
)
def test_a_file_that_is_no_whole_picture_is_named(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        load_picture(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_picture(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="a folder"):
        load_picture(tmp_path)
    with pytest.raises(ValueError, match="is no path"):
        load_picture("a\0b.png")


@pytest.mark.filterwarnings("error")
def test_a_picture_with_too_many_pixels_is_refused_before_decoding():
    with pytest.raises(ValueError, match="10000 x 9999"):
        load_picture(png_header(10_000, 9_999), max_pixels=50_000_000)
    with pytest.raises(ValueError, match="make it smaller"):
        load_picture(png_header(60_000, 60_000))
    assert load_picture(noise(10, 10), max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="11 x 10"):
        load_picture(noise(11, 10), max_pixels=100)


def test_a_file_with_too_many_bytes_is_refused(tmp_path):
    data = encoded(noise(30, 30))
    (tmp_path / "big.png").write_bytes(data)
    for source in (data, tmp_path / "big.png"):
        assert load_picture(source, max_bytes=len(data)).size == (30, 30)
        with pytest.raises(ValueError, match="max_bytes"):
            load_picture(source, max_bytes=len(data) - 1)


def test_text_that_inflates_inside_a_png_is_refused():
    bomb = b"k\0\0" + zlib.compress(b"x" * (8 << 20))
    for name in (b"zTXt", b"iCCP"):
        with pytest.raises(ValueError, match="picture from memory"):
            load_picture(png_with(png_chunk(name, bomb)))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0 x 5"):
        load_picture(Image.new("RGB", (0, 5)))


def test_formats_that_start_other_programs_are_not_tried():
    assert not {"EPS", "WMF", "FPX", "MPEG"} & set(FORMATS)


def normalised(image: Image.Image) -> torch.Tensor:
    return peer.Normalize(MEAN, STD)(peer.ToTensor()(image))


@pytest.mark.parametrize("size", SIZES)
def test_a_random_resized_crop_equals_torchvision_for_equal_seeds(size):
    image = noise(*size)
    theirs = peer.RandomResizedCrop(
        56, scale=(0.9, 1.0), ratio=(0.75, 1.3333), interpolation=peer.InterpolationMode.BICUBIC, antialias=None
    )
    for seed in range(5):
        ours = transform("random_resized_crop", size=56, mean=MEAN, std=STD)(image, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        assert torch.equal(ours, normalised(theirs(image)))


@pytest.mark.parametrize("size", SIZES)
def test_a_resized_center_crop_equals_torchvision(size):
    image = noise(*size)
    theirs = peer.Compose(
        [peer.Resize(56, interpolation=peer.InterpolationMode.BICUBIC), peer.CenterCrop(56)],
    )
    ours = transform("resized_center_crop", size=56, mean=MEAN, std=STD)(image)
    assert torch.equal(ours, normalised(theirs(image)))


def test_the_shortcut_for_strips_gives_the_same_middle(monkeypatch):
    apply = transform("resized_center_crop", size=56, mean=MEAN, std=STD)
    for size in [(500, 40), (7, 90)]:
        smooth = noise(4, 4).resize(size, Image.Resampling.BILINEAR)
        whole = apply(smooth)
        with monkeypatch.context() as patch:
            patch.setattr("accessory.data.image._LARGEST_STRIP", 0)
            assert (apply(smooth) - whole).abs().max() < 2.1 / 255 / min(STD)


@pytest.mark.parametrize("size", SIZES)
def test_a_padded_resize_equals_torchvision(size):
    image = noise(*size)
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    fill = tuple(int(value * 255) for value in MEAN)
    pad = peer.Pad((left, top, side - size[0] - left, side - size[1] - top), fill=fill)
    theirs = peer.Compose([pad, peer.Resize((56, 56), interpolation=peer.InterpolationMode.BICUBIC)])
    ours = transform("padded_resize", size=56, mean=MEAN, std=STD)(image)
    assert torch.equal(ours, normalised(theirs(image)))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_long_strip_needs_little_memory(name, size):
    pixels = transform(name, size=224, mean=MEAN, std=STD)(Image.new("RGB", size, "white"), torch.Generator())
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(pixels[:, 111, 111], white, atol=1e-5)


def test_an_unknown_transform_names_the_known_ones():
    with pytest.raises(ValueError, match="padded_resize"):
        transform("pad", size=4, mean=MEAN, std=STD)

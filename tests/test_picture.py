"""What names a picture: text of every kind, coded pixels, and hostile files.

Must not need a network.
"""

import base64
import io
import subprocess
import sys
import tracemalloc
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from accessory.data.image import load_picture, picture_size
from accessory.data.picture import as_name, kind_of, locate, open_picture, shown


def coded(kind: str = "PNG", size=(30, 20), **more) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(out, kind, **more)
    return out.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("a.png", "path"),
        ("/9j/a.png", "path"),
        ("/srv/pictures/" + "deep/" * 20 + "picture", "path"),
        ("iVBORw0KGgo", "path"),  # too short to be one
        ("http://host/a.png", "url"),
        (" HTTPS://host/a.png", "url"),
        ("http:a", "url"),
        ("data:image/png;base64,AAAA", "data"),
        ("DATA:,x", "data"),
        ("file:///a.png", "path"),
        ("c:\\a.png", "path"),
        ("A" * 100, "path"),
    ],
)
def test_a_text_names_a_picture_in_one_way(source, kind):
    assert kind_of(source) == kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF"])
def test_base64_of_every_format_is_a_picture_and_no_path(kind):
    data = coded(kind, (16, 16))
    assert kind_of(text(data)) == "base64" and load_picture(text(data)).size == (16, 16)


def test_a_data_url_of_every_spelling_is_its_picture():
    data = coded("GIF")
    plain = text(data)
    spellings = [
        f"data:image/gif;base64,{plain}",
        f"DATA:image/gif;charset=x;BASE64,{plain}",
        f"data:;base64,{plain}",
        f"data:application/octet-stream;base64,{plain}",
        f"data:image/gif;base64,{plain.rstrip('=')}",
        f"data:image/gif;base64,{quote(plain, safe='')}",
        "data:image/gif;base64," + "\n".join(plain[at : at + 76] for at in range(0, len(plain), 76)) + "\n",
        f"data:image/gif,{quote(data)}",
        f"  data:image/gif;base64,{plain}  ",
    ]
    for source in spellings:
        assert load_picture(source).size == (30, 20), source[:40]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:text/html,<html>", "got a data: URL of text/html"),
        ("data:image/png;base64,", "got an empty file"),
        ("data:image/png;base64,A", "its base64 is broken"),
        ("data:image/png;base64,AA*A", "its base64 is broken"),
        ("data:image/png;base64,AA=A", "its base64 is broken"),
        ("data:image/png;base64,\u00e4\u00e4", "its base64 is broken"),
        ("data:image/png;base64," + "AAAA" * 50, "none of PNG"),
        ("data:image/svg+xml,<svg xmlns='x'></svg>", "an SVG drawing"),
        ("file:///etc/passwd", "got the scheme file, expected a path, http(s) or data:; name the file by its path"),
        ("s3://bucket/a.png", "got the scheme s3, expected a path, http(s) or data:; fetch the picture"),
    ],
)
def test_what_is_no_picture_is_one_short_sentence(source, said):
    with pytest.raises(ValueError, match=r"^picture ") as caught:
        load_picture(source)
    words = str(caught.value)
    assert said in words and "\n" not in words and len(words) < 300


def test_a_cut_or_padded_base64_is_named_and_never_blank():
    plain = text(coded(size=(60, 60)))
    for broken in (plain[: len(plain) // 2], plain[: len(plain) // 2 * 2 - 401]):
        with pytest.raises(ValueError, match="picture in base64"):
            load_picture(broken)


def test_base64_far_beyond_the_limit_is_refused_without_a_copy():
    for head in ("data:image/png;base64,", text(b"\x89PNG\r\n\x1a\n" + bytes(40))):
        huge = head + "A" * 10_000_000
        tracemalloc.start()
        with pytest.raises(ValueError, match="got more than 2000000 bytes"):
            open_picture(huge, max_bytes=2_000_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_the_smallest_pictures_and_strips_are_pictures(kind, size):
    data = coded(kind, size)
    assert load_picture(data).size == picture_size(data) == size


def test_arrays_of_one_pixel_are_pictures():
    assert load_picture(Image.fromarray(np.zeros((1, 1, 3), np.uint8))).getpixel((0, 0)) == (0, 0, 0)


def test_a_picture_of_several_gives_the_first_one():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    out = io.BytesIO()
    first.save(out, "MPO", save_all=True, append_images=[second])
    assert load_picture(out.getvalue()).getpixel((4, 4))[0] > 200


def test_of_an_animation_of_many_frames_one_is_decoded():
    out = io.BytesIO()
    frames = [Image.new("P", (1000, 1000), number % 7) for number in range(60)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    tracemalloc.start()
    size = load_picture(out.getvalue()).size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == (1000, 1000) and peak < 20_000_000


def test_a_thousand_pictures_leave_nothing_open():
    import os

    data = coded(size=(4, 4))
    before = len(os.listdir("/proc/self/fd"))
    assert all(load_picture(data).size == (4, 4) for _ in range(1000))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_size_of_a_picture_is_that_of_its_pixels():
    turned = Image.Exif()
    turned[0x0112] = 6
    data = coded("JPEG", (30, 20), exif=turned)
    assert picture_size(data) == load_picture(data).size == (30, 20)
    assert picture_size(data, orientation="apply") == load_picture(data, orientation="apply").size == (20, 30)


def test_bytes_of_any_kind_are_pictures():
    data = coded()
    for source in (data, bytearray(data), memoryview(data)):
        assert load_picture(source).size == (30, 20)


def test_names_of_pictures_in_rows_are_one_text():
    data = coded("GIF")
    assert as_name(" a.png ") == "a.png" and as_name({"path": "a.png", "bytes": b""}) == "a.png"
    assert as_name(data) == as_name({"bytes": data}) == as_name(text(data)) == f"data:;base64,{text(data)}"
    for wrong in ("", "a\0b", None, 3, [], {"bytes": None}, "s3://bucket/a.png"):
        with pytest.raises(ValueError, match="^image: got"):
            as_name(wrong)


def test_names_in_sentences_are_short():
    assert shown("data:image/png;base64," + "A" * 999) == "data:image/png;base64,... (1021 characters)"
    assert shown("https://host/a.png?key=secret") == "https://host/a.png?..." and shown("a.png") == "a.png"


def test_a_picture_is_below_its_folder_or_where_the_run_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.png").write_bytes(b"")
    assert locate("here.png", "/root") == "here.png" and locate("gone.png", "/root") == "/root/gone.png"
    assert locate("https://host/a.png", "/root") == "https://host/a.png" and locate("/a.png", "/root") == "/a.png"


def test_headers_are_read_without_torch(tmp_path):
    (tmp_path / "a.png").write_bytes(coded())
    code = "import sys; from accessory.data.image import picture_size; assert picture_size('a.png') == (30, 20); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0

"""LLaVA's pictures: counts of rows, choice of a grid, pixels of tiles, order of rows, against formulas of their own.

Must not build a tower; test_llava_encoder does.
"""

import math
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_toys import picture
from llava_toys import FULL, GRIDS, NEXT, PLAIN, SIDE, TILE, look_of
from PIL import Image, ImageOps

from accessory.data.image import load_picture, picture_size
from accessory.data.tiles import NEWLINE, Geometry, lay
from accessory.vision.config import CLIP_MEAN, CLIP_STD

COUNTS = {
    (336, 336): 1176,
    (640, 480): 2340,
    (480, 640): 2352,
    (1024, 1024): 2928,
    (1024, 899): 2634,
    (1920, 1080): 1948,
    (1080, 1920): 1968,
    (3000, 500): 1452,
    (640, 427): 2144,
    (242, 191): 1026,
    (1400, 16): 576,  # no line is left
    (16, 1400): 648,  # 72 newlines without a cell before them
}
HF = replace(FULL, canvases=tuple((b, a) for a, b in FULL.canvases))
MANY = [(w, h) for w in (1, 7, 97, 191, 336, 500, 641, 1013, 2000) for h in (1, 13, 111, 242, 336, 427, 899, 3001)]


@pytest.mark.parametrize(("size", "count"), COUNTS.items(), ids=str)
def test_the_rows_of_a_picture_are_those_of_llava_1_6(size, count):
    assert FULL.slots(*size) == count == len(FULL.order([size]))


@pytest.mark.parametrize(("vision", "count"), [({}, 576), ({"merge": "spatial_unpad"}, 577)])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_a_picture_of_one_tile_has_as_many_rows_at_any_size(aspect, vision, count):
    full = replace(PLAIN, image_size=336, aspect=aspect, **vision)
    assert {look_of(full).slots(*size) for size in COUNTS} == {count}


def test_counts_are_those_of_transformers_where_grids_are_read_as_it_reads_them():
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    peer = LlavaNextProcessor.__new__(LlavaNextProcessor)
    peer.patch_size, peer.num_additional_image_tokens = 14, 0
    peer.image_processor = type("Said", (), {"image_grid_pinpoints": [list(pair) for pair in FULL.canvases]})
    for width, height in [*COUNTS, *MANY]:
        assert HF.slots(width, height) == peer._get_number_of_features(height, width, 336, 336), (width, height)


def test_only_pictures_that_no_canvas_shrinks_differ_between_the_two_readings():
    different = {size for size in [*COUNTS, *MANY] if FULL.slots(*size) != HF.slots(*size)}
    assert (242, 191) in different and all(max(size) <= 336 or min(size) < 8 for size in different)


def test_a_line_is_not_lost_to_rounding():
    # 24 * (2016 / 1344) and its like are whole numbers that come out a little below in floating point
    lost = [
        (w, h)
        for w in range(30, 1200, 7)
        for h in range(30, 1200, 11)
        if int(h * (48 / w)) != int(round(h * (48 / w), 7))
    ]
    assert lost, "no size of these shows the rounding"
    for width, height in lost[:20]:
        grid = Geometry(576, size=336, transform="anyres", canvases=((672, 672),), side=24, unpad=True)
        if width > height:
            lines = 48 - 2 * ((48 - round(height * 48 / width)) // 2)
            assert grid.slots(width, height) == 576 + lines * 49


def script(image: Image.Image, canvas: tuple[int, int], size: int) -> torch.Tensor:
    """LLaVA 1.6's pixels, written down again with numpy where ours has PIL."""
    (w, h), (across, down) = image.size, canvas
    scale_w, scale_h = across / w, down / h
    new = (
        (across, min(math.ceil(h * scale_w), down))
        if scale_w < scale_h
        else (min(math.ceil(w * scale_h), across), down)
    )
    sheet = np.zeros((down, across, 3), np.uint8)
    left, top = (across - new[0]) // 2, (down - new[1]) // 2
    sheet[top : top + new[1], left : left + new[0]] = np.array(image.resize(new, Image.BICUBIC))
    views = [np.array(image.resize((size, size), Image.BICUBIC))]
    views += [sheet[y : y + size, x : x + size] for y in range(0, down, size) for x in range(0, across, size)]
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((336, 336), (336, 672)),
        ((242, 191), (336, 672)),
        ((640, 427), (672, 672)),
        ((1101, 201), (1008, 336)),
        ((201, 1101), (336, 1008)),
        ((600, 310), (672, 336)),
    ],
    ids=str,
)
def test_the_pixels_of_tiles_are_llavas(size, canvas):
    image = picture(3, size)
    tiles = FULL.pixels(image)
    assert len(tiles) == FULL.tiles(*size) and FULL.grid(*size) == (canvas[0] // 336, canvas[1] // 336)
    assert torch.equal(tiles, script(image, canvas, 336))


@pytest.mark.parametrize("size", [(336, 336), (200, 91), (91, 200), (13, 17)], ids=str)
def test_a_padded_picture_is_llavas(size):
    image, side = picture(1, size), max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    whole = np.array(square.resize((336, 336), Image.BICUBIC), np.float32) / 255
    wanted = torch.from_numpy((whole - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32))
    ours = look_of(replace(PLAIN, image_size=336)).pixels(image)
    torch.testing.assert_close(ours, wanted.permute(2, 0, 1)[None], atol=1e-6, rtol=0)


@pytest.mark.parametrize("aspect", ["pad", "crop", "anyres"])
def test_pixels_are_those_of_transformers_processors(aspect):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    pinpoints = [list(pair) for pair in GRIDS]
    peer = (
        LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, do_pad=False, **sizes)
        if aspect == "anyres"
        else LlavaImageProcessorPil(do_pad=aspect == "pad", **sizes)
    )
    look = look_of(replace(NEXT, aspect=aspect, compat="hf", merge="flat"))
    for number, size in enumerate([(56, 56), (40, 31), (190, 107), (107, 191), (300, 50), (33, 170), (20, 57)]):
        image = picture(number, size)
        wanted = torch.tensor(np.stack(peer(image, return_tensors=None)["pixel_values"]))
        wanted = wanted[0] if aspect == "anyres" else wanted
        torch.testing.assert_close(look.pixels(image), wanted.float(), atol=1e-6, rtol=0)


def test_rows_of_several_pictures_stand_line_by_line_behind_their_views():
    look, sizes = look_of(NEXT), [(56, 56), (300, 50), (112, 112)]
    order, at, tile = look.order(sizes), 0, 0
    each = SIDE * SIDE
    for width, height in sizes:
        columns, rows = look.grid(width, height)
        part = order[at : at + look.slots(width, height)]
        assert part[:each].tolist() == list(range(tile * each, (tile + 1) * each))
        lines, rest = [], part[each:].tolist()
        while rest:
            end = rest.index(NEWLINE)
            lines.append(rest[:end])
            rest = rest[end + 1 :]
        cells = np.array(lines) - (tile + 1) * each
        top = (rows * SIDE - len(lines)) // 2
        left = (columns * SIDE - cells.shape[1]) // 2
        for y, x in [(0, 0), (len(lines) - 1, cells.shape[1] - 1), (len(lines) // 2, cells.shape[1] // 2)]:
            line, column = top + y, left + x
            number = (line // SIDE) * columns + column // SIDE
            assert cells[y, x] == number * each + (line % SIDE) * SIDE + column % SIDE
        at, tile = at + len(part), tile + 1 + columns * rows
    assert at == len(order) == sum(look.count(sizes))


def test_flat_rows_need_no_order_and_count_every_tile():
    look = look_of(replace(NEXT, merge="flat", select_feature="cls_patch"))
    assert look.order([(300, 50)]) is None and look.slots(300, 50) == 4 * (SIDE * SIDE + 1)


def test_a_named_transform_makes_one_tile_of_any_picture():
    look = look_of(NEXT, image_transform="random_resized_crop")
    assert not look.varies and look.slots(300, 50) == SIDE * SIDE + 1
    assert look.pixels(picture(0, (300, 50)), torch.Generator()).shape == (1, 3, TILE, TILE)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1)], ids=str)
def test_the_longest_pictures_become_tiles_too(size):
    look = look_of(NEXT)
    tiles = look.pixels(Image.new("RGB", size, "white"))
    assert len(tiles) == look.tiles(*size) and len(look.order([size])) == look.slots(*size) >= SIDE * SIDE


def test_anyres_without_grids_and_pictures_without_pixels_are_refused():
    with pytest.raises(ValueError, match="got anyres for a model without grids"):
        look_of(PLAIN, image_transform="anyres")
    with pytest.raises(ValueError, match="got 0 x 3 pixels"):
        FULL.slots(0, 3)


def test_counting_needs_no_torch_and_a_geometry_travels():
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    code = (
        "import sys; from accessory.data.tiles import Geometry; Geometry(4).slots(3, 3); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_slots_are_laid_down_picture_by_picture():
    assert lay(9, [1, 5], [2, 3]).tolist() == [-1, 0, 1, -1, -1, 2, 3, 4, -1]


@pytest.mark.parametrize("orientation", ["keep", "apply"])
@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp", "ppm", "gif"])
def test_a_header_tells_the_size_that_the_picture_will_have(tmp_path, kind, orientation):
    image, path = picture(2, (30, 20)), tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, **({} if kind in ("ppm", "gif") else {"exif": exif}))
    for source in (path, path.read_bytes(), Image.open(path)):
        size = picture_size(source, orientation=orientation)
        assert size == load_picture(source, orientation=orientation).size
    with Image.open(path) as stored:
        turned = ImageOps.exif_transpose(stored).size
    assert orientation == "keep" or size == turned


def test_a_header_that_is_none_is_refused_as_the_picture_would_be(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for source in (tmp_path / "a.png", tmp_path / "b.png"):
        errors = []
        for read in (picture_size, load_picture):
            with pytest.raises((ValueError, OSError)) as caught:
                read(source)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]

"""LLaVA's encoder: features and merged rows against transformers' models, configurations, gradients of parts.

Must not judge pixels or counts; test_llava_tiles does.
"""

import json
from dataclasses import replace

import pytest
import torch
from llava_toys import (
    DIM,
    GRIDS,
    NEXT,
    PLAIN,
    SHAPES,
    SIDE,
    TILE,
    encoder_of,
    encoder_weights,
    look_of,
    pictures,
    theirs,
)

from accessory.vision import VisionConfig, build_vision


def stacked(vision, images):
    """Tiles of all pictures, the order of their rows, and pixels as transformers wants them, padded in tiles."""
    look = look_of(vision)
    parts = [look.pixels(image) for image in images]
    order = look.order([image.size for image in images])
    most = max(len(part) for part in parts)
    padded = torch.stack([torch.cat([part, torch.zeros(most - len(part), *part.shape[1:])]) for part in parts])
    return torch.cat(parts), None if order is None else torch.from_numpy(order), padded


@pytest.mark.parametrize("select_feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_the_rows_of_a_tile_are_transformers_llavas(layer, select_feature):
    vision = replace(PLAIN, select_layer=layer, select_feature=select_feature)
    peer = theirs(vision)
    pixels, _, _ = stacked(vision, pictures())
    with torch.no_grad():
        rows = encoder_of(vision, peer)(pixels)
        wanted = torch.cat(list(peer.model.get_image_features(pixels).pooler_output))
    assert len(rows) == 3 * (SIDE * SIDE + (select_feature == "cls_patch")) and wanted.std() > 0.1
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grids", [GRIDS, tuple(reversed(GRIDS))])
def test_pictures_of_different_tiles_merge_as_in_transformers_llava_next(grids):
    vision = replace(NEXT, compat="hf", grid_pinpoints=grids)
    peer = theirs(vision)
    images = [*pictures(), *(image.transpose(2) for image in pictures())]  # turned by 90 degrees
    pixels, order, padded = stacked(vision, images)
    sizes = torch.tensor([[image.height, image.width] for image in images])
    with torch.no_grad():
        rows = encoder_of(vision, peer)(pixels, order)
        wanted = torch.cat(list(peer.model.get_image_features(padded, sizes).pooler_output))
    assert rows.shape == wanted.shape == (sum(look_of(vision).count([image.size for image in images])), DIM)
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)


def test_a_plain_gelu_in_the_tower_would_be_seen():
    peer = theirs(PLAIN)
    wrong = replace(PLAIN, tower_args={**PLAIN.tower_args, "act_layer": "gelu"})
    pixels, _, _ = stacked(PLAIN, pictures())
    with torch.no_grad():
        assert (encoder_of(wrong, peer)(pixels) - encoder_of(PLAIN, peer)(pixels)).abs().max() > 1e-3


def test_pictures_together_have_the_rows_of_each_alone():
    encoder = build_vision(NEXT, DIM, device="cpu")
    pixels, order, _ = stacked(NEXT, pictures())
    with torch.no_grad():
        alone = [encoder(*stacked(NEXT, [image])[:2]) for image in pictures()]
        torch.testing.assert_close(encoder(pixels, order), torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert [len(rows) for rows in alone] == look_of(NEXT).count(SHAPES)


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_without_an_order_each_tile_is_a_picture_of_its_own(merge):
    vision = replace(PLAIN, merge=merge)
    encoder = build_vision(vision, DIM, device="cpu")
    look = look_of(vision)
    pixels, order, _ = stacked(vision, pictures())
    with torch.no_grad():
        rows = encoder(pixels)
        assert len(rows) == sum(look.count(SHAPES))
        assert torch.equal(rows, encoder(pixels, order))


@pytest.mark.parametrize(
    ("projector", "shapes"),
    [
        ("linear", {"0": (DIM, 32)}),
        ("mlp1x_gelu", {"0": (DIM, 32)}),
        ("mlp3x_gelu", {"0": (DIM, 32), "2": (DIM, DIM), "4": (DIM, DIM)}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_projectors_are_linears_with_exact_gelu_between_them(projector, shapes, bias):
    module = build_vision(replace(PLAIN, projector=projector, projector_bias=bias), DIM, device="cpu")
    found = {name: tuple(tensor.shape) for name, tensor in module.proj.state_dict().items()}
    wanted = {f"{number}.weight": shape for number, shape in shapes.items()}
    assert found == wanted | ({f"{number}.bias": (DIM,) for number in shapes} if bias else {})
    acts = [layer for layer in module.proj if isinstance(layer, torch.nn.GELU)]
    assert len(acts) == len(shapes) - 1 and all(act.approximate == "none" for act in acts)


def test_an_identity_hands_the_towers_tokens_on():
    module = build_vision(replace(PLAIN, projector="identity"), 32, device="cpu")
    pixels, _, _ = stacked(PLAIN, pictures())
    assert torch.equal(module(pixels), module.tokens(pixels).flatten(0, 1))
    with pytest.raises(ValueError, match="got identity from 32 to 40"):
        build_vision(replace(PLAIN, projector="identity"), DIM)


def test_the_full_size_encoder_builds_without_memory():
    config = VisionConfig.reference("llava")
    module = build_vision(config, 4096, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in module.proj.parameters()) == 20_979_712
    assert sum(parameter.numel() for parameter in module.tower.parameters()) == 303_507_456
    assert module.slots == 576 and module(torch.empty(2, 3, 336, 336, device="meta")).shape == (1152, 4096)
    assert {type(block.mlp.act).__name__.lower() for block in module.tower.blocks} == {"quickgelu"}
    assert module.unread == {
        name for name, _ in module.named_parameters() if name.startswith(("tower.blocks.23.", "tower.norm."))
    }


def test_what_is_read_learns_and_what_is_not_read_is_named():
    module = build_vision(NEXT, DIM, device="cpu")
    pixels, order, _ = stacked(NEXT, pictures())
    (module(pixels, order) ** 3).sum().backward()
    still = {name for name, p in module.named_parameters() if p.grad is None}
    assert still == module.unread and module.partial == frozenset()
    assert all(p.grad.abs().sum() > 0 for name, p in module.named_parameters() if name not in still)


def test_the_newline_learns_from_every_line():
    module = build_vision(NEXT, DIM, device="cpu")
    pixels, order, _ = stacked(NEXT, pictures())
    module(pixels, order).sum().backward()
    torch.testing.assert_close(module.image_newline.grad, torch.full((DIM,), float((order == -1).sum())))


def test_weights_are_drawn_alike_from_one_seed():
    one, other = (build_vision(NEXT, DIM, device="cpu", generator=torch.Generator().manual_seed(4)) for _ in range(2))
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert set(state) == set(encoder_weights(theirs(NEXT).model.state_dict()))


def test_a_configuration_survives_json():
    for config in (PLAIN, NEXT, VisionConfig.reference("llava")):
        assert VisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_grids_are_read_as_the_family_reads_them():
    pairs = ((56, 112), (112, 168))
    assert replace(NEXT, grid_pinpoints=pairs).canvases == pairs
    assert replace(NEXT, grid_pinpoints=pairs, compat="hf").canvases == ((112, 56), (168, 112))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "mlp_gelu"}, "expected linear, identity or mlpNx_gelu"),
        ({"aspect": "square"}, "vision aspect: got 'square', expected one of pad, crop, anyres"),
        ({"merge": "spatial"}, "vision merge: got 'spatial'"),
        ({"compat": "swift"}, "expected one of llava, hf"),
        ({"select_layer": 0}, "select_layer: got 0"),
        ({"select_layer": [-2, -1]}, r"select_layer: got \[-2, -1\], expected int"),
        ({"select_feature": "cls_patch"}, "select_feature: got cls_patch with merge spatial_unpad"),
        ({"grid_pinpoints": [[56, 100]]}, r"grid_pinpoints: got \[56, 100\], expected multiples of the tile's side 56"),
        ({"grid_pinpoints": [56, 112]}, "expected a list of pairs"),
        ({"grid_pinpoints": []}, "got none with aspect anyres"),
        ({"image_size": 60}, "expected a multiple of the patch size 14"),
        ({"tower_proj": 8}, "expected 0 for kind llava"),
    ],
)
def test_values_that_cannot_be_are_refused_when_read(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(NEXT, **changes)


def test_a_layer_that_the_tower_has_not_is_refused_when_built():
    with pytest.raises(ValueError, match="got -4 for a tower of 3 blocks, expected 1 to 3 or -1 to -3"):
        build_vision(replace(PLAIN, select_layer=-4), DIM)


def test_tiles_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \[N, 3, 56, 56\]"):
        build_vision(PLAIN, DIM)(torch.empty(1, 3, TILE, TILE + 1, device="meta"))

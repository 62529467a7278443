"""Encoders as modules: configuration, meta build, first weights, dtypes, errors.

Must not compare with other libraries; test_vision_parity does.
"""

import json
from dataclasses import replace

import pytest
import torch

from accessory.vision import VisionConfig, build_vision
from accessory.vision.init import grid_code
from accessory.vision.qformer import attend

TINY = VisionConfig(
    image_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    tower_args={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "class_token": False},
    queries=16,
    hidden=128,
    layers=4,
    heads=4,
    intermediate=512,
    norm_first=True,
    key_positions=True,
    grid_queries=True,
)
SMALL = VisionConfig(
    image_size=16,
    tower_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    queries=4,
    hidden=16,
    layers=3,
    heads=2,
    intermediate=32,
)


def small(**changes):
    return replace(SMALL, **changes)


def picture(config, count=2):
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["qformer", "clip", "perceiver"])
def test_a_configuration_survives_json(kind):
    config = VisionConfig.reference(kind)
    assert VisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="'querys', expected queries"):
        VisionConfig.from_dict({"querys": 32})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "resnet"}, "expected one of qformer, clip, perceiver"),
        ({"heads": 3}, "heads 3 do not divide hidden 16"),
        ({"queries": 0}, "queries: got 0"),
        ({"queries": "4"}, "queries: got '4', expected int"),
        ({"layers": True}, "layers: got True, expected int"),
        ({"mean": [0.5]}, "three numbers"),
        ({"tower_proj": 8}, "expected 0 for kind qformer"),
        ({"grid_queries": True, "queries": 5}, "expected a square number"),
        ({"tower_args": {"img_size": 32}}, "img_size: got 32, expected 16"),
        ({"tower_args": {"pretrained": True}}, "tower_args: got pretrained"),
        ({"tower": "hf-hub:someone/model"}, "expected the name of a timm model"),
    ],
)
def test_values_that_cannot_be_are_refused_when_read(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"tower": "vit_of_nowhere"},
        {"tower_args": {"patchsize": 8}},
        {"tower_args": {"patch_size": 8, "embed_dim": 30, "num_heads": 4}},
    ],
)
def test_a_tower_that_timm_refuses_is_a_value_error_that_names_it(changes):
    with pytest.raises(ValueError, match=f"vision tower '{changes.get('tower', 'vit')}'.*timm refuses"):
        build_vision(small(**changes), 24)


@pytest.mark.parametrize(("kind", "slots", "rows"), [("qformer", 34, 0), ("clip", 257, 0), ("perceiver", 0, 10)])
def test_full_size_encoders_build_without_memory_and_count_their_rows(kind, slots, rows):
    module = build_vision(VisionConfig.reference(kind), 4096, dtype=torch.bfloat16)
    assert (module.slots, module.prompt_rows) == (slots, rows)
    assert module(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, slots or rows, 4096)
    assert {(t.device.type, t.dtype) for t in module.state_dict().values()} == {("meta", torch.bfloat16)}
    assert module.config.before_bos == (kind == "clip")


@pytest.mark.parametrize("kind", ["qformer", "clip", "perceiver"])
def test_the_state_dict_is_all_that_an_encoder_is(kind):
    built = build_vision(small(kind=kind), 24, device="cpu")
    empty = build_vision(small(kind=kind), 24)
    empty.load_state_dict(built.state_dict(), strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert torch.equal(built(picture(SMALL)), empty(picture(SMALL)))


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (
        build_vision(TINY, 32, device="cpu", generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tower.blocks.0.attn.qkv.weight"], other["tower.blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["start"], other["start"])


def test_training_mode_changes_nothing():
    module = build_vision(SMALL, 24, device="cpu")
    assert torch.equal(module.train()(picture(SMALL)), module.eval()(picture(SMALL)))


def test_pictures_do_not_see_each_other():
    module = build_vision(TINY, 32, device="cpu")
    pixels = picture(TINY, 3)
    torch.testing.assert_close(module(pixels)[1:2], module(pixels[1:2]), atol=1e-5, rtol=1e-5)
    assert module(pixels[:0]).shape == (0, 18, 32)


def test_the_tiny_encoder_is_a_configuration_and_every_weight_of_it_learns():
    module = build_vision(TINY, 128, device="cpu")
    assert module.slots == 18
    (module(picture(TINY)) ** 3).sum().backward()
    still = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [name for name in still if not name.endswith("key.bias")] == []  # softmax does not see a key's bias


def test_queries_that_start_on_a_grid_look_at_their_own_part_of_the_picture():
    module = build_vision(TINY, 128, device="cpu")
    layer, positions = module.qformer.layers[0], module.qformer.key_positions[0]
    assert torch.equal(positions, module.tower.pos_embed[0])
    queries = layer.crossattention.query(layer.crossattention_norm(module.query_tokens[0]))
    best = (queries @ layer.crossattention.key(positions).t()).argmax(dim=1)
    cells = torch.stack([best // 8 // 2, best % 8 // 2], dim=1)  # 8 x 8 patches, 2 x 2 of them in a query's cell
    assert cells.tolist() == [[row, column] for row in range(4) for column in range(4)]


def test_a_coarse_and_a_fine_grid_have_one_code_where_their_cells_lie_upon_each_other():
    fine, coarse = grid_code(9, 16, side=9).view(9, 9, 16), grid_code(3, 16, side=9).view(3, 3, 16)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)


def test_features_keep_the_dtype_of_the_weights_and_stay_near_fp32():
    module = build_vision(TINY, 64, device="cpu")
    exact = module(picture(TINY))
    rounded = module.to(torch.bfloat16)(picture(TINY))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.15, rtol=0.05)  # LayerNormed rows of deviation 1


def test_pixels_of_another_size_are_refused_with_the_size_expected():
    module = build_vision(SMALL, 24)
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 16, 20\), expected \[N, 3, 16, 16\]"):
        module(torch.empty(1, 3, 16, 20, device="meta"))


def test_attention_spelled_out_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_no_fused_attention_runs_on_a_cpu():
    module = build_vision(small(kind="perceiver"), 24, device="cpu")
    module(picture(SMALL))
    assert [layer.fused_attn for layer in module.modules() if hasattr(layer, "fused_attn")] == [False] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_rows_of_the_cpu():
    module = build_vision(TINY, 64, device="cpu")
    exact = module(picture(TINY))
    torch.testing.assert_close(
        module.cuda()(picture(TINY).cuda()).cpu(), exact, atol=1e-2, rtol=1e-2
    )  # TF32 convolution

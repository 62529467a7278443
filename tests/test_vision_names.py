"""The table of vision names, both ways and for every tensor of the full-size encoders.

Must not read a file.
"""

import pytest
import torch

from accessory.checkpoint.vision_names import (
    TRANSFORMS,
    ignored,
    kind_of,
    to_canonical,
    to_reference,
    transform_shape,
    transform_tensor,
)
from accessory.vision import VisionConfig, build_vision


@pytest.fixture(scope="module", params=["qformer", "clip", "perceiver"])
def encoder(request):
    module = build_vision(VisionConfig.reference(request.param), 4096)
    return request.param, {f"vision.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_every_tensor_of_an_encoder_goes_out_and_back_under_its_own_name(encoder):
    kind, shapes = encoder
    there = {name: to_reference(name, kind=kind) for name in shapes}
    assert len({name for name, _ in there.values()}) == len(shapes)
    for name, (foreign, outward) in there.items():
        back, inward = to_canonical(foreign)
        assert back == name
        assert transform_shape(inward, transform_shape(outward, shapes[name])) == shapes[name]
        assert not ignored(foreign)


def test_the_names_tell_the_kind_of_encoder(encoder):
    kind, shapes = encoder
    assert kind_of(shapes) == kind
    assert kind_of(["norm.weight"]) is None


def test_every_tensor_of_the_qformer_encoder_but_the_projection_and_tags_is_in_a_blip2_folder():
    names = [f"vision.{n}" for n in build_vision(VisionConfig.reference("qformer"), 64).state_dict()]
    there = {name: to_reference(name, kind="qformer", layout="blip2") for name in names}
    own = [name for name, found in there.items() if found is None]
    assert own == [
        f"vision.{n}" for n in ("start", "end", *(f"proj.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")))
    ]
    assert all(to_canonical(found[0], layout="blip2") == (name, None) for name, found in there.items() if found)


@pytest.mark.parametrize(
    ("canonical", "kind", "reference", "shape"),
    [
        (
            "tower.blocks.38.attn.qkv.bias",
            "qformer",
            "qformer.vision_model.encoder.layers.38.self_attn.qkv.bias",
            (4224,),
        ),
        ("tower.cls_token", "qformer", "qformer.vision_model.embeddings.class_embedding", (1, 1, 1408)),
        (
            "qformer.layers.10.crossattention.key.weight",
            "qformer",
            "qformer.qformer.encoder.layer.10.crossattention.attention.key.weight",
            (768, 1408),
        ),
        ("query_tokens", "qformer", "qformer.query_tokens", (1, 32, 768)),
        ("proj.0.weight", "qformer", "qformer_proj.0.weight", (4096, 768)),
        ("start", "qformer", "start_img", (1, 1, 4096)),
        ("tower.cls_token", "clip", "clip.visual.class_embedding", (1024,)),
        ("tower.pos_embed", "clip", "clip.visual.positional_embedding", (257, 1024)),
        ("tower.patch_embed.proj.weight", "clip", "clip.visual.conv1.weight", (1024, 3, 14, 14)),
        (
            "tower.blocks.0.attn.qkv.weight",
            "clip",
            "clip.visual.transformer.resblocks.0.attn.in_proj_weight",
            (3072, 1024),
        ),
        ("tower_proj.weight", "clip", "clip.visual.proj", (1024, 768)),
        ("proj.1.bias", "clip", "clip_proj_norm.bias", (4096,)),
        ("proj.0.weight", "perceiver", "clip_proj.weight", (768, 768)),
        ("perceiver.query", "perceiver", "visual_query", (10, 768)),
        ("perceiver.proj.0.weight", "perceiver", "visual_proj.weight", (4096, 768)),
    ],
)
def test_released_names_and_shapes_are_these(canonical, kind, reference, shape):
    ours = build_vision(VisionConfig.reference(kind), 4096).state_dict()[canonical].shape
    name, transform = to_reference(f"vision.{canonical}", kind=kind)
    assert (name, transform_shape(transform, ours)) == (reference, shape)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_a_transform_and_its_inverse_are_views_that_undo_each_other(name):
    tensor = torch.arange(6.0).view(1, 1, 2, 3) if name.startswith("drop") else torch.arange(6.0).view(2, 3)
    there = transform_tensor(name, tensor)
    assert tuple(there.shape) == transform_shape(name, tensor.shape)
    assert there.data_ptr() == tensor.data_ptr()
    assert torch.equal(transform_tensor(TRANSFORMS[name].inverse, there), tensor)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("clip.transformer.resblocks.3.attn.in_proj_weight", "accessory"),
        ("clip.positional_embedding", "accessory"),
        ("clip.token_embedding.weight", "accessory"),
        ("clip.logit_scale", "accessory"),
        ("qformer.language_model.lm_head.weight", "accessory"),
        ("language_projection.weight", "blip2"),
    ],
)
def test_what_the_layouts_carry_beside_the_encoder_is_listed(name, layout):
    assert ignored(name, layout=layout)
    assert to_canonical(name, layout=layout) is None


@pytest.mark.parametrize(
    "name", ["layers.0.attention.wq.weight", "clip.visual.ln_mid.weight", "qformer_proj.00.weight", "vision.start"]
)
def test_a_name_that_no_rule_knows_is_neither_renamed_nor_ignored(name):
    assert to_canonical(name) is None
    assert not ignored(name)


def test_a_tensor_that_only_our_own_encoders_have_has_no_foreign_name():
    assert to_reference("vision.qformer.key_positions", kind="qformer") is None
    assert to_reference("vision.tower.norm_pre.weight", kind="qformer") is None

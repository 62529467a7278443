"""Names in files and canonical ones, and the pure joining and cutting.

Must not touch a file.
"""

import pytest
import torch

from accessory.checkpoint import names
from accessory.checkpoint.delta import add, difference, exceptions, set_exceptions
from accessory.checkpoint.operate import same_bits
from accessory.checkpoint.reshard import Join, cut, find_join, guess_join, join
from accessory.dist import Cut


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("layers.0.attention.wq.weight", ("layers.0.attention.wq.weight", None)),
        ("llma.layers.0.attention.wq.lora_a.weight", ("layers.0.attention.wq.lora_a.weight", None)),
        ("llma.prefix_gate", ("prefix_gate", None)),
        ("llma.vision.tower.pos_embed", ("vision.tower.pos_embed", None)),
        ("llma.start_img", ("vision.start", "drop_2")),
        ("llma.qformer.query_tokens", ("vision.query_tokens", None)),
        ("llma.openclip_convnext_xxl.x", ("openclip_convnext_xxl.x", None)),
        ("rope.freqs", None),
        ("llma.rope.freqs", None),
        ("layers.3.attention.inner_attention.rope.freqs", None),
        ("rope.freqs.more", ("rope.freqs.more", None)),
        ("llma.clip.logit_scale", None),
    ],
)
def test_names_in_files_become_canonical(name, wanted):
    assert names.canonical(name) == wanted


def test_canonical_names_get_the_prefix_and_on_request_the_released_vision_names():
    keys = ["norm.weight", "vision.query_tokens", "vision.qformer.key_positions"]
    assert names.in_files(keys, reference=False) == {key: (f"llma.{key}", None) for key in keys}
    reference = names.in_files(keys, reference=True)
    assert reference["vision.query_tokens"] == ("llma.qformer.query_tokens", None)
    assert reference["vision.qformer.key_positions"] == ("llma.vision.qformer.key_positions", None)


@pytest.mark.parametrize(
    ("key", "dim", "part"),
    [
        ("tok_embeddings.weight", 1, "embedding"),
        ("layers.10.attention.wk.bias", 0, "attention"),
        ("layers.10.attention.wo.weight", 1, "attention"),
        ("layers.10.attention.wo.bias", None, "attention"),
        ("layers.0.feed_forward.w2.lora_a.weight", 1, "lora"),
        ("layers.0.feed_forward.w2.lora_b.weight", None, "lora"),
        ("layers.0.feed_forward.w3.lora_b.weight", 0, "lora"),
        ("layers.0.ffn_norm.weight", None, "norms"),
        ("output.weight", 0, "output"),
        ("prefix_gate", 1, "adapter"),
        ("vision.qformer.layers.0.up.weight", None, "qformer"),
        ("vision.tower.norm.weight", None, "vision"),
    ],
)
def test_the_table_knows_dim_and_part(key, dim, part):
    assert names.known(key) and names.cut_dim(key) == dim and names.part(key) == part


def test_an_unknown_name_is_other_and_uncut_and_a_tied_embedding_is_cut_on_rows():
    assert not names.known("mystery") and names.cut_dim("mystery") is None and names.part("mystery") == "other"
    assert names.cut_dim("tok_embeddings.weight", tied=True) == 0


def test_the_joined_dim_is_found_by_shapes():
    assert find_join([(2, 8), (2, 8)], (4, 8)) == Join((4, 8), 0)
    assert find_join([(3, 8), (2, 8)], (5, 8)) == Join((5, 8), 0)
    assert find_join([(2, 8), (2, 8)], (2, 16)) == Join((2, 16), 1)
    assert find_join([(2, 8), (2, 8)], (2, 8)) == Join((2, 8))
    assert find_join([(), ()], ()) == Join(())
    assert find_join([(2, 8), (2, 8)], (4, 16)) is None
    assert find_join([(2, 8), (2, 9)], (4, 8)) is None
    assert find_join([(2, 8), (2,)], (4, 8)) is None


def test_without_the_full_shape_the_table_decides():
    assert guess_join([(2, 8), (3, 8)], 0) == Join((5, 8), 0)
    assert guess_join([(2, 8), (3, 8)], None) is None
    assert guess_join([(2,), (3, 8)], 0) is None


def test_cutting_pads_and_joining_strips_and_skips_replicas():
    tensor = torch.arange(10.0).view(5, 2)
    pieces = [Cut((5, 2), 0, 0, 3), Cut((5, 2), 0, 3, 5, pad=1)]
    assert torch.equal(cut(tensor, pieces[1]), torch.tensor([[6.0, 7], [8, 9], [0, 0]]))
    assert torch.equal(join([(piece, cut(tensor, piece)) for piece in pieces]), tensor)
    twice = [Cut((4, 2), 0, rank // 2 * 2, rank // 2 * 2 + 2, replicas=2) for rank in range(4)]
    assert torch.equal(join([(piece, cut(tensor[:4], piece)) for piece in twice]), tensor[:4])
    empty = [Cut((2, 2), 0, 0, 2), Cut((2, 2), 0, 2, 2, pad=2)]
    assert torch.equal(join([(piece, cut(tensor[:2], piece)) for piece in empty]), tensor[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_bits_come_back_from_an_fp32_delta_and_its_exceptions(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    span = torch.iinfo(bits)
    base, tuned = (
        torch.randint(span.min, span.max, (64, 48), generator=generator, dtype=torch.int64).to(bits).view(dtype)
        for _ in range(2)
    )
    delta = difference(base, tuned, dtype=torch.float32)
    got = add(base, delta, dtype=dtype)
    set_exceptions(got, exceptions(base, tuned, delta), Cut((64, 48)))
    assert same_bits(got, tuned)


def test_ordinary_finetuning_of_16_bit_weights_needs_no_exceptions():
    base = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    tuned = (base.float() * 1.01).bfloat16()
    assert len(exceptions(base, tuned, difference(base, tuned, dtype=torch.float32))) == 0

"""Our encoders against transformers' BLIP-2 and CLIP and against plain formulas, on random weights of small sizes.

Must not download anything.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Blip2Config, Blip2Model, CLIPVisionConfig, CLIPVisionModelWithProjection

from accessory.checkpoint.vision_names import ignored, to_canonical, transform_tensor
from accessory.vision import VisionConfig, build_vision

DIM = 24
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def shake(module):
    """Draw every parameter anew, so that no bias is zero and no norm is plain."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def canonical(state, layout):
    """Rename and reshape a foreign state dict; whatever it carries beside the encoder is left behind."""
    renamed = {}
    for name, tensor in state.items():
        if not ignored(name, layout=layout):
            ours, transform = to_canonical(name, layout=layout)
            renamed[ours.removeprefix("vision.")] = transform_tensor(transform, tensor)
    return renamed


@pytest.fixture(scope="module")
def blip2():
    config = Blip2Config(
        vision_config={"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True},
        qformer_config={"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 5, "num_attention_heads": 4}
        | {"encoder_hidden_size": 48, "cross_attention_frequency": 2, "layer_norm_eps": 1e-12, "vocab_size": 11},
        text_config={"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "vocab_size": 11}
        | {"num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
        num_query_tokens=6,
    )
    return shake(Blip2Model(config))


@pytest.fixture(scope="module")
def ours(blip2):
    sizes = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 80 / 48}
    config = VisionConfig(
        tower_args=sizes, tower_eps=1e-6, image_size=28, queries=6, hidden=32, layers=5, heads=4, intermediate=56
    )
    module = build_vision(config, DIM, device="cpu")
    rest = {name: t for name, t in module.state_dict().items() if name.split(".")[0] in ("proj", "start", "end")}
    module.load_state_dict(canonical(blip2.state_dict(), "blip2") | rest, strict=True)
    return module.eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_the_vit_gives_blip2_tokens(blip2, ours, pixels):
    theirs = blip2.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(ours.tower.forward_features(pixels), theirs, **TOLERANCE)


@torch.no_grad()
def test_the_qformer_gives_blip2_rows_for_the_same_tokens(blip2, ours):
    tokens = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(3))
    queries = blip2.query_tokens.expand(2, -1, -1)
    theirs = blip2.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    torch.testing.assert_close(ours.qformer(ours.query_tokens.expand(2, -1, -1), tokens), theirs, **TOLERANCE)


@torch.no_grad()
def test_a_whole_picture_gives_start_projected_blip2_features_and_end(blip2, ours, pixels):
    features = blip2.get_qformer_features(pixels)
    features = getattr(features, "last_hidden_state", features)
    rows = F.layer_norm(F.linear(features, ours.proj[0].weight, ours.proj[0].bias), (DIM,))
    got = ours(pixels)
    assert got.shape == (3, 8, DIM)
    torch.testing.assert_close(got[:, 1:-1], rows, **TOLERANCE)
    assert torch.equal(got[:, 0], ours.start.expand(3, -1)) and torch.equal(got[:, -1], ours.end.expand(3, -1))


def openai_names(state):
    """Rename transformers' CLIP to OpenAI's: three projections become one, the output projection is transposed."""
    names = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
        "vision_model.pre_layrnorm": "ln_pre",
        "vision_model.post_layernorm": "ln_post",
        "vision_model.encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renamed = {"clip.visual.proj": state["visual_projection.weight"].t()}
    for name, tensor in state.items():
        if "q_proj" in name:
            joined = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), joined
        if not any(part in name for part in ("k_proj", "v_proj", "visual_projection", "position_ids")):
            for theirs, openai in names.items():
                name = name.replace(theirs, openai)
            renamed["clip.visual." + name] = tensor
    return renamed


@pytest.fixture(scope="module")
def clip():
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    config.projection_dim, config.hidden_act = 20, "quick_gelu"
    return shake(CLIPVisionModelWithProjection(config))


def clip_config(**changes):
    sizes = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    return VisionConfig(
        tower="vit_large_patch14_clip_quickgelu_224", tower_args=sizes, tower_proj=20, image_size=28, **changes
    )


def load_clip(module, clip):
    rest = {name: t for name, t in module.state_dict().items() if not name.startswith("tower")}
    module.load_state_dict(canonical(openai_names(clip.state_dict()), "accessory") | rest, strict=True)
    return module.eval()


@torch.no_grad()
def test_every_projected_token_of_clip_equals_transformers(clip, pixels):
    module = load_clip(build_vision(clip_config(kind="clip"), DIM, device="cpu"), clip)
    tokens = clip.visual_projection(clip.vision_model.post_layernorm(clip.vision_model(pixels).last_hidden_state))
    torch.testing.assert_close(module.tower_proj(module.tower.forward_features(pixels)), tokens, **TOLERANCE)
    rows = F.layer_norm(F.linear(tokens, module.proj[0].weight, module.proj[0].bias), (DIM,))
    torch.testing.assert_close(module(pixels), rows, **TOLERANCE)
    assert module.slots == 17


@torch.no_grad()
def test_clip_as_a_plain_vit_of_the_same_sizes_is_the_same_tower(clip, pixels):
    named = load_clip(build_vision(clip_config(kind="clip"), DIM, device="cpu"), clip)
    sizes = clip_config(kind="clip").tower_args | {"pre_norm": True, "act_layer": "quick_gelu"}
    plain = VisionConfig(kind="clip", tower_args=sizes, tower_eps=1e-5, tower_proj=20, image_size=28)
    plain = build_vision(plain, DIM, device="cpu").eval()
    plain.load_state_dict(named.state_dict(), strict=True)
    assert torch.equal(plain(pixels), named(pixels))


def block(x, state, heads):
    """A pre-norm transformer block by its formula."""
    rows, tokens, width = x.shape
    h = F.layer_norm(x, (width,), state["norm1.weight"], state["norm1.bias"], 1e-5)
    qkv = (h @ state["attn.qkv.weight"].t() + state["attn.qkv.bias"]).view(rows, tokens, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // heads), dim=-1)
    joined = (weights @ v).transpose(1, 2).reshape(rows, tokens, width)
    x = x + joined @ state["attn.proj.weight"].t() + state["attn.proj.bias"]
    h = F.layer_norm(x, (width,), state["norm2.weight"], state["norm2.bias"], 1e-5)
    h = F.gelu(h @ state["mlp.fc1.weight"].t() + state["mlp.fc1.bias"])
    return x + h @ state["mlp.fc2.weight"].t() + state["mlp.fc2.bias"]


@torch.no_grad()
def test_the_perceiver_is_pre_norm_blocks_over_queries_and_clip_features(clip, pixels):
    config = clip_config(kind="perceiver", queries=5, hidden=32, layers=3, heads=4, intermediate=128)
    module = shake(build_vision(config, DIM, device="cpu"))
    state = {name.removeprefix("perceiver."): tensor for name, tensor in module.state_dict().items()}
    h = module.proj(module.tower_proj(module.tower.forward_features(pixels)))
    h = torch.cat([state["query"].expand(3, -1, -1), h], dim=1)
    for index in range(3):
        prefix = f"blocks.{index}."
        h = block(h, {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, 4)
    got = module(pixels)
    assert got.shape == (3, 5, DIM) and module.slots == 0 and module.prompt_rows == 5
    torch.testing.assert_close(got, module.perceiver.proj(h[:, :5]), **TOLERANCE)

"""The model shapes that are measured, and what a token of each costs.

Must not build anything: sizes and arithmetic only.
"""

from __future__ import annotations

from accessory.model import LlamaConfig

SHAPES = {
    "110m": LlamaConfig(dim=768, n_layers=12, n_heads=12, hidden_dim=2048, vocab_size=32000),
    "1b": LlamaConfig(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=32000),
    "7b": LlamaConfig(dim=4096, n_layers=32, n_heads=32, hidden_dim=11008, vocab_size=32000, max_seq_len=4096),
}


def matmul_weights(config: LlamaConfig) -> int:
    """Elements of every weight that a decoded token is multiplied with: all but the embedding's other rows."""
    kv = config.kv_heads * config.head_dim
    layer = config.dim * (2 * config.dim + 2 * kv + 3 * config.ffn_dim)
    return config.n_layers * layer + config.vocab_size * config.dim


def cache_bytes(config: LlamaConfig, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values that a token reads at this length."""
    return 2 * config.n_layers * config.kv_heads * config.head_dim * tokens * itemsize


def prefill_flops(config: LlamaConfig, tokens: int) -> float:
    """Multiply-adds times two of a causal prompt, the head applied to its last token only."""
    head = config.vocab_size * config.dim
    return 2.0 * ((matmul_weights(config) - head) * tokens + head) + 2.0 * config.n_layers * config.dim * tokens**2

"""Attention of new tokens over a cache, each token reading its own positions and no others.

Must not know caches or layers: tensors come in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.native.building import library

FEW = 8  # queries of a row, up to which each reads the keys by itself, and is the same alone and among others


def attends(keys: Tensor) -> bool:
    """Whether `attend` can read such keys: bf16 on a CPU, heads of a width that it knows."""
    kernels = library() if keys.dtype == torch.bfloat16 and keys.device.type == "cpu" else None
    return kernels is not None and bool(kernels.attends(keys.shape[-1]))


def attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of bf16 q [B, T, H, D] over keys, values [rows, G, S, D], G dividing H: [B, T, H * D].

    Row b of the batch is row rows[b] of the cache (None: b); its query t sees what lies at 0 .. positions[b, t], the
    newest `window` of it, itself included (None: all), and a negative position gives zeros. Up to FEW queries a row
    give what each would give alone; of more, the weights are rounded to bf16.
    """
    call = torch.ops.accessory.attend_rows if torch.compiler.is_compiling() else _attend
    return call(q, keys, values, positions, rows, window or 0)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor | None = None) -> None:
    """Write k, v [B, T, G, D] to such a cache at positions [B, T] of rows [B] (None: 0 .. B-1); -1 is the last slot."""
    batch, length, groups, width = k.shape
    k, v, positions = _dense(k), _dense(v), positions.contiguous()
    _check(keys, values, positions, rows)
    library().store(
        k.data_ptr(),
        v.data_ptr(),
        k.stride(1 if length > 1 else 0),
        v.stride(1 if length > 1 else 0),
        keys.data_ptr(),
        values.data_ptr(),
        None if rows is None else rows.data_ptr(),
        positions.data_ptr(),
        batch,
        length,
        groups,
        width,
        keys.stride(0),
        keys.stride(1),
        keys.shape[2],
        torch.get_num_threads(),
    )


def _dense(x: Tensor) -> Tensor:
    """x [B, T, G, D] as it is where its tokens lie evenly, each without gaps; else a copy that does."""
    batch, length, groups, width = x.shape
    within = x.stride()[2:] == (width, 1) or groups == 1 and x.stride(3) == 1
    return x if within and (batch == 1 or length == 1 or x.stride(0) == length * x.stride(1)) else x.contiguous()


def _check(keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor | None) -> None:
    """Our own invariants of a cache; that rows and positions are within it is its own affair (`Cache.place`)."""
    lies = keys.stride() == values.stride() and keys.stride()[2:] == (keys.shape[3], 1)
    assert lies and keys.dtype == values.dtype == torch.bfloat16, f"no cache: {keys.stride()}, {values.stride()}"
    assert positions.dtype == torch.int64 and (rows is None or rows.dtype == torch.int64), "places are int64"
    assert rows is None or rows.is_contiguous(), f"rows {rows.stride()}"


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor | None, window: int) -> Tensor:
    """The kernel's call."""
    batch, length, heads, width = q.shape
    _check(keys, values, positions, rows)
    q, positions = q.contiguous(), positions.contiguous()
    y = q.new_empty(batch, length, heads * width)
    call = library().attend if length <= FEW else library().attend_many
    call(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        None if rows is None else rows.data_ptr(),
        positions.data_ptr(),
        y.data_ptr(),
        batch,
        length,
        heads,
        keys.shape[1],
        width,
        keys.stride(0),
        keys.stride(1),
        window,
        width**-0.5,
        torch.get_num_threads(),
    )
    return y


_LIBRARY = torch.library.Library("accessory", "FRAGMENT")
_LIBRARY.define(
    "attend_rows(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor? rows, int window) -> Tensor"
)
_LIBRARY.impl("attend_rows", _attend, "CPU")
torch.library.register_fake(
    "accessory::attend_rows",
    lambda q, keys, values, positions, rows, window: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]),
    lib=_LIBRARY,
)

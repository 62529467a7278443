"""The engine of a server: as many rows as were asked for and the budget of keys and values allows.

Must not know who asks it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accessory.dialect.words import ModelWords, ServingWords
from accessory.serve.opening import WINDOW, open_engine

if TYPE_CHECKING:
    from accessory.assemble import Bundle
    from accessory.data.image import Orientation
    from accessory.dist import Ranks
    from accessory.engine import Engine

log = logging.getLogger(__name__)


def open_serving(
    model: ModelWords, serving: ServingWords, bundle: Bundle, ranks: Ranks, *, orientation: Orientation = "keep"
) -> Engine:
    """This rank's engine for many clients. ValueError where the budget holds not even one request."""
    rows = rows_within(model, serving, bundle)
    if rows < serving.max_concurrent:
        log.warning(
            "max_concurrent: %d, not %d: as many requests of the whole window as cache_gb %s holds",
            rows,
            serving.max_concurrent,
            serving.cache_gb,
        )
    return open_engine(
        model,
        bundle,
        ranks,
        rows=rows,
        orientation=orientation,
        prefill_chunk=serving.prefill_chunk,
        reuse=serving.prefix_reuse,
        deterministic=serving.deterministic,
        compiled=serving.compile,
        speculate=serving.speculate,
        queue=serving.queue + rows,  # those that are about to get a row wait too; the service counts exactly
    )


def rows_within(model: ModelWords, serving: ServingWords, bundle: Bundle) -> int:
    """How many requests of the whole window are answered at once. ValueError where it is none."""
    if serving.cache_gb is None or model.infer_backend == "vllm":  # which has a budget of its own
        return serving.max_concurrent
    longest = bundle.config.max_seq_len
    window = longest if model.max_seq_len else min(longest, WINDOW)
    each = bundle.model.new_cache(rows=1, size=window, device="meta").nbytes
    rows = min(serving.max_concurrent, int(serving.cache_gb * 1e9 // each))
    if rows < 1:
        raise ValueError(
            f"cache_gb: got {serving.cache_gb}, expected at least {each / 1e9:.3g} for the {window} positions of one "
            "request; raise it or lower max_seq_len"
        )
    return rows

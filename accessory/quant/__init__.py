"""Quantised storage for linears: swaps a Linear's weight and its product, nothing else.

Must not know which model the linears belong to, nor where weights come from.
"""

from accessory.quant.nf4 import Nf4, quantise

__all__ = ["Nf4", "quantise"]

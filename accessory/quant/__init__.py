"""Other storage for linears, quantised or reordered: swaps a Linear's weight and its product, nothing else.

Must not know which model the linears belong to, nor where weights come from.
"""

from accessory.quant.nf4 import Nf4, quantise
from accessory.quant.repacked import Packer, repack, settle

__all__ = ["Nf4", "Packer", "quantise", "repack", "settle"]

"""Kernels of our own for CPUs that multiply bf16 themselves (AVX512-BF16): products, and the attention of answers.

Must not know models. They are compiled by the machine's g++ at first use and kept; where that cannot be, `available` is
False, and whoever asks goes on with torch's.
"""

from accessory.native.attending import attend, attends, store
from accessory.native.building import available
from accessory.native.memory import widen, widened, zeros
from accessory.native.pointwise import norm, norm_backward, rotate, serves, swiglu, swiglu_backward
from accessory.native.product import GROUP, Packed

__all__ = [
    "GROUP",
    "Packed",
    "attend",
    "attends",
    "available",
    "norm",
    "norm_backward",
    "rotate",
    "serves",
    "store",
    "swiglu",
    "swiglu_backward",
    "widen",
    "widened",
    "zeros",
]

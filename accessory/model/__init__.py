"""The decoder: ids and feature rows in, hidden states, logits, the loss or the next id out.

Must not know text, files or pictures.
"""

from accessory.model.cache import Cache
from accessory.model.head import IGNORED
from accessory.model.llama import Llama, LlamaConfig, cuts_of, init_weights
from accessory.model.parallel import Linear
from accessory.model.sample import Sampling, sample

__all__ = ["IGNORED", "Cache", "Linear", "Llama", "LlamaConfig", "Sampling", "cuts_of", "init_weights", "sample"]

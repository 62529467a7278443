"""Settings of a verb or script: a dataclass, filled from its defaults, then a YAML or JSON file, then flags.

Must not know what any setting means, nor import torch. A field's name, type, default and the string under it are all
there is to say about a knob; flags, checks and `--help` come from them.
"""

from accessory.config.knobs import help_text
from accessory.config.parse import Given, collect, dump, nearest, parse

__all__ = ["Given", "collect", "dump", "help_text", "nearest", "parse"]

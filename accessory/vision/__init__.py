"""Vision: pixels in, feature rows out.

Knows no language model, no tokens, no files: it is told the width of its rows and answers with tensors.
"""

from accessory.vision.config import VisionConfig
from accessory.vision.encoder import build_vision

__all__ = ["VisionConfig", "build_vision"]

"""`accessory bench WHAT --shape SHAPE [--peer transformers]`: ours, a peer and the machine's ceilings in one run.

Must not hold what it measures: models come from their rooms, with random weights.
"""

from accessory.bench.run import main

__all__ = ["main"]

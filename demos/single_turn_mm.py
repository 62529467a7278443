"""Ask a multimodal model about a picture, one question at a time.

Must not do the work: accessory.serve.terminal does. Runs as `python` or under `torchrun --nproc-per-node=N`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    if find_spec("accessory") is None:  # a checkout that is not installed
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from accessory.cli import guard
    from accessory.serve.terminal import talk

    sys.exit(guard(lambda: talk("single_turn_mm")))

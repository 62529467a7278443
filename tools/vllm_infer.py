"""LLaMA-Factory's scripts/vllm_infer.py: a dataset through vLLM. All of it lives in accessory.serve.vllm_infer.

Must not hold logic.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accessory.cli import guard
from accessory.serve.vllm_infer import main

if __name__ == "__main__":
    sys.exit(guard(main))

"""The package face: hands the toolkit's main names on, each imported when it is first asked for.

Must not import any room by itself, so that `import accessory` costs nothing and `accessory --help` answers at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "LlamaConfig": "accessory.model",
    "Llama": "accessory.model",
    "Cache": "accessory.model",
    "open_folders": "accessory.checkpoint",
    "open_tokenizer": "accessory.data.tokenizer",
    "open_model": "accessory.assemble",
    "Engine": "accessory.engine",
    "load": "accessory.face.loaded",
    "Model": "accessory.face.loaded",
    "GenerationConfig": "accessory.face.generation",
    "ModelType": "accessory.face.swift",
    "get_model_tokenizer": "accessory.face.swift",
    "get_template": "accessory.face.swift",
    "get_default_template_type": "accessory.face.swift",
    "inference": "accessory.face.swift",
    "inference_stream": "accessory.face.swift",
    "seed_everything": "accessory.face.swift",
    "SftArguments": "accessory.face.mains",
    "InferArguments": "accessory.face.mains",
    "ExportArguments": "accessory.face.mains",
    "sft_main": "accessory.face.mains",
    "infer_main": "accessory.face.mains",
    "export_main": "accessory.face.mains",
    "merge_lora_main": "accessory.face.mains",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import the home of `name` and hand the name on; AttributeError when no room offers it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'accessory' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Names for completion, the lazy ones included."""
    return sorted([*globals(), *_HOMES])

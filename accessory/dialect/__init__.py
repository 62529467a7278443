"""The words of the verbs: those that several share, and other tools' words and defaults made ours.

Must not import torch, nor know what a word does.
"""

from accessory.dialect.layout import LAYOUTS, Layout, last_run, run_folder
from accessory.dialect.models import MODELS, ModelType, find_model
from accessory.dialect.translate import Translation, pending, translate, translator
from accessory.dialect.words import GenerationWords, ModelWords

__all__ = [
    "LAYOUTS",
    "MODELS",
    "GenerationWords",
    "Layout",
    "ModelType",
    "ModelWords",
    "Translation",
    "find_model",
    "last_run",
    "pending",
    "run_folder",
    "translate",
    "translator",
]

"""`accessory export`: a model and its adapters to one folder in Hugging Face's, Meta's or Accessory's form, verified.

Must not know training, nor conversations beyond the few questions that it compares answers by.
"""

from accessory.export.main import main

__all__ = ["main"]

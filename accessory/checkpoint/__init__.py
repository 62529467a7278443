"""State dicts and their files: any folder of weights to any tensor-parallel layout, and back.

Knows names and cuts; must not build a model.
"""

from accessory.checkpoint.headers import Spec
from accessory.checkpoint.read import Checkpoint, open_folders
from accessory.checkpoint.write import FolderWriter, Form, Stream, write_folder

__all__ = ["Checkpoint", "FolderWriter", "Form", "Spec", "Stream", "open_folders", "write_folder"]

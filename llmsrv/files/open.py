"""Opens a model in any supported format."""

import os
from pathlib import Path

from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.folder import open_folder
from llmsrv.files.gguf import GGUFFile
from llmsrv.files.gguf import open_gguf


def open_model(path: Path) -> GGUFFile | ModelFolder:
    """Opens a GGUF file (the first part of a split model) or a Hugging Face folder.

    Raises ModelError, which names the file and what was expected."""
    if os.path.isdir(path):  # Path.is_dir may raise where this returns False
        return open_folder(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: contains only weights; name the folder it is in")
    return open_gguf(path)

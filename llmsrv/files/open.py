"""Opens a model, whatever its format."""

import os
from pathlib import Path

from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.folder import open_folder
from llmsrv.files.gguf import GGUFFile
from llmsrv.files.gguf import open_gguf


def open_model(path: Path) -> GGUFFile | ModelFolder:
    """A GGUF file (the first, where the model is split) or a Hugging Face folder; ModelError, which
    names the file and what was expected, when it is refused."""
    if os.path.isdir(path):  # Path.is_dir raises when it is not to be looked at
        return open_folder(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: holds weights alone; name the folder it is in")
    return open_gguf(path)

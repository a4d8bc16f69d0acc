"""A model with the first few layers of another one."""

import re
from array import array
from pathlib import Path

from llmsrv.files.gguf import open_gguf
from tests.support.gguf_writer import write_gguf

LAYER = re.compile(r"blk\.(\d+)\.")


def write_cut_model(source: Path, target: Path, num_layers: int) -> Path:
    """Writes the GGUF file `target` with the first layers of the GGUF file `source`."""
    whole = open_gguf(source)
    architecture = whole.metadata["general.architecture"]
    metadata = {
        key: list(value) if isinstance(value, array) else value
        for key, value in whole.metadata.items()
    }
    metadata[f"{architecture}.block_count"] = num_layers
    tensors = {}
    for name, info in whole.tensors.items():
        layer = LAYER.match(name)
        if layer is None or int(layer[1]) < num_layers:
            tensors[name] = info.type, info.shape, bytes(whole.data(info))
    return write_gguf(target, metadata, tensors)

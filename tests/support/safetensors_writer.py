"""Writes small safetensors files and Hugging Face folders for tests.

Deliberately shares no code with llmsrv.files.safetensors, the reader it tests.
Source: the safetensors documentation, "Format".
"""

import json
import struct
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RawTensor = tuple[str, Sequence[int], bytes]  # dtype, shape, data
Tensors = Mapping[str, NDArray[np.generic] | RawTensor]
DTYPES = {"<f4": "F32", "<f2": "F16"}


def safetensors_bytes(header: bytes | Mapping[str, object], data: bytes = b"") -> bytes:
    """The bytes of a file; the header is given as bytes, or as a mapping to write as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(path: Path, tensors: Tensors) -> Path:
    """Writes float32 or float16 arrays, or (dtype, shape, bytes), in this order, without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        if not isinstance(tensor, tuple):
            tensor = DTYPES[tensor.dtype.str], tensor.shape, tensor.tobytes()
        dtype, shape, data = tensor
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(safetensors_bytes(text + b" " * (-len(text) % 8), body))
    return path


def write_folder(path: Path, *shards: Tensors, **files: object) -> Path:
    """Writes a folder with config.json and the given files, named without their suffix.

    A file is a JSON object, or text for chat_template.  Several shards get an index."""
    path.mkdir(exist_ok=True)
    for stem, content in {"config": {"model_type": "llama"}, **files}.items():
        if isinstance(content, str):
            (path / f"{stem}.jinja").write_text(content)
        else:
            (path / f"{stem}.json").write_text(json.dumps(content))
    if len(shards) == 1:
        write_safetensors(path / "model.safetensors", shards[0])
        return path
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
    for name, shard in zip(names, shards):
        write_safetensors(path / name, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path

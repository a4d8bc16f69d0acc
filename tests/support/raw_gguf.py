"""Builds GGUF files byte by byte, valid or not.

Source: the GGUF specification, docs/gguf.md of the ggml project.
"""

import struct
from pathlib import Path

STRING, ARRAY = 8, 9  # metadata value types


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(keys: int, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: bytes, shape: list[int], type_: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; shape innermost first, as in the file."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", type_, offset)


def write_model(path: Path, data: bytes) -> Path:
    (path / "model.gguf").write_bytes(data)
    return path / "model.gguf"


KEY = string(b"key")

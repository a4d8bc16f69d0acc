"""Reads safetensors files: the name, type, shape and offset of each tensor.  Maps the file and
copies no weights; knows nothing of architectures, folders or numpy.

Files are untrusted.  The tensors must follow each other without gaps and fill the file; anything
else raises ModelError, which names the file and the tensor.

    length     u64, little-endian
    header     JSON of that length: tensor name -> its dtype, shape and data_offsets [begin, end]
    data       to the end of the file; begin and end count from here
The header's "__metadata__" holds strings for people and is ignored.
Source: the safetensors documentation, "Format".
"""

import struct
from math import prod
from pathlib import Path
from typing import NoReturn

from llmsrv.errors import ModelError
from llmsrv.files.mapped import MAX_JSON_BYTES
from llmsrv.files.mapped import MAX_TENSORS
from llmsrv.files.mapped import TensorInfo
from llmsrv.files.mapped import decode_utf8
from llmsrv.files.mapped import map_file
from llmsrv.files.mapped import parse_object
from llmsrv.files.mapped import short_repr

LENGTH = struct.Struct("<Q")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_DIMENSIONS = 8
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class SafetensorsFile:
    """An open file.

    view      the whole file's bytes; the mapping lives as long as this view or a slice of it
    tensors   by name, in file order"""

    def __init__(self, path: Path, view: memoryview, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.view = view
        self.tensors = tensors


def open_safetensors(path: Path) -> SafetensorsFile:
    """Opens and checks a safetensors file; refuses it with ModelError and no other exception."""
    data = map_file(path, "a safetensors file", LENGTH.size)
    (length,) = LENGTH.unpack_from(data)
    start = LENGTH.size + length
    if length > MAX_JSON_BYTES:
        raise ModelError(
            f"{path}: claims a header of {length} bytes; the limit is {MAX_JSON_BYTES}; is it a "
            "safetensors file?"
        )
    if start > len(data):
        raise ModelError(f"{path}: ends inside its header; is the download complete?")
    text = decode_utf8(path, data[LENGTH.size:start])
    if not text.startswith("{"):
        raise ModelError(f"{path}: is not a safetensors file: its header starts with {text[:1]!r}")
    header = parse_object(path, text)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{path}: has {len(header)} tensors; the limit is {MAX_TENSORS}")
    tensors = [_read_entry(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    _check_offsets(path, tensors, start, len(data))
    return SafetensorsFile(path, memoryview(data), {tensor.name: tensor for tensor in tensors})


def _read_entry(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    """Reads one entry of the header; the data begins at `start`."""

    def refuse(reason: str) -> NoReturn:
        raise ModelError(f"{path}: tensor {short_repr(name)} {reason}")

    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        refuse(f"must have {', '.join(sorted(ENTRY_KEYS))}, got {short_repr(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(f"has dtype {short_repr(dtype)}; only {', '.join(ITEM_BYTES)} are supported")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or 0 in shape:
        refuse(f"has shape {short_repr(shape)}; expected up to {MAX_DIMENSIONS} integers above 0")
    if not _are_counts(offsets) or len(offsets) != 2:
        refuse(f"has data_offsets {short_repr(offsets)}; expected two integers")
    begin, end = offsets
    size = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != size:
        refuse(f"has data_offsets of {end - begin} bytes; {dtype} {short_repr(shape)} needs {size}")
    return TensorInfo(name, dtype, tuple(shape), start + begin, size)


def _are_counts(value: object) -> bool:
    """True for a list of u64 values.  A bool does not count, although Python calls it an int."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)


def _check_offsets(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Checks that the tensors, sorted by offset, fill the file from `start` without gaps."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "follows a gap"
            raise ModelError(f"{path}: tensor {short_repr(tensor.name)} {what}")
        end += tensor.size
    if end > size:
        raise ModelError(
            f"{path}: its tensors end at byte {end}, but the file has {size}; "
            "is the download complete?"
        )
    if end < size:
        raise ModelError(f"{path}: has {size - end} bytes after its last tensor")

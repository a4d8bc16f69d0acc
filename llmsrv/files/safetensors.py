"""Reads safetensors files: each tensor's name, type, shape and place.  Maps the file and copies no
weights; knows nothing of architectures, folders or numpy.

A file may come from anywhere, so nothing in it is believed: the tensors must lie side by side and
fill the file, and what does not fit raises ModelError with the file and the tensor at fault.

    length     u64, little-endian
    header     JSON of that length: tensor's name -> its dtype, shape and data_offsets [begin, end]
    data       to the end of the file; begin and end count from here
The header's "__metadata__" holds strings for people and is not read.
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
from llmsrv.files.mapped import decoded
from llmsrv.files.mapped import map_file
from llmsrv.files.mapped import parse_object
from llmsrv.files.mapped import shown

LENGTH = struct.Struct("<Q")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_DIMENSIONS = 8
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class SafetensorsFile:
    """An open file.  The mapping lives as long as `view`, the whole file's bytes, or a part of it.

    tensors   by name, in the order in which they lie in the file"""

    def __init__(self, path: Path, view: memoryview, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.view = view
        self.tensors = tensors


def open_safetensors(path: Path) -> SafetensorsFile:
    """Opens and checks a safetensors file; raises ModelError, and nothing else, when refused."""
    data = map_file(path, "a safetensors file", LENGTH.size)
    (length,) = LENGTH.unpack_from(data)
    start = LENGTH.size + length
    if length > MAX_JSON_BYTES:
        raise ModelError(
            f"{path}: claims a header of {length} bytes; at most {MAX_JSON_BYTES} are read; is it "
            "a safetensors file?"
        )
    if start > len(data):
        raise ModelError(f"{path}: ends inside its header; is it a whole download?")
    text = decoded(path, data[LENGTH.size:start])
    if not text.startswith("{"):
        raise ModelError(f"{path}: is not a safetensors file: its header starts with {text[:1]!r}")
    header = parse_object(path, text)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{path}: has {len(header)} tensors; at most {MAX_TENSORS} are read")
    tensors = [_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    _check_places(path, tensors, start, len(data))
    return SafetensorsFile(path, memoryview(data), {tensor.name: tensor for tensor in tensors})


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    """One entry of the header; `start` is where the data begins."""

    def refuse(reason: str) -> NoReturn:
        raise ModelError(f"{path}: tensor {shown(name)} {reason}")

    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        refuse(f"must have {', '.join(sorted(ENTRY_KEYS))}, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(f"has the dtype {shown(dtype)}; {', '.join(ITEM_BYTES)} are read")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or 0 in shape:
        refuse(f"has the shape {shown(shape)}; expected up to {MAX_DIMENSIONS} counts above 0")
    if not _are_counts(offsets) or len(offsets) != 2:
        refuse(f"has the data_offsets {shown(offsets)}; expected two counts")
    begin, end = offsets
    size = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != size:
        refuse(f"has data_offsets of {end - begin} bytes; {dtype} {shown(shape)} takes {size}")
    return TensorInfo(name, dtype, tuple(shape), start + begin, size)


def _are_counts(value: object) -> bool:
    """Whether this is a list of u64, as the format has them; a bool is an int to Python."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)


def _check_places(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """The tensors, by offset, must lie side by side from `start` to the end of the file."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "follows a hole"
            raise ModelError(f"{path}: tensor {shown(tensor.name)} {what}")
        end += tensor.size
    if end > size:
        raise ModelError(
            f"{path}: its tensors end at byte {end}, but the file has {size}; "
            "is it a whole download?"
        )
    if end < size:
        raise ModelError(f"{path}: has {size - end} bytes after its last tensor")

"""Reads GGUF files: metadata, and the name, type, shape and offset of each tensor.  Maps the file
and copies no weights; knows nothing of architectures, tokenizers or numpy.

Files are untrusted.  Every count is checked against the remaining bytes before anything is
allocated for it, and every tensor must lie inside the file.  Violations raise ModelError, which
names the file and the key or tensor.

    magic "GGUF", version u32, tensor count u64, key count u64
    keys       name, value type u32, value
    tensors    name, number of dimensions u32, dimensions u64 (innermost first), type u32, offset
    data       starts at the next multiple of general.alignment; offsets (u64) count from here
A string is a u64 length and its bytes; an array is an item type u32, a u64 count and the items.
A large model may be split into several such files, NAME-00001-of-00003.gguf and so on.
Source: the GGUF specification (docs/gguf.md of the ggml project), versions 2 and 3, little-endian.
"""

import mmap
import re
import struct
from array import array
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NoReturn
from typing import TypeVar

from llmsrv.errors import ModelError
from llmsrv.files.mapped import MAX_TENSORS
from llmsrv.files.mapped import TensorInfo
from llmsrv.files.mapped import map_file
from llmsrv.files.mapped import short_repr
from llmsrv.files.tensor_types import TENSOR_TYPES

T = TypeVar("T")

HEADER = struct.Struct("<4sIQQ")
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

# Far above any known model (gpt-oss: 0.65 M strings in its tokens and merges), and small enough to
# refuse a crafted header within one second and 100 MB.
MAX_HEADER_BYTES = 1 << 26
MAX_KEYS = 1 << 16
MAX_ITEMS = 1 << 20  # strings and booleans in all arrays together
MAX_KEY_BYTES = (1 << 16) - 1  # this and the next three limits come from the specification
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MIN_ALIGNMENT = 8

# Numeric metadata types.  The format letters of struct and array are the same for these.
NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
BOOL, STRING, ARRAY = 7, 8, 9


class GGUFFile:
    """An open file, or all the files of a split model as one.  A mapping lives as long as this
    object or any view from data().

    path       of the first file
    metadata   of the first file, in file order: str (invalid UTF-8 as surrogate escapes), int,
               float, bool, list[str], list[bool], or array.array for numbers
    tensors    of all files, by name, in file order
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, object],
        tensors: dict[str, TensorInfo],
        views: dict[str, memoryview],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self.views = views  # tensor name -> its whole file

    def data(self, tensor: TensorInfo) -> memoryview:
        """The tensor's bytes, read-only, straight from the mapped file.

        If another process truncates the file, reading past its new end raises SIGBUS.  So only the
        engine process, which can be restarted, reads weights."""
        end = tensor.offset + tensor.size
        return self.views[tensor.name][tensor.offset:end]

    def get(self, key: str, kind: type[T]) -> T | None:
        """Returns a metadata value, None if missing; ModelError if it is not a `kind`."""
        value = self.metadata.get(key)
        # In Python a bool is an int; in a model file it is not.
        if value is None or (isinstance(value, kind) and (type(value) is bool) is (kind is bool)):
            return value
        got, wanted = type(value).__name__, kind.__name__
        raise ModelError(f"{self.path}: key '{key}' must be {wanted}, but it is {got}")


def open_gguf(path: Path) -> GGUFFile:
    """Opens and checks a GGUF file; for the first part of a split model, opens all parts.

    Refuses a file with ModelError and no other exception.  A file with 49k tokens and 49k merges
    takes 0.04 s."""
    first = _open_one(path)
    count = first.get("split.count", int) or 1  # 0 after the parts have been merged again
    return first if count == 1 else _open_parts(first, count)


def _open_one(path: Path) -> GGUFFile:
    reader = _Reader(path, map_file(path, "a GGUF file", HEADER.size))
    try:
        return reader.read_file()
    except struct.error:
        reader.refuse_truncated()


def _open_parts(first: GGUFFile, count: int) -> GGUFFile:
    """Joins a split model: the first part has the metadata, each part has its own tensors.

    Source: gguf-split of the ggml project."""
    names = _part_names(first.path, count)
    parts = [first, *(_open_one(first.path.with_name(name)) for name in names[1:])]
    tensors: dict[str, TensorInfo] = {}
    views: dict[str, memoryview] = {}
    for number, part in enumerate(parts):
        for key, wanted in (("split.no", number), ("split.count", count)):
            if part.get(key, int) != wanted:
                found = part.metadata.get(key)
                raise ModelError(f"{part.path}: key '{key}' is {found}; expected {wanted}")
        twice = part.tensors.keys() & tensors.keys()
        if twice:
            raise ModelError(
                f"{part.path}: has tensor {short_repr(min(twice))}, which an earlier part also has"
            )
        tensors |= part.tensors
        views |= part.views
    total = first.get("split.tensors.count", int)
    if total != len(tensors):
        raise ModelError(
            f"{first.path}: key 'split.tensors.count' is {total}, but the parts have {len(tensors)}"
        )
    return GGUFFile(first.path, first.metadata, tensors, views)


def _part_names(first: Path, count: int) -> list[str]:
    """NAME-00001-of-00003.gguf and so on; ModelError if `first` is not named that way."""
    match = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", first.name)
    if match is None or int(match[3]) != count:
        wanted = f"NAME-00001-of-{count:05d}.gguf and so on"
        raise ModelError(f"{first}: is one of {count} parts; they must be named {wanted}")
    names = [f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if first.name != names[0]:
        part = f"part {int(match[2])} of {count}"
        raise ModelError(f"{first}: is {part}; name the first, {names[0]}")
    return names


class _Reader:
    """Reads a mapped file from front to back; `at` is the next byte.  Reading past the end or past
    MAX_HEADER_BYTES raises struct.error, from struct itself or from our own checks."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.items_left = MAX_ITEMS

    def refuse(self, reason: str) -> NoReturn:
        raise ModelError(f"{self.path}: {reason}") from None

    def refuse_truncated(self) -> NoReturn:
        if self.end < len(self.data):
            self.refuse(f"has a header of more than {MAX_HEADER_BYTES} bytes")
        self.refuse(f"ends inside its header, at byte {self.end}; is the download complete?")

    def read_file(self) -> GGUFFile:
        magic, version, num_tensors, num_keys = HEADER.unpack_from(self.data)
        self.at = HEADER.size
        self.check_version(magic, version)
        if num_keys > MAX_KEYS:
            self.refuse(f"claims {num_keys} metadata keys; the limit is {MAX_KEYS}")
        if num_tensors > MAX_TENSORS:
            self.refuse(f"claims {num_tensors} tensors; the limit is {MAX_TENSORS}")
        metadata: dict[str, object] = {}
        for _ in range(num_keys):
            self.read_key_into(metadata)
        entries = [self.read_tensor() for _ in range(num_tensors)]
        alignment = self.alignment(metadata)
        start = -(-self.at // alignment) * alignment
        tensors = self.locate_tensors(entries, start, alignment)
        views = dict.fromkeys(tensors, memoryview(self.data))
        return GGUFFile(self.path, metadata, tensors, views)

    def check_version(self, magic: bytes, version: int) -> None:
        if magic != b"GGUF":
            self.refuse(f"is not a GGUF file: it starts with {magic!r}")
        if version and version & 0xFFFF == 0:
            self.refuse("is a big-endian GGUF file; only little-endian files are supported")
        if version not in (2, 3):
            self.refuse(f"has GGUF version {version}; only versions 2 and 3 are supported")

    # ---- Metadata

    def read_key_into(self, metadata: dict[str, object]) -> None:
        key = self.read_string(MAX_KEY_BYTES, "a metadata key")
        if key in metadata:
            self.refuse(f"has the key {short_repr(key)} twice")
        metadata[key] = self.read_value(key, self.read_int(U32))

    def read_value(self, key: str, type_id: int) -> object:
        if type_id == STRING:
            return self.read_string(MAX_HEADER_BYTES, f"key {short_repr(key)}")
        if type_id == BOOL:
            return self.read_bools(key, self.read_bytes(1))[0]
        if type_id == ARRAY:
            return self.read_array(key, self.read_int(U32), self.read_int(U64))
        if type_id not in NUMBERS:
            self.refuse(f"key {short_repr(key)} has the unknown value type {type_id}")
        (number,) = NUMBERS[type_id].unpack(self.read_bytes(NUMBERS[type_id].size))
        return number

    def read_array(self, key: str, type_id: int, count: int) -> object:
        if type_id == STRING:
            return self.read_strings(key, count)
        if type_id == BOOL:
            self.count_items(key, count)
            return self.read_bools(key, self.read_bytes(count))
        if type_id == ARRAY:
            self.refuse(f"key {short_repr(key)} is an array of arrays, which no model needs")
        if type_id not in NUMBERS:
            self.refuse(f"key {short_repr(key)} has items of the unknown value type {type_id}")
        number = NUMBERS[type_id]
        values = array(number.format[-1])
        values.frombytes(memoryview(self.data)[self.advance(count * number.size)])
        return values

    def read_strings(self, key: str, count: int) -> list[str]:
        """The hot loop of opening a file: a vocabulary has a hundred thousand strings."""
        self.count_items(key, count)
        data, at, end = self.data, self.at, self.end
        length_at = U64.unpack_from
        texts = []
        for _ in range(count):
            (length,) = length_at(data, at)
            start = at + 8
            at = start + length
            if at > end:
                raise struct.error
            texts.append(data[start:at].decode("utf-8", "surrogateescape"))
        self.at = at
        return texts

    def count_items(self, key: str, count: int) -> None:
        self.items_left -= count
        if self.items_left < 0:
            self.refuse(f"key {short_repr(key)} has {count} items; the limit is {MAX_ITEMS}")

    def read_bools(self, key: str, data: bytes) -> list[bool]:
        if data.strip(b"\0\1"):
            self.refuse(f"key {short_repr(key)} has a boolean that is neither 0 nor 1")
        return [byte == 1 for byte in data]

    # ---- Tensors

    def read_tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Reads one entry; returns its name, shape, type number and offset in the data."""
        name = self.read_string(MAX_NAME_BYTES, "a tensor's name")
        num_dimensions = self.read_int(U32)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            self.refuse(
                f"tensor {short_repr(name)} has {num_dimensions} dimensions; expected 1 to 4"
            )
        shape = [self.read_int(U64) for _ in range(num_dimensions)]
        return name, tuple(reversed(shape)), self.read_int(U32), self.read_int(U64)

    def locate_tensors(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Returns the tensors by name; checks that each lies in the file and none overlap."""
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                self.refuse(f"has the tensor {short_repr(name)} twice")
            if offset % alignment:
                self.refuse(f"tensor {short_repr(name)} is not aligned to {alignment} bytes")
            type_name, size = self.type_and_size(name, shape, type_id)
            tensors[name] = TensorInfo(name, type_name, shape, start + offset, size)
            end = start + offset + size
            if end > len(self.data):
                self.refuse(
                    f"tensor {short_repr(name)} ends at byte {end}, but the file has "
                    f"{len(self.data)}; is the download complete?"
                )
        for a, b in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
            if a.offset + a.size > b.offset:
                self.refuse(f"tensors {short_repr(a.name)} and {short_repr(b.name)} overlap")
        return tensors

    def type_and_size(self, name: str, shape: tuple[int, ...], type_id: int) -> tuple[str, int]:
        """Returns the name of the type and the tensor's size in bytes."""
        if type_id not in TENSOR_TYPES:
            self.refuse(f"tensor {short_repr(name)} has the unknown type {type_id}")
        type_name, block_size, block_bytes = TENSOR_TYPES[type_id]
        if 0 in shape:
            self.refuse(f"tensor {short_repr(name)} has a dimension of 0: {shape}")
        if shape[-1] % block_size:
            self.refuse(
                f"tensor {short_repr(name)} has rows of {shape[-1]} values; {type_name} needs a "
                f"multiple of {block_size}"
            )
        return type_name, prod(shape) // block_size * block_bytes

    def alignment(self, metadata: dict[str, object]) -> int:
        alignment = metadata.get("general.alignment", 32)
        is_power_of_two = type(alignment) is int and alignment > 0 and alignment.bit_count() == 1
        if type(alignment) is not int or not is_power_of_two or alignment < MIN_ALIGNMENT:
            self.refuse(
                "key 'general.alignment' must be a power of two and at least 8, "
                f"got {short_repr(alignment)}"
            )
        return alignment

    # ---- Elements

    def read_int(self, number: struct.Struct) -> int:
        value: int = number.unpack_from(self.data, self.at)[0]
        self.at += number.size
        return value

    def read_string(self, limit_bytes: int, what: str) -> str:
        length = self.read_int(U64)
        if length > limit_bytes:
            self.refuse(f"{what} claims {length} bytes; the limit is {limit_bytes}")
        return self.read_bytes(length).decode("utf-8", "surrogateescape")

    def read_bytes(self, size: int) -> bytes:
        return self.data[self.advance(size)]

    def advance(self, size: int) -> slice:
        """Returns where the next `size` bytes are, and moves past them."""
        start = self.at
        self.at += size
        if self.at > self.end:
            raise struct.error
        return slice(start, self.at)

"""What the readers of model files share: safe opening, mapping, tensor infos, and checked JSON.
Knows no particular format."""

import json
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmsrv.errors import ModelError

# Larger than any model known to fit one machine (4 MB of index for 44,000 tensors, 1 MB of added
# tokens), and small enough to refuse crafted JSON within one second and 64 MiB.
MAX_TENSORS = 1 << 16
MAX_JSON_BYTES = 5 << 20
MAX_JSON_ITEMS = 12 * MAX_TENSORS


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model.

    type     ggml's name of the storage type, such as "Q4_1" or "BF16"
    shape    outermost first: (rows, columns); none is zero
    offset   bytes from the start of its file
    size     bytes
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


def map_file(path: Path, format: str, min_bytes: int) -> mmap.mmap:
    """Maps a regular file of at least min_bytes read-only, for as long as a view of it lives.

    If another process truncates the file, reading past its new end raises SIGBUS.
    Raises ModelError, which says that `format` was expected, for example "a GGUF file"."""
    with _open_regular_file(path, format) as (descriptor, size):
        if size < min_bytes:
            raise ModelError(f"{path}: is too short for {format}: {size} bytes")
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)


def read_text(path: Path, format: str) -> str:
    """Reads a regular UTF-8 file of at most MAX_JSON_BYTES; ModelError if it is not one.

    The byte order mark that some editors put at the beginning is left out.
    """
    with _open_regular_file(path, format) as (descriptor, size):
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: has {size} bytes; the limit is {MAX_JSON_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_JSON_BYTES)
    return decode_utf8(path, data).removeprefix("\ufeff")


def decode_utf8(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8 at byte {error.start}") from None


@contextmanager
def _open_regular_file(path: Path, format: str) -> Iterator[tuple[int, int]]:
    """Opens a regular file; yields its descriptor and its size in bytes."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise ModelError(f"{path}: is {what}; expected {format}")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a null byte or a surrogate in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{path}: cannot be read: {reason}") from None


def parse_object(path: Path, text: str) -> dict[str, object]:
    """Parses `text`, which was read from `path`, as a JSON object.

    Raises ModelError for anything else, for a duplicate key, and for more than MAX_JSON_ITEMS
    values."""
    if sum(map(text.count, "[{,")) > MAX_JSON_ITEMS:
        raise ModelError(f"{path}: has more than {MAX_JSON_ITEMS} values")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ModelError(f"{path}: has the key {short_repr(twice)} twice")
        return entries

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ModelError(f"{path}: is JSON nested too deeply") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise ModelError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return value


def short_repr(value: object) -> str:
    """repr() of a value from a file, cut to fit into a message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."

"""llmsrv.files.gguf on damaged and hostile files: it refuses them, quickly and in little memory."""

import os
import random
import resource
import struct
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.errors import ModelError
from llmsrv.files.gguf import MAX_ITEMS
from llmsrv.files.gguf import MAX_KEYS
from llmsrv.files.gguf import open_gguf
from llmsrv.files.mapped import MAX_TENSORS
from tests.support.fresh_process import open_in_a_fresh_process
from tests.support.gguf_writer import Typed
from tests.support.gguf_writer import write_gguf
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but
from tests.support.raw_gguf import ARRAY
from tests.support.raw_gguf import KEY
from tests.support.raw_gguf import STRING
from tests.support.raw_gguf import header
from tests.support.raw_gguf import string
from tests.support.raw_gguf import tensor
from tests.support.raw_gguf import write_model
from tests.support.refusals import refusal_message

refusal = partial(refusal_message, open_gguf)


def opens_or_is_refused(path: Path) -> None:
    """Any exception but ModelError fails the test."""
    start = time.process_time()
    try:
        file = open_gguf(path)
        for info in file.tensors.values():
            assert len(file.data(info)) == info.size > 0
    except ModelError:
        pass
    assert time.process_time() - start < 1


@given(data=st.data())
def test_damaged_files_are_either_read_or_refused(tmp_path, data):
    whole = small_file(tmp_path)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    length = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    opens_or_is_refused(write_model(tmp_path, bytes(damaged[:length])))


def small_file(folder: Path) -> bytes:
    """Every kind of value and two tensors in less than 1 kB, most of it header."""
    metadata = {
        "text": "hello",
        "words": ["a", "bc", ""],
        "numbers": [1, 2, 3],
        "flags": [True, False],
        "n": 1,
        "x": 0.5,
        "wide": Typed("UINT64", 2**40),
    }
    tensors = {"a": np.ones((2, 3), np.float32), "b": ("Q8_0", (1, 32), bytes(34))}
    return write_gguf(folder / "small.gguf", metadata, tensors, alignment=64).read_bytes()


@pytest.mark.campaign
def test_campaign_of_damaged_files(tmp_path):
    """LLMSRV_SEED and LLMSRV_SECONDS set the seed and duration of the search."""
    seed = int(os.environ.get("LLMSRV_SEED", "0"))
    end = time.monotonic() + float(os.environ.get("LLMSRV_SECONDS", "60"))
    rng = random.Random(seed)
    files = [small_file(tmp_path), write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()[:20000]]
    while time.monotonic() < end:
        damaged = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 1, 2, 8, 100])):
            start = rng.randrange(len(damaged))
            size = rng.choice([1, 1, 4, 8])
            extremes = (b"\xff" * size, bytes(size), rng.randbytes(size))
            damaged[start:start + size] = rng.choice(extremes)
        opens_or_is_refused(write_model(tmp_path, bytes(damaged)))


def one_value(format: str, *words: int, size: int) -> bytes:
    """A file with one key, whose value starts with `words` and continues with zeros."""
    return header(1) + KEY + struct.pack(format, *words) + bytes(size)


HOSTILE = {
    "strings": lambda: one_value("<IIQ", ARRAY, STRING, MAX_ITEMS, size=1 << 23),
    "booleans": lambda: one_value("<IIQ", ARRAY, 7, MAX_ITEMS, size=MAX_ITEMS),
    "more booleans": lambda: one_value("<IIQ", ARRAY, 7, 1 << 25, size=1 << 25),
    "numbers": lambda: one_value("<IIQ", ARRAY, 0, 1 << 25, size=1 << 25),
    "a long string": lambda: one_value("<IQ", STRING, 1 << 25, size=1 << 25),
    "keys": lambda: header(MAX_KEYS) + b"".join(
        string(f"{i:05d}".encode()) + struct.pack("<IB", 0, 0) for i in range(MAX_KEYS - 1)
    ),
    "tensors": lambda: header(0, MAX_TENSORS) + b"".join(
        tensor(f"{i:05d}".encode(), [8], offset=32 * i) for i in range(MAX_TENSORS)
    ),
}


@pytest.mark.parametrize("what", slow_but(HOSTILE, "numbers", "a long string"))
def test_hostile_headers_take_little_time_and_memory(tmp_path, what):
    """At most 64 MiB on top of the file and Python itself, and one second."""
    path = write_model(tmp_path, HOSTILE[what]())
    opened = open_in_a_fresh_process("llmsrv.files.gguf", "open_gguf", path)
    assert opened.error in ("", "ModelError")
    assert opened.peak_bytes < path.stat().st_size + (64 << 20)
    assert opened.seconds < 1


def test_a_header_beyond_64_mib_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with open(path, "wb") as file:
        file.write(header(1) + KEY + struct.pack("<IQ", STRING, 1 << 26))
        file.truncate(1 << 27)  # sparse: takes no space
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "has a header of more than 67108864 bytes" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16

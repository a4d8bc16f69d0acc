"""llmsrv.files.gguf: which files it reads, and which it refuses."""

import os
import struct
import time
from array import array
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmsrv.errors import ModelError
from llmsrv.files.gguf import MAX_ITEMS
from llmsrv.files.gguf import MAX_KEYS
from llmsrv.files.gguf import open_gguf
from llmsrv.files.mapped import MAX_TENSORS
from llmsrv.files.tensor_types import TENSOR_TYPES
from tests.support.gguf_writer import Typed
from tests.support.gguf_writer import write_gguf
from tests.support.gguf_writer import write_tiny_llama
from tests.support.raw_gguf import ARRAY
from tests.support.raw_gguf import KEY
from tests.support.raw_gguf import STRING
from tests.support.raw_gguf import header
from tests.support.raw_gguf import string
from tests.support.raw_gguf import tensor
from tests.support.raw_gguf import write_model
from tests.support.refusals import refusal_message

refusal = partial(refusal_message, open_gguf)


# ---- Files it reads


def test_metadata_reads_back_as_written(tmp_path):
    metadata = {
        "a.bool": True,
        "a.int": 7,
        "a.float": 1.5,
        "a.text": "naïve 東京 🙂",
        "a.empty": "",
        "numbers": [1, -2, 3],
        "flags": [True, False],
        "words": ["", "a", "東京"],
        **{f"t.{t}": Typed(t, 100) for t in ("UINT8", "INT8", "UINT16", "INT16", "INT32")},
        **{f"t.{t}": Typed(t, 2**40) for t in ("UINT64", "INT64")},
        "t.FLOAT64": Typed("FLOAT64", 0.1),
    }
    read = open_gguf(write_gguf(tmp_path / "m.gguf", metadata)).metadata
    assert list(read) == list(metadata)
    for key, value in metadata.items():
        wanted = value.value if isinstance(value, Typed) else value
        got = list(read[key]) if isinstance(read[key], array) else read[key]
        assert got == wanted and type(got) is type(wanted), key


def test_strings_that_are_not_utf8_keep_their_bytes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"one": b"\xff\xfe", "many": [b"a\x80", b"b"]})
    read = open_gguf(path).metadata
    assert read["one"].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert read["many"][0].encode("utf-8", "surrogateescape") == b"a\x80"


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_tensors_read_back_as_written(tmp_path, version, alignment):
    arrays = {
        "rows": np.arange(12, dtype=np.float32).reshape(3, 4),
        "vector": np.arange(5, dtype=np.float16),
        "cube": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
    }
    path = write_gguf(tmp_path / "m.gguf", {}, arrays, version=version, alignment=alignment)
    file = open_gguf(path)
    assert list(file.tensors) == list(arrays)
    for name, wanted in arrays.items():
        info = file.tensors[name]
        assert info.shape == wanted.shape
        assert info.type == {4: "F32", 2: "F16"}[wanted.itemsize]
        assert info.offset % alignment == 0
        assert info.size == wanted.nbytes
        assert file.data(info) == wanted.tobytes()
        assert file.data(info).readonly


def test_a_view_of_a_tensor_outlives_the_file_object(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, {"x": np.ones(4, np.float32)})
    file = open_gguf(path)
    view = file.data(file.tensors["x"])
    del file
    path.unlink()
    assert view == np.ones(4, np.float32).tobytes()


def test_a_file_without_keys_or_tensors_is_read(tmp_path):
    file = open_gguf(write_model(tmp_path, header(0)))
    assert file.metadata == {} and file.tensors == {}


def test_tensors_of_every_ggml_type_have_the_right_size(tmp_path):
    for number, (name, block_size, block_bytes) in TENSOR_TYPES.items():
        data = bytes(3 * 2 * block_bytes)
        raw = {"x": (number, (3, 2 * block_size), data)}
        info = open_gguf(write_gguf(tmp_path / "m.gguf", {}, raw)).tensors["x"]
        assert (info.type, info.size) == (name, len(data))


def test_get_refuses_a_value_of_another_type(tmp_path):
    file = open_gguf(write_gguf(tmp_path / "m.gguf", {"n": 1, "flag": True, "text": "x"}))
    assert file.get("n", int) == 1
    assert file.get("flag", bool) is True
    assert file.get("missing", str) is None
    for key, kind in (("n", str), ("n", bool), ("flag", int), ("text", int), ("n", float)):
        with pytest.raises(ModelError, match=f"key '{key}' must be {kind.__name__}"):
            file.get(key, kind)


def test_the_default_model_opens_in_a_tenth_of_a_second(smollm2):
    seconds = []
    for _ in range(3):
        start = time.process_time()
        file = open_gguf(smollm2)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert file.tensors["token_embd.weight"].type == "Q8_0"


@pytest.mark.compat
@pytest.mark.parametrize("weight_type", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_agrees_with_the_gguf_package(tmp_path, weight_type):
    gguf = pytest.importorskip("gguf")
    path = write_tiny_llama(tmp_path / "m.gguf", weight_type=weight_type)
    assert_equal_to_oracle(path, gguf.GGUFReader(path))


@pytest.mark.compat
def test_agrees_with_the_gguf_package_on_the_default_model(smollm2):
    gguf = pytest.importorskip("gguf")
    assert_equal_to_oracle(smollm2, gguf.GGUFReader(smollm2))


def assert_equal_to_oracle(path, oracle):
    file = open_gguf(path)
    own_fields = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert list(file.metadata) == [key for key in oracle.fields if key not in own_fields]
    for key, value in file.metadata.items():
        got = list(value) if isinstance(value, array) else value
        assert got == oracle.fields[key].contents(), key
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for wanted in oracle.tensors:
        info = file.tensors[wanted.name]
        assert info.type == wanted.tensor_type.name
        assert info.shape == tuple(int(n) for n in reversed(wanted.shape))
        assert (info.offset, info.size) == (wanted.data_offset, wanted.n_bytes)
        assert file.data(info) == wanted.data.tobytes()


# ---- Files it refuses

REFUSED = {
    "nothing": (b"", "is too short for a GGUF file: 0 bytes"),
    "4 bytes": (b"GGUF", "is too short for a GGUF file: 4 bytes"),
    "23 bytes": (header(0)[:23], "is too short for a GGUF file: 23 bytes"),
    "another format": (b"PK\x03\x04" + bytes(30), "is not a GGUF file: it starts with b'PK"),
    "magic reversed": (b"FUGG" + bytes(30), "is not a GGUF file"),
    "version 0": (header(0, version=0), "has GGUF version 0; only versions 2 and 3 are supported"),
    "version 1": (header(0, version=1), "has GGUF version 1; only versions 2 and 3 are supported"),
    "version 4": (header(0, version=4), "has GGUF version 4; only versions 2 and 3 are supported"),
    "big-endian": (header(0, version=3 << 24), "is a big-endian GGUF file"),
    "too many keys": (header(MAX_KEYS + 1), "claims 65537 metadata keys"),
    "too many tensors": (header(0, MAX_TENSORS + 1), "claims 65537 tensors"),
    "2^64-1 keys": (header(2**64 - 1), "claims 18446744073709551615 metadata keys"),
    "2^64-1 tensors": (header(0, 2**64 - 1), "claims 18446744073709551615 tensors"),
    "keys missing": (header(1), "ends inside its header, at byte 24"),
    "tensors missing": (header(0, 1), "ends inside its header, at byte 24"),
    "a key past the end": (header(1) + struct.pack("<Q", 500), "ends inside its header"),
    "a key too long": (header(1) + struct.pack("<Q", 2**63), "a metadata key claims 9223372036"),
    "a string past the end": (
        header(1) + KEY + struct.pack("<IQ", STRING, 1000),
        "ends inside its header",
    ),
    "a string of 2^64-1 bytes": (
        header(1) + KEY + struct.pack("<IQ", STRING, 2**64 - 1),
        "key 'key' claims 18446744073709551615 bytes",
    ),
    "a value type": (header(1) + KEY + struct.pack("<II", 13, 0), "unknown value type 13"),
    "an item type": (
        header(1) + KEY + struct.pack("<IIQ", ARRAY, 77, 0),
        "key 'key' has items of the unknown value type 77",
    ),
    "nested arrays": (
        header(1) + KEY + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(12),
        "key 'key' is an array of arrays",
    ),
    "an array past the end": (
        header(1) + KEY + struct.pack("<IIQ", ARRAY, 4, 1000),
        "ends inside its header",
    ),
    "an array whose size overflows": (
        header(1) + KEY + struct.pack("<IIQ", ARRAY, 10, 2**61 + 1) + bytes(8),
        "ends inside its header",
    ),
    "more strings than fit": (
        header(1) + KEY + struct.pack("<IIQ", ARRAY, STRING, 2**60),
        f"the limit is {MAX_ITEMS}",
    ),
    "strings past the end": (
        header(1) + KEY + struct.pack("<IIQ", ARRAY, STRING, 3) + string(b"a"),
        "ends inside its header",
    ),
    "a boolean of 2": (
        header(1) + KEY + struct.pack("<IB", 7, 2),
        "key 'key' has a boolean that is neither 0 nor 1",
    ),
    "a key twice": (
        header(2) + 2 * (KEY + struct.pack("<II", 4, 1)),
        "has the key 'key' twice",
    ),
    "a tensor twice": (
        header(0, 2) + tensor(b"x", [8]) + tensor(b"x", [8], offset=32) + bytes(200),
        "has the tensor 'x' twice",
    ),
    "a long tensor name": (header(0, 1) + tensor(b"x" * 65, [8]), "name claims 65 bytes"),
    "no dimensions": (header(0, 1) + tensor(b"x", []), "tensor 'x' has 0 dimensions"),
    "five dimensions": (header(0, 1) + tensor(b"x", [1] * 5), "tensor 'x' has 5 dimensions"),
    "a dimension of 0": (header(0, 1) + tensor(b"x", [4, 0]), "'x' has a dimension of 0: (0, 4)"),
    "an unknown type": (header(0, 1) + tensor(b"x", [4], 99), "tensor 'x' has the unknown type 99"),
    "a withdrawn type": (header(0, 1) + tensor(b"x", [4], 4), "tensor 'x' has the unknown type 4"),
    "half a block": (
        header(0, 1) + tensor(b"x", [33], 8) + bytes(200),
        "tensor 'x' has rows of 33 values; Q8_0 needs a multiple of 32",
    ),
    "an offset not aligned": (
        header(0, 1) + tensor(b"x", [4], offset=4) + bytes(200),
        "tensor 'x' is not aligned to 32 bytes",
    ),
    "an offset past the end": (
        header(0, 1) + tensor(b"x", [4], offset=1 << 40) + bytes(200),
        "tensor 'x' ends at byte",
    ),
    "an offset of almost 2^64": (
        header(0, 1) + tensor(b"x", [4], offset=2**64 - 32) + bytes(200),
        "tensor 'x' ends at byte",
    ),
    "a size that overflows to 0": (
        header(0, 1) + tensor(b"x", [2**32, 2**32]) + bytes(200),
        "tensor 'x' ends at byte",
    ),
    "sizes of 2^64-1": (
        header(0, 1) + tensor(b"x", [2**64 - 1] * 4) + bytes(200),
        "tensor 'x' ends at byte",
    ),
    "tensors that overlap": (
        header(0, 2) + tensor(b"x", [16]) + tensor(b"y", [4], offset=32) + bytes(300),
        "tensors 'x' and 'y' overlap",
    ),
}
for _bad in (0, 1, 4, 12, 33, 2**31 + 1):
    REFUSED[f"alignment {_bad}"] = (
        header(1) + string(b"general.alignment") + struct.pack("<II", 4, _bad),
        f"'general.alignment' must be a power of two and at least 8, got {_bad}",
    )
REFUSED["alignment as text"] = (
    header(1) + string(b"general.alignment") + struct.pack("<I", STRING) + string(b"32"),
    "'general.alignment' must be a power of two and at least 8, got '32'",
)


@pytest.mark.parametrize("what", REFUSED)
def test_the_error_says_what_is_wrong_with_a_file(tmp_path, what):
    data, message = REFUSED[what]
    assert message in refusal(write_model(tmp_path, data))


def test_the_message_is_short_and_printable_for_any_key(tmp_path):
    key = string(b"\x1b[2J\n\xff" + b"x" * 60000)
    message = refusal(write_model(tmp_path, header(2) + 2 * (key + struct.pack("<II", 4, 1))))
    assert len(message) < 200 and message.isprintable()


def test_refuses_files_that_are_not_regular(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == "is not a regular file; expected a GGUF file"
    assert refusal(tmp_path) == "is a directory; expected a GGUF file"
    assert refusal(Path("/dev/zero")) == "is not a regular file; expected a GGUF file"
    assert refusal(tmp_path / "missing") == "cannot be read: No such file or directory"
    assert "cannot be read" in refusal(tmp_path / "null\0byte")


def test_refuses_a_file_cut_off_anywhere(tmp_path):
    whole = write_tiny_llama(tmp_path / "whole.gguf", weight_type="Q4_0").read_bytes()
    lengths = {*range(0, len(whole), 4096), *range(0, 200), len(whole) - 1}
    for length in sorted(lengths):
        refusal(write_model(tmp_path, whole[:length]))

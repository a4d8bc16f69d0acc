"""llmsrv.files.safetensors: which files it reads, and which it refuses."""

import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.errors import ModelError
from llmsrv.files.mapped import MAX_JSON_BYTES
from llmsrv.files.safetensors import open_safetensors
from tests.support.fresh_process import open_in_a_fresh_process
from tests.support.parameters import slow_but
from tests.support.refusals import refusal_message
from tests.support.safetensors_writer import safetensors_bytes
from tests.support.safetensors_writer import write_safetensors

TINY = Path(__file__).parent.parent / "data/golden/tiny"


def write_model(folder: Path, data: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(data)
    return folder / "model.safetensors"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def tensor_bytes(file, name):
    info = file.tensors[name]
    return bytes(file.view[info.offset:info.offset + info.size])


refusal = partial(refusal_message, open_safetensors)


# ---- Files it reads


def test_tensors_read_back_as_written(tmp_path):
    arrays = {
        "rows": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.arange(5, dtype=np.float16),
        "brain": ("BF16", (1, 2, 3), bytes(range(12))),
        "scalar": np.array(7, np.float32),
    }
    file = open_safetensors(write_safetensors(tmp_path / "m.safetensors", arrays))
    assert {name: (t.type, t.shape, t.size) for name, t in file.tensors.items()} == {
        "rows": ("F32", (3, 4), 48),
        "half": ("F16", (5,), 10),
        "brain": ("BF16", (1, 2, 3), 12),
        "scalar": ("F32", (), 4),
    }
    assert tensor_bytes(file, "rows") == arrays["rows"].tobytes()
    assert tensor_bytes(file, "half") == arrays["half"].tobytes()
    assert tensor_bytes(file, "brain") == bytes(range(12))
    assert file.view.readonly


def test_tensors_may_be_in_a_different_order_than_in_the_header(tmp_path):
    header = {"b": entry(offsets=(8, 16)), "a": entry()}
    file = open_safetensors(write_model(tmp_path, safetensors_bytes(header, bytes(range(16)))))
    assert list(file.tensors) == ["a", "b"]
    assert tensor_bytes(file, "b") == bytes(range(8, 16))


def test_a_file_without_tensors_is_read(tmp_path):
    assert open_safetensors(write_model(tmp_path, safetensors_bytes(b"{}"))).tensors == {}


@pytest.mark.compat
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_agrees_with_the_safetensors_package(name):
    safetensors = pytest.importorskip("safetensors")
    data = (TINY / name / "model.safetensors").read_bytes()
    file = open_safetensors(TINY / name / "model.safetensors")
    theirs = dict(safetensors.deserialize(data))
    assert file.tensors.keys() == theirs.keys()
    for tensor, wanted in theirs.items():
        info = file.tensors[tensor]
        assert (info.type, list(info.shape)) == (wanted["dtype"], wanted["shape"])
        assert tensor_bytes(file, tensor) == bytes(wanted["data"])


# ---- Files it refuses

HUGE = (1 << 64) - 1
REFUSED = {
    "nothing": (b"", "is too short for a safetensors file: 0 bytes"),
    "7 bytes": (bytes(7), "is too short for a safetensors file: 7 bytes"),
    "a GGUF file": (b"GGUF\3\0\0\0" + bytes(20), "claims a header of 14"),
    "a length of 2^64-1": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
    "a header past the end": (safetensors_bytes(b"{}")[:9], "ends inside its header"),
    "an empty header": (safetensors_bytes(b""), "its header starts with ''"),
    "a list": (safetensors_bytes(b"[]"), "its header starts with '['"),
    "half a header": (safetensors_bytes(b'{"a":'), "is not JSON: Expecting value"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "is not UTF-8 at byte 2"),
    "UTF-16": (safetensors_bytes("{}".encode("utf-16")), "is not UTF-8 at byte 0"),
    "nested deeply": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "is JSON nested too deeply"),
    "a long number": (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"), "is not JSON"),
    "too many values": (
        safetensors_bytes(b'{"a":[' + b"[]," * 1_000_000 + b"1]}"),
        "has more than 786432 values",
    ),
    "a tensor twice": (
        safetensors_bytes(b'{"x": 1, "y": 2, "x": 1}'),
        "has the key 'x' twice",
    ),
    "a key of a tensor twice": (
        safetensors_bytes(b'{"x": {"dtype": "F32", "dtype": "F16"}}'),
        "has the key 'dtype' twice",
    ),
    "no object": (safetensors_bytes({"x": 1}), "tensor 'x' must have data_offsets, dtype, shape"),
    "a missing key": (
        safetensors_bytes({"x": {"dtype": "F32", "shape": [1]}}),
        "tensor 'x' must have data_offsets, dtype, shape, got {'dtype'",
    ),
    "a gap": (
        safetensors_bytes({"x": entry(), "y": entry(offsets=(9, 17))}, bytes(17)),
        "tensor 'y' follows a gap",
    ),
    "a gap at the start": (
        safetensors_bytes({"x": entry(offsets=(4, 12))}, bytes(12)),
        "tensor 'x' follows a gap",
    ),
    "tensors that overlap": (
        safetensors_bytes({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)),
        "tensor 'y' overlaps the tensor before it",
    ),
    "the same place twice": (
        safetensors_bytes({"x": entry(), "y": entry()}, bytes(8)),
        "tensor 'y' overlaps the tensor before it",
    ),
    "a tensor past the end": (
        safetensors_bytes({"x": entry()}, bytes(7)),
        "its tensors end at byte 77, but the file has 76; is the download complete?",
    ),
    "bytes left over": (safetensors_bytes({"x": entry()}, bytes(9)), "has 1 bytes after its last"),
}
for _dtype in ("F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", None, 0, ["F32"]):
    REFUSED[f"dtype {_dtype}"] = (
        safetensors_bytes({"x": entry(_dtype)}, bytes(8)),
        f"tensor 'x' has dtype {_dtype!r}; only F32, F16, BF16 are supported",
    )
for _shape in ([0], [2, -1], [True], [1.0], ["2"], [None], [1 << 64], [[2]], [1] * 9):
    REFUSED[f"shape {_shape}"] = (
        safetensors_bytes({"x": entry(shape=_shape)}, bytes(8)),
        f"tensor 'x' has shape {_shape!r}; expected up to 8 integers above 0",
    )
for _offsets in ([0], [0, 8, 8], [-8, 0], [0.0, 8], [False, 8], [0, 1 << 64], ["0", "8"]):
    REFUSED[f"offsets {_offsets}"] = (
        safetensors_bytes({"x": entry(offsets=_offsets)}, bytes(8)),
        f"tensor 'x' has data_offsets {_offsets!r}; expected two integers",
    )
for _offsets in ([8, 0], [0, 7], [0, HUGE], [HUGE, HUGE], [8, 8]):
    REFUSED[f"a size by offsets {_offsets}"] = (
        safetensors_bytes({"x": entry(offsets=_offsets)}, bytes(8)),
        f"tensor 'x' has data_offsets of {_offsets[1] - _offsets[0]} bytes; F32 [2] needs 8",
    )
for _shape, _bytes in (([1 << 32, 1 << 30], 1 << 64), ([HUGE] * 8, 4 * HUGE**8)):
    REFUSED[f"a size of {len(_shape)} overflowing counts"] = (
        safetensors_bytes({"x": entry(shape=_shape, offsets=(0, 0))}),
        f"needs {_bytes}",
    )


@pytest.mark.parametrize("what", REFUSED)
def test_the_error_says_what_is_wrong_with_a_file(tmp_path, what):
    data, message = REFUSED[what]
    assert message in refusal(write_model(tmp_path, data))


def test_the_message_is_short_and_printable_for_any_name(tmp_path):
    name = "\x1b[2J\n\ud800" + "x" * 60000
    message = refusal(write_model(tmp_path, safetensors_bytes({name: 1})))
    assert len(message) < 300 and message.isprintable()


def test_refuses_files_that_are_not_regular(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == "is not a regular file; expected a safetensors file"
    assert refusal(tmp_path) == "is a directory; expected a safetensors file"
    assert refusal(Path("/dev/zero")) == "is not a regular file; expected a safetensors file"
    assert refusal(tmp_path / "missing") == "cannot be read: No such file or directory"
    assert "cannot be read" in refusal(tmp_path / "null\0byte")
    assert "cannot be read" in refusal(tmp_path / "lone\ud800surrogate")


def test_refuses_a_file_cut_off_anywhere(tmp_path):
    whole = (TINY / "llama/model.safetensors").read_bytes()
    lengths = {*range(0, len(whole), 4096), *range(0, 200), len(whole) - 1}
    for length in sorted(lengths):
        refusal(write_model(tmp_path, whole[:length]))


@given(data=st.data())
def test_damaged_files_are_either_read_or_refused(tmp_path, data):
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    whole = write_safetensors(tmp_path / "small.safetensors", arrays).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        damaged[position] = data.draw(st.sampled_from(b'{}[]",:0129e-\\u\xff\x00'))
    length = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    opens_or_is_refused(write_model(tmp_path, bytes(damaged[:length])))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@pytest.mark.slow
@given(header=st.dictionaries(
    st.text(max_size=3) | st.just("__metadata__"),
    JSON | st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16"]) | JSON,
        "shape": st.lists(st.integers(0, 3)) | JSON,
        "data_offsets": st.lists(st.integers(0, 20), min_size=2, max_size=2) | JSON,
    }),
    max_size=3,
))
def test_any_json_is_either_read_or_refused(tmp_path, header):
    opens_or_is_refused(write_model(tmp_path, safetensors_bytes(header, bytes(16))))


def opens_or_is_refused(path: Path) -> None:
    """Any exception but ModelError fails the test."""
    start = time.process_time()
    try:
        file = open_safetensors(path)
        for name, info in file.tensors.items():
            assert len(tensor_bytes(file, name)) == info.size > 0
    except ModelError:
        pass
    assert time.process_time() - start < 1


HOSTILE = {
    "lists": lambda: b'{"a":[' + b"[]," * 390_000 + b"1]}",
    "objects": lambda: b'{"a":[' + b"{}," * 390_000 + b"1]}",
    "numbers": lambda: b'{"a":[' + b"99999," * 720_000 + b"1]}",
    "keys": lambda: b"{" + b",".join(b'"%06d":0' % i for i in range(500_000)) + b"}",
    "one wide character": lambda: '{"a":"🙂'.encode() + b"x" * (MAX_JSON_BYTES - 12) + b'"}',
    "tensors": lambda: json.dumps({
        f"{i:05d}": entry(offsets=(8 * i, 8 * i + 8)) for i in range(1 << 16)
    }).encode(),
}


@pytest.mark.parametrize("what", slow_but(HOSTILE, "objects", "one wide character"))
def test_hostile_headers_take_little_time_and_memory(tmp_path, what):
    """At most 64 MiB on top of the file and Python itself, and 2 s; usually 0.5 s."""
    path = write_model(tmp_path, safetensors_bytes(HOSTILE[what](), bytes(8 << 16)))
    opened = open_in_a_fresh_process("llmsrv.files.safetensors", "open_safetensors", path)
    assert opened.error == ("" if what == "tensors" else "ModelError")
    assert opened.peak_bytes < path.stat().st_size + (64 << 20)
    assert opened.seconds < 2

"""Dequantisers against blocks written by hand, and against PyPI's gguf."""

import struct

import numpy as np
import pytest

from llmsrv.backend import quants
from llmsrv.backend.quants import TYPES
from llmsrv.backend.quants import dequantise

NIBBLES = bytes(low | high << 4 for low, high in zip(range(16), reversed(range(16))))
UP_AND_DOWN = np.array([*range(16), *reversed(range(16))], np.float32)
SIGNED = np.array([-128, -127, -1, 0, 1, 127, *range(26)])

HAND_MADE = [
    ("F32", struct.pack("<3f", 1.5, -0.0, 3e38), [1.5, -0.0, np.float32(3e38)]),
    ("F16", struct.pack("<3e", 1.5, -65504, 6e-8), [1.5, -65504, 2**-24]),
    ("BF16", struct.pack("<3H", 0x3FC0, 0xC000, 0x7F80), [1.5, -2, np.inf]),
    ("Q4_0", struct.pack("<e", -0.5) + NIBBLES, -0.5 * (UP_AND_DOWN - 8)),
    ("Q4_1", struct.pack("<2e", 0.25, -3) + NIBBLES, 0.25 * UP_AND_DOWN - 3),
    ("Q8_0", struct.pack("<e", 2**-10) + SIGNED.astype(np.int8).tobytes(), SIGNED * 2.0**-10),
]


def values_of(type, data, size):
    out = np.full(size, np.nan, np.float32)
    dequantise(type, np.frombuffer(data, np.uint8), out)
    return out


@pytest.mark.parametrize("type, data, values", HAND_MADE)
def test_a_block_means_what_the_specification_says(type, data, values):
    expected = np.asarray(values, np.float32)
    assert values_of(type, data, len(expected)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type, data, values", HAND_MADE)
def test_many_blocks_are_as_each_of_them_alone(type, data, values, monkeypatch):
    monkeypatch.setattr(quants, "CHUNK_BLOCKS", 4)
    many = values_of(type, data * 7, 7 * len(values))
    assert many.tobytes() == np.tile(np.asarray(values, np.float32), 7).tobytes()


def test_every_type_of_this_table_is_tested_here():
    assert [type for type, _, _ in HAND_MADE] == list(TYPES)


@pytest.mark.compat
@pytest.mark.parametrize("type", TYPES)
def test_random_bytes_mean_the_same_to_gguf(type):
    gguf = pytest.importorskip("gguf")
    _, block_bytes, _ = TYPES[type]
    data = np.random.default_rng(1).integers(0, 256, (40, 64 * block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[type])
        ours = values_of(type, data.tobytes(), theirs.size).reshape(theirs.shape)
    np.testing.assert_array_equal(ours, theirs)

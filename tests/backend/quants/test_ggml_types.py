"""Dequantizing, against blocks written by hand, and against PyPI's gguf."""

import struct
import zlib

import numpy as np
import pytest

from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.files.tensor_types import TENSOR_TYPES

# 16 bytes whose low halves count up and whose high halves count down.
NIBBLES = bytes(low | high << 4 for low, high in zip(range(16), reversed(range(16))))
UP, DOWN = np.arange(16), np.arange(15, -1, -1)
UP_AND_DOWN = np.array([*UP, *DOWN])
SIGNED = np.array([-128, -127, -1, 0, 1, 127, *range(26)])

# The values of a block of 256, and their groups of 32 and of 16.  0xE4 holds 0, 1, 2 and 3 in 2
# bits each, 0xAA alternating bits.
VALUE = np.arange(256)
BY_32, BY_16 = VALUE // 32, VALUE // 16
TWO_BITS, ONE_BIT = BY_32 % 4, BY_32 % 2
NIBBLE_OF_64 = np.tile(np.repeat([UP, DOWN], 4, axis=0).ravel(), 2)

CURVE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def six_bits(scales, minima):
    """Eight scales and eight minima of 6 bits each in 12 bytes, as in Q4_K and Q5_K."""
    pairs = list(zip(scales, minima))
    return bytes(
        [s | pairs[j + 4][0] >> 4 << 6 for j, (s, _) in enumerate(pairs[:4])]
        + [m | pairs[j + 4][1] >> 4 << 6 for j, (_, m) in enumerate(pairs[:4])]
        + [s & 15 | (m & 15) << 4 for s, m in pairs[4:]]
    )


def three_k_scales(scales):
    """Sixteen scales of 6 bits in 12 bytes, as Q3_K has them."""
    low = [scales[j] & 15 | (scales[j + 8] & 15) << 4 for j in range(8)]
    high = [sum((scales[j + 4 * k] >> 4) << 2 * k for k in range(4)) for j in range(4)]
    return bytes(low + high)


SCALES, MINIMA = np.arange(1, 64, 8), np.arange(60, 4, -7)
Q4_K_HEAD = struct.pack("<2e", 0.5, 0.25) + six_bits(SCALES, MINIMA)
TERNARY = -(-(0 * 81 + 1 * 27 + 2 * 9 + 0 * 3 + 1) * 256 // 243)  # the digits 0, 1, 2, 0, 1
TERNARY_VALUES = np.concatenate([np.repeat([0, 1, 2, 0, 1], 32), np.repeat([0, 1, 2, 0, 1], 16),
                                 np.repeat([0, 1, 2, 0], 4)]) - 1

# Some points of the grids, as ggml-common.h has them: numbers 0, 1 and 2, and the last one.
FLAT_2, HIGH_2, PAIR_2, LAST_2 = [8] * 8, [43] + [8] * 7, [25] * 2 + [8] * 6, [43] * 8
# Signs of 8 bits; the low 7 of both are the same numbers as signs of 7 bits.
SIGNS_5, SIGNS_81 = [-1, 1, -1, 1, 1, 1, 1, 1], [-1, 1, 1, 1, 1, 1, 1, -1]
SIGNS = np.array(SIGNS_5 + SIGNS_81 + [1] * 16)


def repeated(points, signs=1):
    """A block of 256 from the points and signs of 32 values."""
    return np.tile(np.ravel(points) * signs, 8)


IQ1_POINTS = repeated([[-1] * 8, [1] + [-1] * 7, [1] * 8, [1] * 8])
NIBBLES_0_TO_15 = bytes(j | (j + 1) << 4 for j in range(0, 16, 2))
NIBBLES_OF_28 = bytes((28 + j & 15) | (29 + j & 15) << 4 for j in range(0, 8, 2))

HAND_MADE = [
    ("F32", struct.pack("<3f", 1.5, -0.0, 3e38), [1.5, -0.0, np.float32(3e38)]),
    ("F16", struct.pack("<3e", 1.5, -65504, 6e-8), [1.5, -65504, 2**-24]),
    ("BF16", struct.pack("<3H", 0x3FC0, 0xC000, 0x7F80), [1.5, -2, np.inf]),
    ("Q1_0", struct.pack("<e", 0.75) + b"\x05" * 16, [0.75, -0.75, 0.75, *[-0.75] * 5] * 16),
    ("Q4_0", struct.pack("<e", -0.5) + NIBBLES, -0.5 * (UP_AND_DOWN - 8)),
    ("Q4_1", struct.pack("<2e", 0.25, -3) + NIBBLES, 0.25 * UP_AND_DOWN - 3),
    (
        "Q5_0",
        struct.pack("<eI", -0.5, 0xFFFF_0000) + NIBBLES,
        -0.5 * (UP_AND_DOWN + np.repeat([0, 16], 16) - 16),
    ),
    (
        "Q5_1",
        struct.pack("<2eI", 0.25, -3, 0x0000_0005) + NIBBLES,
        0.25 * (UP_AND_DOWN + [16, 0, 16, *[0] * 29]) - 3,
    ),
    ("Q8_0", struct.pack("<e", 2**-10) + SIGNED.astype(np.int8).tobytes(), SIGNED * 2.0**-10),
    (
        "Q2_K",
        bytes(j | (15 - j) << 4 for j in range(16)) + b"\xE4" * 64 + struct.pack("<2e", 0.5, 0.25),
        0.5 * BY_16 * TWO_BITS - 0.25 * (15 - BY_16),
    ),
    (
        "Q3_K",
        b"\xAA" * 32 + b"\xE4" * 64 + three_k_scales(range(24, 40)) + struct.pack("<e", 0.5),
        0.5 * (BY_16 - 8) * (TWO_BITS + 4 * ONE_BIT - 4),
    ),
    (
        "Q4_K",
        Q4_K_HEAD + 8 * NIBBLES,
        0.5 * SCALES[BY_32] * np.where(ONE_BIT, 15 - VALUE % 16, VALUE % 16) - 0.25 * MINIMA[BY_32],
    ),
    (
        "Q5_K",
        Q4_K_HEAD + b"\xAA" * 32 + 8 * NIBBLES,
        0.5 * SCALES[BY_32] * np.where(ONE_BIT, 31 - VALUE % 16, VALUE % 16) - 0.25 * MINIMA[BY_32],
    ),
    (
        "Q6_K",
        8 * NIBBLES + b"\xE4" * 64 + struct.pack("<16be", *range(-8, 8), 0.5),
        0.5 * (BY_16 - 8) * (NIBBLE_OF_64 + 16 * TWO_BITS - 32),
    ),
    ("TQ1_0", bytes([TERNARY] * 52) + struct.pack("<e", 0.75), 0.75 * TERNARY_VALUES),
    ("TQ2_0", b"\xE4" * 64 + struct.pack("<e", 0.75), 0.75 * (TWO_BITS - 1)),
    (
        "IQ1_S",  # numbers 0, 1, 2047 and 2047; scales 3; every other group's shift is negative
        struct.pack("<e", 0.5) + b"\x00\x01\xFF\xFF" * 8
        + struct.pack("<8H", *[0o7700 | 3 << 12, 0o7700 | 3 << 12 | 1 << 15] * 4),
        0.5 * 7 * (IQ1_POINTS + np.where(ONE_BIT, -0.125, 0.125)),
    ),
    (
        "IQ1_M",  # the same numbers; every other one's shift is negative; 0.5 is 0x3800
        b"\x00\x01\xFF\xFF" * 8 + b"\x80\xF7" * 8
        + struct.pack("<4H", *[0o3210, 0o7654, 0o3210 | 8 << 12, 0o7654 | 3 << 12]),
        0.5 * (2 * (BY_16 % 8) + 1) * (IQ1_POINTS + np.where(VALUE // 8 % 2, -0.125, 0.125)),
    ),
    (
        "IQ2_XXS",
        struct.pack("<e", 0.5) + struct.pack("<4BI", 0, 1, 2, 0, 5 | 1 << 7 | 3 << 28) * 8,
        0.5 * 3.5 / 4 * repeated([FLAT_2, HIGH_2, PAIR_2, FLAT_2], SIGNS),
    ),
    (
        "IQ2_XS",
        struct.pack("<e", 0.5) + struct.pack("<4H", 0 | 5 << 9, 1 | 1 << 9, 2, 511) * 8
        + NIBBLES_0_TO_15,
        0.5 * (BY_16 + 0.5) / 4 * repeated([FLAT_2, HIGH_2, PAIR_2, LAST_2], SIGNS),
    ),
    (
        "IQ2_S",  # numbers 0, 1, 2 and 1023
        struct.pack("<e", 0.5) + b"\x00\x01\x02\xFF" * 8 + b"\x05\x81\x00\x00" * 8 + b"\xC0" * 8
        + NIBBLES_0_TO_15,
        0.5 * (BY_16 + 0.5) / 4 * repeated([FLAT_2, HIGH_2, PAIR_2, LAST_2], SIGNS),
    ),
    (
        "IQ3_XXS",
        struct.pack("<e", 0.5) + b"\x00\x01" * 32 + struct.pack("<I", 5 | 1 << 7 | 3 << 28) * 8,
        0.5 * 3.5 / 2 * repeated([4, 4, 4, 4, 20, 4, 4, 4] * 4, SIGNS),
    ),
    (
        "IQ3_S",  # numbers 0 and 511
        struct.pack("<e", 0.5) + b"\x00\xFF" * 32 + b"\xAA" * 8 + b"\x05\x81\x00\x00" * 8
        + NIBBLES_0_TO_15[:4],
        0.5 * (2 * BY_32 + 1) * repeated([1, 1, 1, 1, 1, 1, 15, 15] * 4, SIGNS),
    ),
    ("IQ4_NL", struct.pack("<e", 0.5) + NIBBLES, 0.5 * CURVE[UP_AND_DOWN]),
    (
        "IQ4_XS",  # scales of 28 to 35: their high bits are 1 four times, then 2
        struct.pack("<eH", 0.5, 0xAA55) + NIBBLES_OF_28 + 8 * NIBBLES,
        0.5 * (BY_32 - 4) * CURVE[np.tile(UP_AND_DOWN, 8)],
    ),
    ("MXFP4", bytes([126]) + NIBBLES, 0.5 * E2M1[UP_AND_DOWN]),
    ("MXFP4", bytes([0]) + NIBBLES, 2.0**-127 * E2M1[UP_AND_DOWN]),
    (
        "NVFP4",  # 0x38 is 1, 0x44 is 3, 0x01 is 2^-9 and 0x7F is no number
        bytes([0x38, 0x44, 0x01, 0x7F]) + 2 * NIBBLES,
        np.repeat([1, 3, 2**-9, 0], 16)
        * E2M1[np.tile([*range(8), *range(15, 7, -1), *range(8, 16), *range(7, -1, -1)], 2)],
    ),
]

# CRC-32 of the values of random blocks, from when PyPI's gguf gave the same ones.
CHECKSUMS: dict[str, int] = {
    "F32": 0xD1110D77,
    "F16": 0x2BF24B95,
    "BF16": 0x1B9EF10C,
    "Q1_0": 0x3B4E1F9D,
    "Q4_0": 0xD9EDC73C,
    "Q4_1": 0x9953C995,
    "Q5_0": 0xE1D43AC6,
    "Q5_1": 0xA3448FFC,
    "Q8_0": 0x6323146C,
    "Q2_K": 0x59524339,
    "Q3_K": 0xE12CE4FF,
    "Q4_K": 0x308A891F,
    "Q5_K": 0xF03222D4,
    "Q6_K": 0xECFFC3AB,
    "TQ1_0": 0x13D846DC,
    "TQ2_0": 0xAB78DC40,
    "IQ1_S": 0x91545EFE,
    "IQ1_M": 0xC2A365ED,
    "IQ2_XXS": 0x3ED68954,
    "IQ2_XS": 0xE26BA4ED,
    "IQ2_S": 0x3AF552B3,
    "IQ3_XXS": 0xF8ED6758,
    "IQ3_S": 0x1CBD291D,
    "IQ4_NL": 0xC6387969,
    "IQ4_XS": 0x3DC8CE20,
    "MXFP4": 0x6B15087A,
    "NVFP4": 0xE729A6A1,
}


def values_of(type, data, size):
    out = np.full(size, np.nan, np.float32)
    with np.errstate(all="ignore"):
        dequantize(type, np.frombuffer(data, np.uint8), out)
    return out


def random_blocks(type, count):
    size = count, GGML_TYPES[type].block_bytes
    return np.random.default_rng(1).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("type, data, values", HAND_MADE)
def test_a_block_means_what_the_specification_says(type, data, values):
    expected = np.asarray(values, np.float32)
    np.testing.assert_array_equal(values_of(type, data, len(expected)), expected)


@pytest.mark.parametrize("type, data, values", HAND_MADE)
def test_many_blocks_give_the_same_values_as_each_alone(type, data, values, monkeypatch):
    chunk_values = 4 * GGML_TYPES[type].block_values
    monkeypatch.setattr("llmsrv.backend.quants.ggml_types.CHUNK_VALUES", chunk_values)
    many = values_of(type, data * 7, 7 * len(values))
    np.testing.assert_array_equal(many, np.tile(np.asarray(values, np.float32), 7))


@pytest.mark.parametrize("type", GGML_TYPES)
def test_random_blocks_keep_their_meaning(type):
    num_values = 500 * GGML_TYPES[type].block_values
    values = values_of(type, random_blocks(type, 500).tobytes(), num_values)
    assert zlib.crc32(np.nan_to_num(values) + np.float32(0)) == CHECKSUMS[type]


def test_every_type_is_tested_here():
    assert {type for type, _, _ in HAND_MADE} == set(GGML_TYPES) == set(CHECKSUMS)


def test_block_sizes_are_those_of_the_file_reader():
    """It knows more types, none of them for weights: activations, integers and doubles."""
    read = {name: (size, size_bytes) for name, size, size_bytes in TENSOR_TYPES.values()}
    for type, (block_values, block_bytes, _) in GGML_TYPES.items():
        assert read.pop(type) == (block_values, block_bytes), type
    assert set(read) == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("type", GGML_TYPES)
def test_data_need_not_be_aligned(type, offset):
    data = random_blocks(type, 8).tobytes()
    shifted = np.frombuffer(bytes(offset) + data, np.uint8)[offset:]
    out = np.empty(8 * GGML_TYPES[type].block_values, np.float32)
    with np.errstate(all="ignore"):
        dequantize(type, shifted, out)
    np.testing.assert_array_equal(out, values_of(type, data, out.size))


@pytest.mark.compat
@pytest.mark.parametrize("type", [type for type in GGML_TYPES if type != "Q1_0"])  # gguf lacks it
def test_gguf_dequantizes_random_bytes_to_the_same_values(type):
    gguf = pytest.importorskip("gguf")
    data = random_blocks(type, 2560).reshape(40, -1)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[type])
    ours = values_of(type, data.tobytes(), theirs.size).reshape(theirs.shape)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.compat
@pytest.mark.parametrize("type", ["Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"])
def test_weights_that_gguf_quantizes_come_back_about_the_same(type):
    gguf = pytest.importorskip("gguf")
    weights = np.random.default_rng(2).normal(0, 1, (8, 512)).astype(np.float32)
    data = gguf.quantize(weights, gguf.GGMLQuantizationType[type])
    ours = values_of(type, data.tobytes(), weights.size).reshape(weights.shape)
    correlation = np.corrcoef(ours.ravel(), weights.ravel())[0, 1]
    assert correlation > {"Q5_0": 0.998, "Q5_1": 0.998, "MXFP4": 0.98}.get(type, 0.7)

"""Philox against the vectors published with Random123 (kat_vectors, philox4x32 10)."""

import pytest

from llmsrv.backend.sampling.philox import philox4x32
from llmsrv.backend.sampling.philox import uniform_bits

ALL_ONES = 0xFFFFFFFF
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox4x32(counter, key) == words


def test_the_bits_for_a_token_are_the_first_two_words():
    w0, w1, _, _ = philox4x32((2, 0x55667788, 0x11223344, 0), (0xDDEEFF00, 0x99AABBCC))
    assert uniform_bits(0x99AABBCCDDEEFF00, 2, 0x1122334455667788) == w1 << 32 | w0


def test_seed_choice_and_position_all_matter():
    drawn = {uniform_bits(s, c, p) for s in (0, 1, 1 << 32) for c in (0, 1) for p in range(50)}
    assert len(drawn) == 300

"""Philox4x32-10: random bits as a pure function of a key and a counter.

The same counter always gives the same bits.  So a sequence draws the same numbers alone, in any
batch, after a preemption and on every backend.
Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3.
"""

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key between rounds
MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Four random 32-bit words for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = MULTIPLIERS[0] * c0
        product1 = MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 & MASK,
            product0 >> 32 ^ c3 ^ k1,
            product0 & MASK,
        )
        k0 = k0 + WEYL[0] & MASK
        k1 = k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def uniform_bits(seed: int, choice: int, output_position: int) -> int:
    """The 64 random bits that decide one token, uniform over 0 .. 2**64 - 1.

    The key is (seed low, seed high), the counter (choice, position low, position high, 0).  The
    result is the first word plus 2**32 times the second.
    """
    counter = choice, output_position & MASK, output_position >> 32, 0
    low, high, _, _ = philox4x32(counter, (seed & MASK, seed >> 32))
    return high << 32 | low

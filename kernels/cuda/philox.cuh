/* Philox4x32-10, as backend/sampling/philox.py: random bits as a pure function of key and counter.
 * Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3. */

/* The 64 random bits that decide one token: the first two of the four words. */
__device__ __forceinline__ unsigned long long uniform_bits(
    unsigned long long seed, unsigned choice, unsigned long long output_position)
{
    unsigned c[4] = {choice, (unsigned)output_position, (unsigned)(output_position >> 32), 0};
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        unsigned high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
        unsigned high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
        c[0] = high1 ^ c[1] ^ k0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ k1;
        c[3] = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (unsigned long long)c[1] << 32 | c[0];
}

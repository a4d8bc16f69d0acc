/* Any CPU: GNU vector extensions, which the compiler cuts into what the machine has. */

INLINE f32x16 splat(float x)
{
    return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

INLINE i32x16 splat_int(int32_t x)
{
    return (i32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }
INLINE f32x16 max16(f32x16 a, f32x16 b) { return choose(a > b, a, b); }
INLINE f32x16 min16(f32x16 a, f32x16 b) { return choose(a < b, a, b); }

INLINE i32x16 max_int(i32x16 a, i32x16 b)
{
    i32x16 more = a > b;
    return (more & a) | (~more & b);
}

INLINE f32x16 to_float(i32x16 x) { return __builtin_convertvector(x, f32x16); }

/* To the nearest integer, ties to even, for |x| < 2^22: 1.5 * 2^23 has units of 1. */
INLINE i32x16 to_nearest(f32x16 x)
{
    f32x16 shifted = x + splat(0x1.8p+23f);
    return (i32x16)shifted - 0x4b400000;
}

INLINE i32x16 dot4(i32x16 c, u32x16 w, i32x16 x)
{
    UNROLL for (int shift = 0; shift < 32; shift += 8)
        c += (i32x16)((w >> shift) & 255) * ((x << (24 - shift)) >> 24);
    return c;
}

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t s8x16 __attribute__((vector_size(16)));

INLINE u32x16 load_wide(const uint16_t *p)
{
    u16x16 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, u32x16);
}

/* Exponent and fraction moved into place make the number times 2^-112. */
INLINE f32x16 load_half(const uint16_t *p)
{
    u32x16 h = load_wide(p);
    f32x16 size = (f32x16)((h & 0x7fff) << 13) * splat(0x1p+112f);
    i32x16 is_special = (i32x16)((h & 0x7c00) == 0x7c00);
    u32x16 special = ((h & 0x3ff) << 13) | 0x7f800000;
    return (f32x16)((u32x16)choose(is_special, (f32x16)special, size) | ((h & 0x8000) << 16));
}

/* Rounded to nearest, ties to even; a subnormal half is aligned by adding a number whose units are
 * those of subnormal halves.  Beyond the largest half lies infinity, and NaN stays NaN. */
INLINE uint16_t half_of(float x)
{
    uint32_t bits, sign, aligned;
    memcpy(&bits, &x, sizeof bits);
    sign = bits & 0x80000000u;
    bits ^= sign;
    if (bits >= 0x47800000u) {
        bits = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000u) {
        float size;
        memcpy(&size, &bits, sizeof size);
        size += 0.5f;
        memcpy(&aligned, &size, sizeof aligned);
        bits = aligned - 0x3f000000u;
    } else {
        bits = (bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    return (uint16_t)(bits | sign >> 16);
}

INLINE void store_half(uint16_t *p, f32x16 x)
{
    for (int i = 0; i < 16; i++)
        p[i] = half_of(x[i]);
}

INLINE f32x16 load_bfloat(const uint16_t *p) { return (f32x16)(load_wide(p) << 16); }

INLINE f32x16 load_unsigned_bytes(const uint8_t *p)
{
    u8x16 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, f32x16);
}

INLINE f32x16 load_signed_bytes(const uint8_t *p)
{
    s8x16 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, f32x16);
}

INLINE void store_bytes(int8_t *p, i32x16 x)
{
    for (int i = 0; i < 16; i++)
        p[i] = (int8_t)x[i];
}

INLINE float sum16(f32x16 x)
{
    float s = 0;
    for (int i = 0; i < 16; i++)
        s += x[i];
    return s;
}

INLINE float largest16(f32x16 x)
{
    float m = x[0];
    for (int i = 1; i < 16; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

INLINE int32_t sum_int(i32x16 x)
{
    int32_t s = 0;
    for (int i = 0; i < 16; i++)
        s += x[i];
    return s;
}

INLINE int32_t largest_int(i32x16 x)
{
    int32_t m = x[0];
    for (int i = 1; i < 16; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }

INLINE void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

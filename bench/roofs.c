/* What bounds the kernels on this machine, with threads that stay alive: bytes read a second, and
 * products of bytes (dpbusd) a second.  Measured in the same run as what they are compared with. */
#include <immintrin.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef struct {
    const char *bytes;
    size_t size;
    int passes;
    volatile int sink;
} Share;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* As fast as any order of fetching that was tried: lines to the second-level cache 8 KB ahead. */
static void *read_share(void *argument)
{
    Share *share = argument;
    __m512i s[4] = {_mm512_setzero_si512()};
    for (int pass = 0; pass < share->passes; pass++)
        for (size_t i = 0; i + 256 <= share->size; i += 256)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                _mm_prefetch(share->bytes + i + 64 * j + 8192, _MM_HINT_T1);
                s[j] = _mm512_add_epi32(s[j], _mm512_loadu_si512(share->bytes + i + 64 * j));
            }
    share->sink = _mm512_reduce_add_epi32(
        _mm512_add_epi32(_mm512_add_epi32(s[0], s[1]), _mm512_add_epi32(s[2], s[3])));
    return 0;
}

static void *multiply(void *argument)
{
    Share *share = argument;
    __m512i w = _mm512_set1_epi8(3), c[16];
    for (int i = 0; i < 16; i++)
        c[i] = w;
    for (int pass = 0; pass < share->passes; pass++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            c[i] = _mm512_dpbusd_epi32(c[i], w, w);
    for (int i = 0; i < 16; i++)
        share->sink += _mm512_reduce_add_epi32(c[i]);
    return 0;
}

#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>

/* Four sums of 16 x 16, each of two tiles of 16 rows by 64 bytes. */
static void *multiply_tiles(void *argument)
{
    static const struct { uint8_t palette, zeros[15]; uint16_t bytes[16]; uint8_t rows[16]; } config = {
        1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    Share *share = argument;
    _tile_loadconfig(&config);
    for (int pass = 0; pass < share->passes; pass++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return 0;
}
#endif

static double seconds(void *(*run)(void *), Share *shares, int num_threads)
{
    pthread_t threads[64];
    double start = now();
    for (int i = 1; i < num_threads; i++)
        pthread_create(&threads[i], 0, run, &shares[i]);
    run(&shares[0]);
    for (int i = 1; i < num_threads; i++)
        pthread_join(threads[i], 0);
    return now() - start;
}

/* Bytes a second over `size` bytes, `passes` times. */
double read_rate(const char *bytes, int64_t size, int passes, int num_threads)
{
    Share shares[64];
    for (int i = 0; i < num_threads; i++)
        shares[i] = (Share){bytes + size / num_threads * i, (size_t)(size / num_threads), passes, 0};
    return (double)size * passes / seconds(read_share, shares, num_threads);
}

/* Multiplications of two bytes a second. */
double multiply_rate(int passes, int num_threads)
{
    Share shares[64];
    for (int i = 0; i < num_threads; i++)
        shares[i] = (Share){0, 0, passes, 0};
    return 16.0 * 64 * passes * num_threads / seconds(multiply, shares, num_threads);
}

/* The same on matrix registers; 0 where there are none. */
double matrix_rate(int passes, int num_threads)
{
#ifdef __AMX_INT8__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    Share shares[64];
    for (int i = 0; i < num_threads; i++)
        shares[i] = (Share){0, 0, passes, 0};
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
        return 4.0 * 16 * 16 * 64 * passes * num_threads / seconds(multiply_tiles, shares, num_threads);
#endif
    (void)passes;
    (void)num_threads;
    return 0;
}

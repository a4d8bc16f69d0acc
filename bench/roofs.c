/* The rooflines of this machine: bytes read a second, and int8 multiplications a second, with
 * all threads.  Measured in the same run as the kernels they bound, and compiled with the tier's
 * flags. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef int32_t Vector __attribute__((vector_size(64)));

/* A register of sums, and the instruction that adds one product of bytes for each of its bytes. */
#if defined(TIER_AVX512)
#include <immintrin.h>
typedef __m512i Sums;
#define MULTIPLY(sums, x) _mm512_dpbusd_epi32(sums, x, x)
#elif defined(TIER_AVX_VNNI)
#include <immintrin.h>
typedef __m256i Sums;
#define MULTIPLY(sums, x) _mm256_dpbusd_avx_epi32(sums, x, x)
#elif defined(TIER_AVX2)
#include <immintrin.h>
typedef __m256i Sums; /* of 16 bits, enough for products of 4-bit and 8-bit integers */
#define MULTIPLY(sums, x) _mm256_add_epi16(sums, _mm256_maddubs_epi16(sums, x))
#elif defined(TIER_NEON)
#include <arm_neon.h>
typedef int32x4_t Sums;
#define MULTIPLY(sums, x) vdotq_s32(sums, (int8x16_t)(x), (int8x16_t)(x))
#else
typedef int8_t Sums __attribute__((vector_size(16)));
#define MULTIPLY(sums, x) ((sums) + (sums) * (x))
#endif

enum { NUM_SUMS = sizeof(Sums) == 64 ? 16 : 8 }; /* in flight, to hide their latency */

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

/* Prefetches to the L2 cache 8 KB ahead: as fast as any other order that was tried. */
static void *read_share(void *argument)
{
    Share *share = argument;
    Vector sums[4] = {{0}}, line;
    for (int pass = 0; pass < share->passes; pass++)
        for (size_t i = 0; i + 256 <= share->size; i += 256)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(share->bytes + i + 64 * j + 8192, 0, 2);
                memcpy(&line, share->bytes + i + 64 * j, sizeof line);
                sums[j] += line;
            }
    share->sink = (sums[0] + sums[1] + sums[2] + sums[3])[0];
    return 0;
}

static void *multiply(void *argument)
{
    Share *share = argument;
    Sums x, sums[NUM_SUMS];
    memset(&x, 3, sizeof x);
    sums[0] = x;
#pragma GCC unroll 16
    for (int i = 1; i < NUM_SUMS; i++)
        sums[i] = sums[i - 1] + x; /* the compiler would merge equal sums */
    for (int pass = 0; pass < share->passes; pass++)
#pragma GCC unroll 16
        for (int i = 0; i < NUM_SUMS; i++)
            sums[i] = MULTIPLY(sums[i], x);
#pragma GCC unroll 16
    for (int i = 1; i < NUM_SUMS; i++)
        sums[0] += sums[i];
    int32_t first;
    memcpy(&first, &sums[0], sizeof first);
    share->sink = first;
    return 0;
}

#ifdef TIER_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Four 16 x 16 sums, each the product of two tiles of 16 rows by 64 bytes. */
static void *multiply_tiles(void *argument)
{
    static const struct {
        uint8_t palette, zeros[15];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
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

/* Bytes read a second, reading `size` bytes `passes` times. */
double read_rate(const char *bytes, int64_t size, int passes, int num_threads)
{
    Share shares[64];
    for (int i = 0; i < num_threads; i++)
        shares[i] = (Share){
            bytes + size / num_threads * i, (size_t)(size / num_threads), passes, 0};
    return (double)size * passes / seconds(read_share, shares, num_threads);
}

/* int8 multiplications a second. */
double multiply_rate(int passes, int num_threads)
{
    Share shares[64];
    for (int i = 0; i < num_threads; i++)
        shares[i] = (Share){0, 0, passes, 0};
    double products = 1.0 * NUM_SUMS * sizeof(Sums) * passes * num_threads;
    return products / seconds(multiply, shares, num_threads);
}

/* The same with AMX tiles; 0 without AMX. */
double amx_rate(int passes, int num_threads)
{
#ifdef TIER_AMX
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    Share shares[64];
    for (int i = 0; i < num_threads; i++)
        shares[i] = (Share){0, 0, passes, 0};
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
        return 4.0 * 16 * 16 * 64 * passes * num_threads
               / seconds(multiply_tiles, shares, num_threads);
#endif
    (void)passes;
    (void)num_threads;
    return 0;
}

/* Inline PTX, in this file alone.  Where no CUDA compiler reads it, as in the tests that run kernels
 * on the CPU, emulated_ptx.h defines the same functions.
 *
 * A fragment of mma m16n8k16, as the PTX manual lays it out.  Lane l has g = l / 4 and t = l % 4; a
 * register holds two 16-bit values, the one with the lower index in its low half:
 *     a[0] row g,     k 2t, 2t+1      a[1] row g + 8, k 2t, 2t+1
 *     a[2] row g,     k 2t+8, 2t+9    a[3] row g + 8, k 2t+8, 2t+9
 *     b[0] column g,  k 2t, 2t+1      b[1] column g,  k 2t+8, 2t+9
 *     c[0], c[1] row g, columns 2t, 2t+1      c[2], c[3] row g + 8, columns 2t, 2t+1
 * Source: PTX ISA, sections "Matrix fragments for mma.m16n8k16" and "ldmatrix". */
#ifndef __CUDACC__
#include <emulated_ptx.h>
#else

/* Copies 16 bytes from global to shared memory, or writes zeros if not `is_copied`.  The copy has
 * arrived after cp_async_wait and a barrier.  Before sm_80 it is a plain copy. */
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool is_copied)
{
#if __CUDA_ARCH__ >= 800
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    int bytes_read = is_copied ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
                 :
                 : "r"(address), "l"(global), "r"(bytes_read)
                 : "memory");
#else
    *(uint4 *)shared = is_copied ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}

/* Ends a group of this thread's copies. */
__device__ __forceinline__ void cp_async_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

/* Waits until at most the last N groups of this thread are still under way. */
template <int N> __device__ __forceinline__ void cp_async_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

/* c += a @ b, for T = __half (sm_75 takes two steps of k8) or __nv_bfloat16 (from sm_80). */
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float *c, const unsigned *a, const unsigned *b);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(
    float *c, const unsigned *a, const unsigned *b)
{
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(
    float *c, const unsigned *a, const unsigned *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

/* Loads four 8 x 8 matrices of 16-bit values from shared memory.  Lane 8 i + r passes the address of
 * row r of matrix i, 16-byte aligned.  d[i] is row l / 4, columns 2 (l % 4) and the next, of matrix
 * i; TRANSPOSED: of matrix i transposed. */
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x4(unsigned *d, const void *row)
{
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(address)
                     : "memory");
}

/* 16 bytes of read-only global memory that are read once, and so take no room in the L1 cache. */
__device__ __forceinline__ uint4 load_once(const void *global)
{
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(global));
    return v;
}

#endif

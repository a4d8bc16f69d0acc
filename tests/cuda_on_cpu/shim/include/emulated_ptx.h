// What kernels/cuda/ptx.cuh has for a device, with the same signatures.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

EMU_FUNCTION void cp_async_16(void* shared, const void* global, bool is_copied, EMU_LINE) {
#if __CUDA_ARCH__ >= 800
  emu_copy_async(shared, global, 16, is_copied ? 16 : 0, line);
#else
  *(uint4*)shared = is_copied ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}

EMU_FUNCTION void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  emu_copy_async_commit();
#endif
}

template <int N>
EMU_FUNCTION void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  emu_copy_async_wait(N);
#endif
}

template <class T>
EMU_FUNCTION void mma_m16n8k16(float* c, const unsigned* a, const unsigned* b, EMU_LINE) {
  constexpr bool is_half = std::is_same_v<T, __half>;
  static_assert(is_half || (std::is_same_v<T, __nv_bfloat16> && __CUDA_ARCH__ >= 800));
  emu_mma_operands operands{c, a, b};
  unsigned arrived;
  emu_collective(~0u, EMU_MATRIX, (uint64_t)&operands, is_half ? emu_mma_half : emu_mma_bfloat16,
                 &arrived, line);
}

template <bool TRANSPOSED>
EMU_FUNCTION void ldmatrix_x4(unsigned* d, const void* row, EMU_LINE) {
  emu_ldmatrix_x4(TRANSPOSED, d, row, line);
}

EMU_FUNCTION uint4 load_once(const void* global) { return *(const uint4*)global; }

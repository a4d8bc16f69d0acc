// mma.sync and ldmatrix: leaders of a collective of all 32 lanes.
//
// Source of the register layouts: PTX ISA, sections "Matrix fragments for mma.m16n8k16 with floating
// point type" and "ldmatrix".
#include <immintrin.h>

#include <cstring>

#include "block.h"
#include "checker.h"

static float from_half(unsigned bits) { return _cvtsh_ss((unsigned short)bits); }

static float from_bfloat16(unsigned bits) {
  unsigned word = (bits & 0xFFFF) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// c[16][8] += a[16][16] x b[16][8].  Lane l = 4 * group + member holds, two columns or rows a register:
//   a: rows group and group + 8, columns 2 * member + {0, 1}, and these + 8 in the second pair
//   b: rows 2 * member + {0, 1}, and these + 8 in the second register; column group
//   c: rows group and group + 8, columns 2 * member + {0, 1}
constexpr int K = 16;

template <float (*convert)(unsigned)>
static void mma(uint64_t* values) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto* own = (const emu_mma_operands*)values[lane];
    int group = lane / 4, member = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < K / 4; i++) {
        a[group + i % 2 * 8][member * 2 + half + i / 2 * 8] = convert(own->a[i] >> 16 * half);
      }
      for (int i = 0; i < K / 8; i++) {
        b[member * 2 + half + i * 8][group] = convert(own->b[i] >> 16 * half);
      }
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < K; k++) {
      for (int column = 0; column < 8; column++) product[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    const auto* own = (const emu_mma_operands*)values[lane];
    for (int i = 0; i < 4; i++) own->c[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void emu_mma_half(uint64_t* values) { mma<from_half>(values); }

void emu_mma_bfloat16(uint64_t* values) { mma<from_bfloat16>(values); }

// Lane 8 * m + r names row r of matrix m: 8 elements of 16 bits.  Lane l receives elements 2 * (l % 4)
// and the next of row l / 4, or of column l / 4 when transposed.
template <bool IS_TRANSPOSED>
static void ldmatrix(uint64_t* values) {
  for (int lane = 0; lane < 32; lane++) {
    for (int matrix = 0; matrix < 4; matrix++) {
      unsigned word = 0;
      for (int half = 0; half < 2; half++) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        if (IS_TRANSPOSED) std::swap(row, column);
        const auto* named = (const emu_ldmatrix_operands*)values[matrix * 8 + row];
        word |= ((const uint16_t*)named->row)[column] << 16 * half;
      }
      ((const emu_ldmatrix_operands*)values[lane])->d[matrix] = word;
    }
  }
}

void emu_ldmatrix_x4(int is_transposed, unsigned* d, const void* row, int line) {
  if ((size_t)row % 16) emu_fail("ldmatrix of a row that is not aligned to 16 bytes", line);
  check({(const char*)row, 16, false, false, false, (uintptr_t)__builtin_return_address(0)});
  emu_ldmatrix_operands operands{d, row};
  unsigned arrived;
  emu_leader leader = is_transposed ? ldmatrix<true> : ldmatrix<false>;
  emu_collective(~0u, EMU_MATRIX, (uint64_t)&operands, leader, &arrived, line);
}

/* Products of the K formats; linear_dot4.h has the code. */
#include "linear_dot4.h"

#if HAS_DOT4 && !defined(TIER_AMX)

TILE_SIZES(DEFINE_KERNEL, Q4_K)
TILE_SIZES(DEFINE_KERNEL, Q5_K)
TILE_SIZES(DEFINE_KERNEL, Q6_K)

const BlockKernel k_kernels[3][TILE_ROWS] = {NAMES(Q4_K), NAMES(Q5_K), NAMES(Q6_K)};

#endif

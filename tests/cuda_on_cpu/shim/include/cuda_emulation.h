// CUDA C on g++: included before the text of a .cu file.
//
// Four words of CUDA C are not macros, since site/cuda_on_cpu/translate.py rewrites them after the
// preprocessor: __global__, __launch_bounds__, __shared__ and extern __shared__.
#pragma once
// C's own headers: compiling C++'s takes most of the time that a small kernel takes.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <limits>
#include <type_traits>
#include <utility>

#include "../emulator.h"

#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (emu_current.thread_index)
#define blockIdx (emu_current.block_index)
#define blockDim (emu_current.block_dim)
#define gridDim (emu_current.grid_dim)
#define warpSize 32

// Functions here are inlined, so that the checker names the kernel's line; LINE is that line, too.
#define EMU_FUNCTION static inline __attribute__((always_inline, unused))
#define EMU_LINE int line = __builtin_LINE()

#include "vector_types.h"
#include "intrinsics.h"
#include "warp.h"
#include "atomics.h"
#include "kernel_table.h"

// The interface between a compiled kernel and the emulator.
//
// The emulator runs a grid block by block.  Every CUDA thread of a block is a fibre: a stack of its
// own on the worker's OS thread, which runs until it waits for other threads.  One library serves
// all kernels, whether compiled for the checker or not, so everything here has a plain C ABI.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What the kernel's code reads about the CUDA thread that runs now on this OS thread.
struct emu_thread {
  uint3 thread_index, block_index, block_dim, grid_dim;
  unsigned lane;
  char* dynamic_shared;
  unsigned dynamic_shared_size;
};

enum emu_collective_kind { EMU_SYNCWARP, EMU_SHUFFLE, EMU_BALLOT, EMU_MATCH, EMU_REDUCE, EMU_MATRIX };
enum emu_barrier_kind { EMU_SYNC, EMU_SYNC_COUNT, EMU_SYNC_AND, EMU_SYNC_OR };

// Runs once for a collective, on the values of all lanes, when the last of them has arrived.
typedef void (*emu_leader)(uint64_t* values);

extern "C" {
extern __thread emu_thread emu_current __attribute__((tls_model("initial-exec")));

// One call of a warp-wide function with this lane's `value`.  Waits for the lanes of `mask` and
// returns the 32 values, valid until this lane's next collective; *arrived: the lanes that took part.
const uint64_t* emu_collective(unsigned mask, int kind, uint64_t value, emu_leader leader,
                               unsigned* arrived, int line);
int emu_barrier(int kind, int predicate, int line);  // __syncthreads and its variants
void emu_fail(const char* what, int line);           // ends the launch with an error
void emu_declare_shared(void* object, size_t size);  // a static __shared__ object of this block
void emu_fence();                                    // __threadfence

void emu_copy_async(void* shared, const void* global, int size, int source_size, int line);
void emu_copy_async_commit();
void emu_copy_async_wait(int groups_in_flight);

// mma.m16n8k16 for float16 and bfloat16 are leaders; the values of the lanes point to their operands.
struct emu_mma_operands {
  float* c;
  const unsigned *a, *b;
};
struct emu_ldmatrix_operands {
  unsigned* d;
  const void* row;
};
void emu_mma_half(uint64_t* values);
void emu_mma_bfloat16(uint64_t* values);
void emu_ldmatrix_x4(int is_transposed, unsigned* d, const void* row, int line);
}

enum emu_order { EMU_IN_ORDER, EMU_REVERSED, EMU_RANDOM };

struct emu_options {
  int workers;  // OS threads that share the blocks
  int order;    // emu_order of blocks, warps and lanes
  int seed;     // of the random order
  int is_checked;
  unsigned max_dynamic_shared;
};

struct emu_kernel {
  const char* name;
  void (*run)(void** arguments);
  int num_arguments;
  const int* sizes;   // bytes of each argument
  const char* kinds;  // p: pointer, f: floating point, i: integer, s: struct
  int max_threads;    // __launch_bounds__; 0: none
};

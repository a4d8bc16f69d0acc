// Launches a grid: the limits of a device, the order of the blocks, and the workers.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>

#include <xmmintrin.h>

#include "block.h"

static std::mutex launch_mutex;  // launches from several host threads run one after another
static std::vector<std::unique_ptr<Worker>> workers;  // kept, with their stacks, between launches

static void begin_launch(Worker* worker, Launch* launch) {
  const dim3 block = launch->block;
  worker->launch = launch;
  worker->error.clear();
  worker->running = &worker->main;
  worker->num_threads = block.x * block.y * block.z;
  worker->num_warps = (worker->num_threads + 31) / 32;
  worker->threads.assign(worker->num_threads, Thread{});
  worker->warps.resize(worker->num_warps);
  for (unsigned t = 0; t < worker->num_threads; t++) {
    worker->threads[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  }
  // 128-byte alignment, as cp.async and the widest loads expect of the first byte.
  worker->dynamic_shared.resize(launch->dynamic_shared_size + 128);
  size_t address = (size_t)worker->dynamic_shared.data();
  emu_current.dynamic_shared = (char*)((address + 127) / 128 * 128);
  emu_current.dynamic_shared_size = launch->dynamic_shared_size;
  emu_current.block_dim = {block.x, block.y, block.z};
  emu_current.grid_dim = {launch->grid.x, launch->grid.y, launch->grid.z};
}

static void run_blocks(Worker* worker, Launch* launch) {
  this_worker = worker;
  begin_launch(worker, launch);
  unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // denormals count as zero, as with the -ftz=true that CuPy passes
  long num_blocks = launch->block_order.size();
  for (long i; !launch->has_failed && (i = launch->next++) < num_blocks;) {
    run_block(worker, launch->block_order[i]);
    if (worker->error.empty()) continue;
    std::lock_guard<std::mutex> lock(launch->mutex);
    if (launch->error.empty()) launch->error = worker->error;
    launch->has_failed = true;
  }
  _mm_setcsr(control);
  this_worker = nullptr;
}

static std::vector<long> block_order(long num_blocks, const emu_options& options) {
  std::vector<long> order(num_blocks);
  for (long i = 0; i < num_blocks; i++) order[i] = i;
  if (options.order == EMU_REVERSED) std::reverse(order.begin(), order.end());
  std::mt19937 random(options.seed);
  if (options.order == EMU_RANDOM) std::shuffle(order.begin(), order.end(), random);
  return order;
}

static const char* refusal(const emu_kernel* kernel, dim3 grid, dim3 block, unsigned shared,
                           const emu_options& options) {
  long num_threads = (long)block.x * block.y * block.z;
  if (num_threads < 1 || num_threads > 1024 || block.z > 64)
    return "CUDA_ERROR_INVALID_VALUE: a block has 1 to 1024 threads, at most 64 of them in z";
  if (kernel->max_threads && num_threads > kernel->max_threads)
    return "CUDA_ERROR_INVALID_VALUE: more threads than __launch_bounds__";
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return "CUDA_ERROR_INVALID_VALUE: a grid has 1 to 65535 blocks in y and z, 1 to 2^31 - 1 in x";
  if (shared > options.max_dynamic_shared)
    return "CUDA_ERROR_INVALID_VALUE: more dynamic shared memory than the kernel's limit";
  return nullptr;
}

// Returns 0, or 1 with the reason in `error`.  max_shared_size: static and dynamic together.
extern "C" int emu_launch(const emu_kernel* kernel, void** arguments, const unsigned* grid,
                          const unsigned* block, unsigned dynamic_shared_size,
                          unsigned max_shared_size, const emu_options* options, char* error,
                          int error_size) {
  Launch launch;
  launch.kernel = kernel;
  launch.arguments = arguments;
  launch.grid = dim3(grid[0], grid[1], grid[2]);
  launch.block = dim3(block[0], block[1], block[2]);
  launch.dynamic_shared_size = dynamic_shared_size;
  launch.max_shared_size = max_shared_size;
  launch.options = *options;
  const char* reason = refusal(kernel, launch.grid, launch.block, dynamic_shared_size, *options);
  if (reason) {
    snprintf(error, error_size, "%s", reason);
    return 1;
  }
  long num_blocks = (long)grid[0] * grid[1] * grid[2];
  launch.block_order = block_order(num_blocks, *options);
  std::lock_guard<std::mutex> lock(launch_mutex);
  long num_workers = std::max(1l, std::min<long>(options->workers, num_blocks));
  while ((long)workers.size() < num_workers) workers.push_back(std::make_unique<Worker>());
  std::vector<std::thread> others;
  for (long i = 1; i < num_workers; i++) {
    others.emplace_back(run_blocks, workers[i].get(), &launch);
  }
  run_blocks(workers[0].get(), &launch);
  for (std::thread& other : others) other.join();
  if (launch.error.empty()) return 0;
  snprintf(error, error_size, "%s", launch.error.c_str());
  return 1;
}

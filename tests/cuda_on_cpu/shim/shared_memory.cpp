// Static __shared__ objects and __threadfence: what the checker and the poison need to know of them.
#include <cstring>

#include "block.h"
#include "checker.h"

// Each thread calls this where the object is declared; the first one of a block poisons it.  A device
// knows the size of all objects beforehand, and would refuse the launch.
void emu_declare_shared(void* object, size_t size) {
  Worker* worker = this_worker;
  if (worker->launch->options.is_checked) check_shared(object, size);
  unsigned& block = worker->poisoned[object];
  if (block == worker->block_number) return;
  block = worker->block_number;
  memset(object, 0xFF, size);
  worker->static_shared_size += size;
  unsigned total = worker->static_shared_size + worker->launch->dynamic_shared_size;
  if (total <= worker->launch->max_shared_size) return;
  record_error(worker, "CUDA_ERROR_INVALID_VALUE: %u bytes of static and dynamic shared memory; %u "
               "are allowed", total, worker->launch->max_shared_size);
  stop_block(worker);
}

void emu_fence() {
  if (this_worker->launch->options.is_checked) check_fence();
}

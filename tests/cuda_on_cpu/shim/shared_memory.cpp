// Static __shared__ objects and __threadfence: what the checker and the poison need to know of them.
#include <cstring>

#include "block.h"
#include "checker.h"

// Each thread calls this where the object is declared; the first one of a block poisons it.
void emu_declare_shared(void* object, size_t size) {
  Worker* worker = this_worker;
  if (worker->launch->options.is_checked) check_shared(object, size);
  unsigned& block = worker->poisoned[object];
  if (block == worker->block_number) return;
  block = worker->block_number;
  memset(object, 0xFF, size);
}

void emu_fence() {
  if (this_worker->launch->options.is_checked) check_fence();
}

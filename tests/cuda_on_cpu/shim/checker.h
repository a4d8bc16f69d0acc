// Finds races, accesses out of bounds, reads of uninitialised shared memory, and misalignment, as
// compute-sanitizer does on a device.  It needs one worker, and kernels compiled with the hooks of
// tsan_hooks.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

// One access by the running thread.  `caller`: the instruction after it, for the report.
struct Access {
  const char* address;
  size_t size;
  bool is_write, is_atomic;
  bool is_in_flight;  // a write of cp.async that has not been waited for
  uintptr_t caller;
};

void check(const Access& access);
void check_misaligned(uintptr_t caller);
void check_block_begins();
void check_shared(void* object, size_t size);
void check_fence();

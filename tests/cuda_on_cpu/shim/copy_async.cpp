// cp.async: the copy happens at some time between its issue and the end of the wait for its group.
//
// In order, each copy happens as late as it may, so a missing wait reads poison.  Reversed, it
// happens at once, so a copy into a buffer that is still being read destroys it.  Random: either.
#include <cstring>

#include "block.h"
#include "checker.h"

static void copy(const AsyncCopy& copy) {
  memcpy(copy.shared, copy.global, copy.source_size);
  memset((char*)copy.shared + copy.source_size, 0, copy.size - copy.source_size);
}

static bool copies_at_once(Worker* worker) {
  int order = worker->launch->options.order;
  return order == EMU_REVERSED || (order == EMU_RANDOM && worker->random() % 2);
}

void emu_copy_async(void* shared, const void* global, int size, int source_size, int line) {
  Worker* worker = this_worker;
  if ((size_t)shared % size || (size_t)global % size) emu_fail("misaligned cp.async", line);
  if (worker->launch->options.is_checked) {
    uintptr_t caller = (uintptr_t)__builtin_return_address(0);
    if (source_size) check({(const char*)global, (size_t)source_size, false, false, false, caller});
    check({(const char*)shared, (size_t)size, true, false, true, caller});
  }
  AsyncCopy issued{shared, global, size, source_size};
  if (copies_at_once(worker)) copy(issued);
  worker->threads[worker->current].uncommitted.push_back(issued);
}

void emu_copy_async_commit() {
  Thread& thread = this_worker->threads[this_worker->current];
  thread.groups.push_back(std::move(thread.uncommitted));
  thread.uncommitted.clear();
}

void emu_copy_async_wait(int groups_in_flight) {
  uintptr_t caller = (uintptr_t)__builtin_return_address(0);
  Worker* worker = this_worker;
  auto& groups = worker->threads[worker->current].groups;
  while ((int)groups.size() > groups_in_flight) {
    for (const AsyncCopy& waited : groups.front()) {
      if (worker->launch->options.is_checked)
        check({(const char*)waited.shared, (size_t)waited.size, true, false, false, caller});
      copy(waited);
    }
    groups.erase(groups.begin());
  }
}

void copies_after_exit(Worker* worker) {
  Thread& thread = worker->threads[worker->current];
  bool is_unwaited = !thread.uncommitted.empty();
  for (const auto& group : thread.groups) is_unwaited |= !group.empty();
  thread.uncommitted.clear();
  thread.groups.clear();
  if (is_unwaited) {
    record_error(worker, "%s: exits without waiting for its cp.async", place(worker).c_str());
  }
}

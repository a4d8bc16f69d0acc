// __syncthreads and its variants.  All threads of a block must call the same one: a thread that has
// exited, or waits at another line, is an error here although some devices let it pass.
#include "block.h"

static int result_of(const Worker* worker) {
  unsigned num_true = 0;
  for (unsigned t = 0; t < worker->num_threads; t++) num_true += worker->threads[t].predicate != 0;
  switch (worker->barrier_kind) {
    case EMU_SYNC_COUNT: return num_true;
    case EMU_SYNC_AND: return num_true == worker->num_threads;
    case EMU_SYNC_OR: return num_true > 0;
    default: return 0;
  }
}

static void release_all(Worker* worker) {
  worker->barrier_result = result_of(worker);
  worker->barrier_epoch++;
  worker->num_at_barrier = 0;
  for (unsigned i = 0; i < worker->num_warps; i++) {
    unsigned lanes = worker->warps[i].at_barrier;
    worker->warps[i].at_barrier = 0;
    if (int(i) == worker->current / 32) lanes &= ~Worker::bit_of(worker->current);
    set_ready(worker, i, lanes);
  }
}

int emu_barrier(int kind, int predicate, int line) {
  Worker* worker = this_worker;
  Thread& thread = worker->threads[worker->current];
  if (!worker->num_at_barrier) {
    worker->barrier_line = line;
    worker->barrier_kind = kind;
  } else if (worker->barrier_line != line || worker->barrier_kind != kind) {
    record_error(worker, "%s: divergent barrier: __syncthreads at line %d while others wait at line "
                 "%d", place(worker).c_str(), line, worker->barrier_line);
    stop_block(worker);
  }
  if (worker->num_done) {
    record_error(worker, "%s: divergent barrier: __syncthreads at line %d after %u threads of the "
                 "block exited", place(worker).c_str(), line, worker->num_done);
    stop_block(worker);
  }
  thread.barrier_line = line;
  thread.predicate = predicate;
  worker->warp_of(worker->current).at_barrier |= Worker::bit_of(worker->current);
  if (++worker->num_at_barrier == worker->num_threads) {
    release_all(worker);
  } else {
    wait_for_others(worker);
  }
  return worker->barrier_result;
}

void barrier_after_exit(Worker* worker) {
  if (worker->num_at_barrier) {
    record_error(worker, "%s: divergent barrier: exits while %u threads wait at __syncthreads at line "
                 "%d", place(worker).c_str(), worker->num_at_barrier, worker->barrier_line);
  }
}

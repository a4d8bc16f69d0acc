// Runs one block: which thread comes next, and what it means when none can run.
//
// A thread runs until it waits.  The order decides who follows: in order, the lowest ready lane of
// the current warp; reversed, the highest; random, any ready lane of any warp.  A kernel whose
// result depends on the order lacks a barrier.
#include <cstdio>
#include <algorithm>
#include <cstring>

#include "block.h"
#include "checker.h"

__thread emu_thread emu_current __attribute__((tls_model("initial-exec")));
__thread Worker* this_worker __attribute__((tls_model("initial-exec"))) = nullptr;

static std::atomic<unsigned> last_block_number{0};

void record_error(Worker* worker, const char* format, ...) {
  worker->is_finished = true;
  if (!worker->error.empty()) return;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  worker->error = text;
}

void stop_block(Worker* worker) {
  switch_to(worker, &worker->main);
  __builtin_unreachable();
}

std::string place(const Worker* worker) {
  const uint3 block = emu_current.block_index, thread = worker->threads[worker->current].index;
  char text[120];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", block.x, block.y, block.z,
           thread.x, thread.y, thread.z);
  return text;
}

void emu_fail(const char* what, int line) {
  record_error(this_worker, "%s: %s at line %d", place(this_worker).c_str(), what, line);
  stop_block(this_worker);
}

void set_ready(Worker* worker, int warp, unsigned lanes) {
  if (!lanes) return;
  worker->warps[warp].ready |= lanes;
  worker->ready_warps |= 1u << warp;
}

static int lowest(unsigned mask) { return __builtin_ctz(mask); }
static int highest(unsigned mask) { return 31 - __builtin_clz(mask); }

static int any_of(Worker* worker, unsigned mask) {
  for (int skip = worker->random() % __builtin_popcount(mask); skip; skip--) mask &= mask - 1;
  return lowest(mask);
}

// The number of the next thread, taken from the ready ones; -1 if none is ready.
static int take_next(Worker* worker) {
  if (!worker->ready_warps) return -1;
  int order = worker->launch->options.order, warp, lane;
  if (order == EMU_RANDOM) {
    warp = any_of(worker, worker->ready_warps);
    lane = any_of(worker, worker->warps[warp].ready);
  } else {
    auto choose = order == EMU_REVERSED ? highest : lowest;
    warp = worker->current / 32;
    bool can_stay = worker->current >= 0 && worker->warps[warp].ready;
    if (!can_stay) warp = choose(worker->ready_warps);
    lane = choose(worker->warps[warp].ready);
  }
  Warp& w = worker->warps[warp];
  w.ready &= ~(1u << lane);
  if (!w.ready) worker->ready_warps &= ~(1u << warp);
  return warp * 32 + lane;
}

static void set_current(Worker* worker, int thread) {
  worker->current = thread;
  emu_current.thread_index = worker->threads[thread].index;
  emu_current.lane = thread % 32;
}

static void record_deadlock(Worker* worker) {
  unsigned at_barrier = 0, in_collective = 0;
  std::string examples;
  int last_line = -1, num_examples = 0;
  for (unsigned t = 0; t < worker->num_threads; t++) {
    const Thread& thread = worker->threads[t];
    const Warp& warp = worker->warp_of(t);
    if (warp.done & Worker::bit_of(t)) continue;
    bool waits_at_barrier = warp.at_barrier & Worker::bit_of(t);
    (waits_at_barrier ? at_barrier : in_collective)++;
    int line = waits_at_barrier ? thread.barrier_line : thread.waits_for->line;
    if (line == last_line || num_examples++ >= 6) continue;
    last_line = line;
    const char* what = waits_at_barrier ? "at __syncthreads" : "in a warp collective";
    examples += "; thread " + std::to_string(t) + " waits " + what + " at line " +
                std::to_string(line);
  }
  record_error(worker, "deadlock: %u threads wait at __syncthreads, %u in a warp collective, %u have "
               "exited%s", at_barrier, in_collective, worker->num_done, examples.c_str());
}

void wait_for_others(Worker* worker) {
  worker->threads[worker->current].fibre = worker->running;
  int next = worker->is_finished ? -1 : take_next(worker);
  if (next < 0) {
    if (!worker->is_finished) record_deadlock(worker);
    stop_block(worker);
  }
  if (worker->warp_of(next).fresh & Worker::bit_of(next)) {
    worker->current = next;
    switch_to(worker, new_fibre(worker));
  } else {
    set_current(worker, next);
    Fibre* fibre = worker->threads[next].fibre;
    if (fibre != worker->running) switch_to(worker, fibre);
  }
}

static void exit_thread(Worker* worker) {
  copies_after_exit(worker);
  worker->warp_of(worker->current).done |= Worker::bit_of(worker->current);
  worker->num_done++;
  collectives_after_exit(worker, worker->current / 32);
  barrier_after_exit(worker);
}

// The body of every fibre.  A fibre whose thread ended runs the next fresh thread without a switch.
void thread_main() {
  Worker* worker = this_worker;
  int thread = worker->current;
  for (;;) {
    set_current(worker, thread);
    worker->warp_of(thread).fresh &= ~Worker::bit_of(thread);
    worker->launch->kernel->run(worker->launch->arguments);
    exit_thread(worker);
    bool is_last = worker->is_finished || worker->num_done == worker->num_threads;
    thread = is_last ? -1 : take_next(worker);
    if (thread < 0) {
      if (!is_last) record_deadlock(worker);
      worker->free_fibres.push_back(worker->running);
      stop_block(worker);
    }
    if (!(worker->warp_of(thread).fresh & Worker::bit_of(thread))) {
      worker->free_fibres.push_back(worker->running);
      set_current(worker, thread);
      switch_to(worker, worker->threads[thread].fibre);
      __builtin_unreachable();
    }
  }
}

void run_block(Worker* worker, long position) {
  const Launch& launch = *worker->launch;
  const dim3 grid = launch.grid;
  emu_current.block_index = {unsigned(position % grid.x), unsigned(position / grid.x % grid.y),
                             unsigned(position / grid.x / grid.y)};
  worker->block_number = ++last_block_number;
  worker->num_done = worker->num_at_barrier = worker->barrier_epoch = 0;
  worker->static_shared_size = 0;
  worker->ready_warps = 0;
  worker->is_finished = false;
  worker->random.seed(launch.options.seed * 7919 + position);
  // Values left by another block must not help: NaN as float16, bfloat16 or float32, -1 as int.
  memset(worker->dynamic_shared.data(), 0xFF, worker->dynamic_shared.size());
  for (unsigned i = 0; i < worker->num_warps; i++) {
    Warp& warp = worker->warps[i];
    unsigned lanes = std::min(32u, worker->num_threads - i * 32);
    unsigned exists = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.fresh = exists;
    warp.done = ~exists;
    warp.at_barrier = warp.ready = 0;
    warp.free = ~0u;
    warp.gathering = 0;
    warp.epoch = 0;
    set_ready(worker, i, exists);
  }
  if (launch.options.is_checked) check_block_begins();
  worker->current = -1;
  worker->current = take_next(worker);
  switch_to(worker, new_fibre(worker));
  if (!worker->error.empty()) free_fibres(worker);
}

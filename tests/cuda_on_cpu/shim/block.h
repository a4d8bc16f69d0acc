// The state of a running block: its threads, their fibres, and what they wait for.
#pragma once
#include <atomic>
#include <cstdarg>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

constexpr size_t STACK_SIZE = 128 * 1024;
constexpr int MAX_WARPS = 32;

struct Fibre {
  char* stack = nullptr;
  void* stack_pointer = nullptr;  // where to continue, while it does not run
};

// A warp-wide call that gathers its lanes, or whose values are still being read.
struct Collective {
  unsigned mask, arrived, unread;
  int kind, line;
  emu_leader leader;  // or null
  uint64_t values[32];
};

struct Warp {
  unsigned ready = 0, fresh = 0, done = 0, at_barrier = 0;  // masks of lanes; fresh: not begun
  unsigned free = ~0u, gathering = 0;                       // masks of collectives
  Collective collectives[32];  // a lane is in one at a time
  uint16_t epoch = 0;  // number of __syncwarp that completed, for the checker
};

struct AsyncCopy {
  void* shared;
  const void* global;
  int size, source_size;
};

struct Thread {
  Fibre* fibre = nullptr;
  uint3 index;
  int barrier_line = 0, predicate = 0;
  const Collective* waits_for = nullptr;
  std::vector<AsyncCopy> uncommitted;
  std::vector<std::vector<AsyncCopy>> groups;  // committed copies, oldest first
};

struct Launch {
  const emu_kernel* kernel;
  void** arguments;
  dim3 grid, block;
  unsigned dynamic_shared_size, max_shared_size;
  emu_options options;
  std::vector<long> block_order;
  std::atomic<long> next{0};
  std::atomic<bool> has_failed{false};
  std::mutex mutex;
  std::string error;
};

// One OS thread's part of a launch: it takes blocks and runs them one after another.
struct Worker {
  Launch* launch = nullptr;
  std::vector<char> dynamic_shared;

  Fibre main;  // the OS thread's own stack
  Fibre* running = nullptr;
  std::vector<Fibre*> fibres, free_fibres;

  // The block that runs.
  unsigned block_number = 0;  // unique over all launches
  int current = -1;           // number of the running thread
  unsigned num_threads = 0, num_warps = 0, num_done = 0;
  uint32_t ready_warps = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::mt19937 random;
  bool is_finished = false;
  std::string error;

  unsigned num_at_barrier = 0, barrier_epoch = 0;
  int barrier_kind = 0, barrier_line = 0, barrier_result = 0;
  unsigned static_shared_size = 0;               // of the objects declared so far
  std::unordered_map<void*, unsigned> poisoned;  // shared object -> block that it was poisoned for

  Warp& warp_of(int thread) { return warps[thread / 32]; }
  static unsigned bit_of(int thread) { return 1u << (thread % 32); }
};

extern __thread Worker* this_worker __attribute__((tls_model("initial-exec")));

// fibre.cpp
Fibre* new_fibre(Worker* worker);
void switch_to(Worker* worker, Fibre* fibre);
void free_fibres(Worker* worker);

// scheduler.cpp
void run_block(Worker* worker, long position);
void set_ready(Worker* worker, int warp, unsigned lanes);
void wait_for_others(Worker* worker);  // the running thread waits; returns when it is ready again
void record_error(Worker* worker, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void stop_block(Worker* worker);  // leaves the fibre after record_error
std::string place(const Worker* worker);       // "block (0,0,0) thread (5,0,0)"

// barrier.cpp, collective.cpp, copy_async.cpp: a thread of the block ended
void barrier_after_exit(Worker* worker);
void collectives_after_exit(Worker* worker, int warp);
void copies_after_exit(Worker* worker);

// The checker: what was last done to each byte, by whom, and whether a barrier lies between.
//
// Two accesses to one byte, at least one of them a write, and not both atomic, race unless they are
// ordered.  Within a block a __syncthreads orders them; within a warp a __syncwarp does, too.  Blocks
// are ordered by the pattern "the last block combines": __threadfence, an atomic on a counter, and in
// the block that sees the others' counts another __threadfence (PTX ISA, "Release and acquire
// patterns").  A release covers what the block did before the barrier that precedes the fence,
// and what the fencing thread did itself.
#include "checker.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <set>

#include "block.h"

namespace {

struct Record {
  uint32_t block = 0, epoch = 0, caller = 0;  // caller: offset in the kernel's library
  uint16_t thread = 0, warp_epoch = 0;
  bool is_atomic = false, is_in_flight = false;
};

struct Byte {
  Record write, read, other_read;  // the last read, and the last one by another thread
};

constexpr uintptr_t PAGE = 4096;
constexpr size_t MAX_PAGES = 2000;  // of 240 KiB each
constexpr int MAX_REPORTS = 20;

struct Range {
  const char *begin, *end;
  bool contains(const char* address) const { return address >= begin && address < end; }
};

struct Release {
  uint32_t block, epoch;
  uint16_t thread;
};

struct Acquired {
  Release release;
  uint32_t epoch;  // the acquiring thread's, when it fenced
  uint16_t thread;
};

bool is_on = false;
std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
std::vector<Range> arrays, parameters, shared_objects;
Range image;           // the kernel's library
Range shared_section;  // in it: static shared memory, with gaps between the objects
std::string report;
int num_reports = 0;
std::set<std::pair<uint32_t, uint32_t>> reported;

uint32_t first_block = 0;         // of this launch; records of lower numbers are stale
std::vector<uint3> block_indices;  // by block number - first_block
std::unordered_map<const void*, std::vector<Release>> releases;  // by the atomic's address
std::vector<Acquired> acquired;                                  // by the running block
std::vector<long> fence_epoch;                                   // by thread; -1: none
std::vector<std::vector<Release>> unfenced;                      // by thread: seen, not yet acquired

std::string location(uint32_t caller) {
  char text[40];
  snprintf(text, sizeof text, "[+0x%x]", caller);
  return text;
}

std::string author(const Record& record, bool is_write) {
  uint3 block = block_indices[record.block - first_block];
  char text[160];
  snprintf(text, sizeof text, "%s by thread %u of block (%u,%u,%u) at %s", is_write ? "write" : "read",
           record.thread, block.x, block.y, block.z, location(record.caller).c_str());
  return text;
}

void add_report(const std::string& what, const Record& now, bool is_write) {
  if (!reported.insert({now.caller, 0}).second || num_reports++ >= MAX_REPORTS) return;
  report += what + ": " + author(now, is_write) + "\n";
}

void report_race(const Record& now, bool is_write, const Record& earlier, bool was_write) {
  if (!reported.insert({now.caller, earlier.caller}).second || num_reports++ >= MAX_REPORTS) return;
  report += "race: " + author(now, is_write) + "; earlier " + author(earlier, was_write) + "\n";
}

bool is_acquired(const Record& earlier, const Record& now) {
  for (const Acquired& a : acquired) {
    if (a.release.block != earlier.block) continue;
    bool is_released = earlier.epoch < a.release.epoch ||
                       (earlier.epoch == a.release.epoch && earlier.thread == a.release.thread);
    if (is_released && (now.thread == a.thread || now.epoch > a.epoch)) return true;
  }
  return false;
}

bool races(const Record& earlier, const Record& now, bool is_shared) {
  if (earlier.block < first_block || (earlier.is_atomic && now.is_atomic)) return false;
  if (earlier.block != now.block) return !is_shared && !is_acquired(earlier, now);
  if (earlier.thread == now.thread || earlier.epoch != now.epoch) return false;
  bool is_same_warp = earlier.thread / 32 == now.thread / 32;
  return !is_same_warp || earlier.warp_epoch == now.warp_epoch;
}

void check_byte(Byte& byte, const Record& now, bool is_write, bool is_shared) {
  if (byte.write.is_in_flight && byte.write.block == now.block && !now.is_in_flight && !is_write)
    add_report("read of a cp.async that was not waited for", now, is_write);
  if (races(byte.write, now, is_shared)) report_race(now, is_write, byte.write, true);
  if (is_write) {
    if (races(byte.read, now, is_shared)) {
      report_race(now, true, byte.read, false);
    } else if (races(byte.other_read, now, is_shared)) {
      report_race(now, true, byte.other_read, false);
    }
    byte.write = now;
  } else {
    if (byte.read.thread != now.thread || byte.read.block != now.block) byte.other_read = byte.read;
    byte.read = now;
  }
}

enum Memory { UNCHECKED, NOWHERE, GLOBAL, SHARED };

// Where the first byte lies, and the range around it.
Memory find(const Worker* worker, const char* address, Range& range) {
  const char* stack = worker->running->stack;
  if (address >= stack && address < stack + STACK_SIZE) return UNCHECKED;
  range = {emu_current.dynamic_shared,
           emu_current.dynamic_shared + emu_current.dynamic_shared_size};
  if (range.contains(address)) return SHARED;
  for (const Range& object : shared_objects) {
    range = object;
    if (range.contains(address)) return SHARED;
  }
  if (shared_section.contains(address)) return NOWHERE;
  range = {nullptr, nullptr};  // arguments may be views of one array: the longest counts
  for (const Range& array : arrays) {
    if (array.contains(address) && array.end > range.end) range = array;
  }
  if (range.end) return GLOBAL;
  const Range own[] = {
      image,
      {(const char*)&emu_current, (const char*)(&emu_current + 1)},
      {(const char*)worker->warps.data(), (const char*)(worker->warps.data() + worker->num_warps)},
  };
  for (const Range& unchecked : own) {
    if (unchecked.contains(address)) return UNCHECKED;
  }
  for (const Range& parameter : parameters) {
    if (parameter.contains(address)) return UNCHECKED;
  }
  return NOWHERE;
}

Record running_thread(uintptr_t caller) {
  const Worker* worker = this_worker;
  Record now;
  now.block = worker->block_number;
  now.epoch = worker->barrier_epoch;
  now.thread = worker->current;
  now.warp_epoch = worker->warps[worker->current / 32].epoch;
  now.caller = caller - 1 - (uintptr_t)image.begin;
  return now;
}

// The access itself could crash this process.
[[noreturn]] void stop_before_access(const char* what) {
  record_error(this_worker, "%s: stopped before an access: %s", place(this_worker).c_str(), what);
  stop_block(this_worker);
}

void synchronize_by_atomic(const Worker* worker, const void* address, const Record& now) {
  std::vector<Release>& here = releases[address];
  std::vector<Release>& seen = unfenced[now.thread];
  seen.insert(seen.end(), here.begin(), here.end());
  long epoch = fence_epoch[now.thread];
  if (epoch >= 0) here.push_back({worker->block_number, (uint32_t)epoch, now.thread});
}

}  // namespace

void check(const Access& access) {
  Worker* worker = this_worker;
  if (!is_on || !worker || worker->running == &worker->main) return;
  Range range;
  Memory memory = find(worker, access.address, range);
  if (memory == UNCHECKED) return;
  Record now = running_thread(access.caller);
  now.is_atomic = access.is_atomic;
  now.is_in_flight = access.is_in_flight;
  if (memory == NOWHERE || access.address + access.size > range.end) {
    add_report("out of bounds of every array passed to the kernel", now, access.is_write);
    stop_before_access("out of bounds");
  }
  bool is_shared = memory == SHARED;
  if (access.is_atomic && !is_shared) synchronize_by_atomic(worker, access.address, now);
  if (access.is_write && !access.is_atomic && !is_shared) fence_epoch[now.thread] = -1;
  for (size_t i = 0; i < access.size; i++) {
    uintptr_t address = (uintptr_t)access.address + i;
    std::unique_ptr<Byte[]>& page = pages[address / PAGE];
    if (!page) page = std::make_unique<Byte[]>(PAGE);
    Byte& byte = page[address % PAGE];
    if (is_shared && !access.is_write && byte.write.block != now.block)
      add_report("uninitialised shared memory", now, false);
    check_byte(byte, now, access.is_write, is_shared);
  }
}

void check_misaligned(uintptr_t caller) {
  if (!is_on) return;
  add_report("misaligned address", running_thread(caller), false);
  stop_before_access("misaligned");
}

void check_block_begins() {
  Worker* worker = this_worker;
  if (block_indices.empty()) first_block = worker->block_number;
  block_indices.push_back(emu_current.block_index);
  acquired.clear();
  fence_epoch.assign(worker->num_threads, -1);
  unfenced.assign(worker->num_threads, {});
}

void check_shared(void* object, size_t size) {
  for (const Range& known : shared_objects) {
    if (known.begin == object) return;
  }
  shared_objects.push_back({(char*)object, (char*)object + size});
}

void check_fence() {
  uint16_t thread = this_worker->current;
  uint32_t epoch = this_worker->barrier_epoch;
  fence_epoch[thread] = epoch;
  for (const Release& release : unfenced[thread]) acquired.push_back({release, epoch, thread});
  unfenced[thread].clear();
}

static int find_image(dl_phdr_info* info, size_t, void* function) {
  const char *begin = (char*)-1, *end = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const char* segment = (char*)info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    begin = std::min(begin, segment);
    end = std::max(end, segment + info->dlpi_phdr[i].p_memsz);
  }
  Range candidate{begin, end};
  if (!candidate.contains((char*)function)) return 0;
  image = candidate;
  return 1;
}

enum range_kind { ARRAY, PARAMETER, SHARED_SECTION };

extern "C" {

// Before a launch.  `kinds` are of range_kind.
void emu_check_begin(void* function, int num_ranges, void** begins, const size_t* sizes,
                     const int* kinds) {
  is_on = true;
  if (pages.size() > MAX_PAGES) pages.clear();
  arrays.clear();
  parameters.clear();
  shared_objects.clear();
  block_indices.clear();
  releases.clear();
  report.clear();
  reported.clear();
  num_reports = 0;
  for (int i = 0; i < num_ranges; i++) {
    Range range{(char*)begins[i], (char*)begins[i] + sizes[i]};
    if (kinds[i] == ARRAY) arrays.push_back(range);
    if (kinds[i] == PARAMETER) parameters.push_back(range);
    if (kinds[i] == SHARED_SECTION) shared_section = range;
  }
  dl_iterate_phdr(find_image, function);
}

// After a launch.  Returns the length of the report, of which `text` takes the beginning.
int emu_check_end(char* text, int size) {
  is_on = false;
  snprintf(text, size, "%s", report.c_str());
  return report.size();
}

}

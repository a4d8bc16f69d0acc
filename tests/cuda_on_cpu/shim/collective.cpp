// Warp-wide calls: __syncwarp, shuffles, votes, reductions, mma and ldmatrix.
//
// The lanes named by the mask meet in one Collective.  Lanes that have exited do not count, as on a
// device.  All lanes must call from the same line, and masks that overlap must be equal.
#include "block.h"

static void complete(Warp& warp, Collective& collective) {
  if (collective.kind == EMU_MATRIX && collective.arrived != ~0u)
    emu_fail("mma or ldmatrix without all 32 lanes of the warp", collective.line);
  warp.gathering &= ~(1u << (&collective - warp.collectives));
  collective.unread = collective.arrived;
  if (collective.leader) collective.leader(collective.values);
  if (collective.kind == EMU_SYNCWARP) warp.epoch++;
}

static bool is_complete(const Warp& warp, const Collective& collective) {
  return !(collective.mask & ~(collective.arrived | warp.done));
}

static void check_lines(Worker* worker, const Collective& other, unsigned mask, int kind, int line) {
  if (other.mask == mask && other.kind == kind && other.line == line) return;
  record_error(worker, "%s: the lanes of a warp meet in different collectives: line %d with mask %08x "
               "and line %d with mask %08x", place(worker).c_str(), line, mask, other.line, other.mask);
  stop_block(worker);
}

static Collective& find_or_begin(Worker* worker, Warp& warp, unsigned mask, int kind,
                                 emu_leader leader, int line) {
  for (unsigned rest = warp.gathering; rest; rest &= rest - 1) {
    Collective& other = warp.collectives[__builtin_ctz(rest)];
    if (!(other.mask & mask)) continue;
    check_lines(worker, other, mask, kind, line);
    return other;
  }
  int index = __builtin_ctz(warp.free);
  warp.free &= ~(1u << index);
  warp.gathering |= 1u << index;
  Collective& collective = warp.collectives[index];
  collective.mask = mask;
  collective.arrived = 0;
  collective.kind = kind;
  collective.leader = leader;
  collective.line = line;
  return collective;
}

const uint64_t* emu_collective(unsigned mask, int kind, uint64_t value, emu_leader leader,
                               unsigned* arrived, int line) {
  Worker* worker = this_worker;
  int thread = worker->current;
  Warp& warp = worker->warp_of(thread);
  unsigned bit = Worker::bit_of(thread);
  if (!(mask & bit)) emu_fail("a warp collective whose mask lacks the calling lane", line);
  Collective& collective = find_or_begin(worker, warp, mask, kind, leader, line);
  collective.values[thread % 32] = value;
  collective.arrived |= bit;
  if (is_complete(warp, collective)) {
    complete(warp, collective);
    set_ready(worker, thread / 32, collective.arrived & ~bit);
  } else {
    worker->threads[thread].waits_for = &collective;
    wait_for_others(worker);
  }
  *arrived = collective.arrived;
  collective.unread &= ~bit;
  if (!collective.unread) warp.free |= 1u << (&collective - warp.collectives);
  return collective.values;
}

void collectives_after_exit(Worker* worker, int index) {
  Warp& warp = worker->warps[index];
  for (unsigned rest = warp.gathering; rest; rest &= rest - 1) {
    Collective& collective = warp.collectives[__builtin_ctz(rest)];
    if (!is_complete(warp, collective)) continue;
    complete(warp, collective);
    set_ready(worker, index, collective.arrived);
  }
}

// Barriers, fences, shuffles, votes and reductions over a warp.
#pragma once

EMU_FUNCTION void __syncthreads(EMU_LINE) { emu_barrier(EMU_SYNC, 0, line); }
EMU_FUNCTION int __syncthreads_count(int predicate, EMU_LINE) {
  return emu_barrier(EMU_SYNC_COUNT, predicate, line);
}
EMU_FUNCTION int __syncthreads_and(int predicate, EMU_LINE) {
  return emu_barrier(EMU_SYNC_AND, predicate, line);
}
EMU_FUNCTION int __syncthreads_or(int predicate, EMU_LINE) {
  return emu_barrier(EMU_SYNC_OR, predicate, line);
}
EMU_FUNCTION void __threadfence() { emu_fence(); }
EMU_FUNCTION void __threadfence_block() {}
EMU_FUNCTION void __threadfence_system() { emu_fence(); }

EMU_FUNCTION void __syncwarp(unsigned mask = ~0u, EMU_LINE) {
  unsigned arrived;
  emu_collective(mask, EMU_SYNCWARP, 0, nullptr, &arrived, line);
}

template <class T>
EMU_FUNCTION uint64_t emu_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  memcpy((void*)&word, (const void*)&value, sizeof value);
  return word;
}

template <class T>
EMU_FUNCTION T emu_shuffle(unsigned mask, T value, int source, int line) {
  unsigned arrived;
  const uint64_t* values =
      emu_collective(mask, EMU_SHUFFLE, emu_word(value), nullptr, &arrived, line);
  if (!(arrived >> source & 1)) emu_fail("a shuffle reads a lane that does not take part", line);
  memcpy((void*)&value, (const void*)&values[source], sizeof value);
  return value;
}
template <class T>
EMU_FUNCTION T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_LINE) {
  int lane = emu_current.lane;
  return emu_shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), line);
}
template <class T>
EMU_FUNCTION T __shfl_xor_sync(unsigned mask, T value, int xor_mask, int width = 32, EMU_LINE) {
  int lane = emu_current.lane, source = lane ^ xor_mask;
  if (source >= (lane & ~(width - 1)) + width) source = lane;
  return emu_shuffle(mask, value, source, line);
}
template <class T>
EMU_FUNCTION T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_LINE) {
  int lane = emu_current.lane, within = lane & (width - 1);
  return emu_shuffle(mask, value, within + (int)delta < width ? lane + (int)delta : lane, line);
}
template <class T>
EMU_FUNCTION T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_LINE) {
  int lane = emu_current.lane, within = lane & (width - 1);
  return emu_shuffle(mask, value, within >= (int)delta ? lane - (int)delta : lane, line);
}

EMU_FUNCTION unsigned __ballot_sync(unsigned mask, int predicate, EMU_LINE) {
  unsigned arrived, ballot = 0;
  const uint64_t* values =
      emu_collective(mask, EMU_BALLOT, predicate != 0, nullptr, &arrived, line);
  for (int i = 0; i < 32; i++) {
    if (arrived >> i & 1) ballot |= (unsigned)values[i] << i;
  }
  return ballot;
}
EMU_FUNCTION int __any_sync(unsigned mask, int predicate, EMU_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}
EMU_FUNCTION int __all_sync(unsigned mask, int predicate, EMU_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
template <class T>
EMU_FUNCTION unsigned __match_any_sync(unsigned mask, T value, EMU_LINE) {
  unsigned arrived, same = 0;
  const uint64_t* values =
      emu_collective(mask, EMU_MATCH, emu_word(value), nullptr, &arrived, line);
  for (int i = 0; i < 32; i++) {
    if ((arrived >> i & 1) && values[i] == emu_word(value)) same |= 1u << i;
  }
  return same;
}
EMU_FUNCTION unsigned __activemask() { return ~0u; }

#define EMU_REDUCTION(name, T, combined)                                                        \
  EMU_FUNCTION T name(unsigned mask, T value, EMU_LINE) {                                       \
    unsigned arrived;                                                                           \
    const uint64_t* values =                                                                    \
        emu_collective(mask, EMU_REDUCE, emu_word(value), nullptr, &arrived, line);             \
    T all = 0;                                                                                  \
    bool is_first = true;                                                                       \
    for (int i = 0; i < 32; i++) {                                                              \
      if (!(arrived >> i & 1)) continue;                                                        \
      T one = (T)values[i];                                                                     \
      all = is_first ? one : (combined);                                                        \
      is_first = false;                                                                         \
    }                                                                                           \
    return all;                                                                                 \
  }
EMU_REDUCTION(__reduce_add_sync, int, all + one)
EMU_REDUCTION(__reduce_add_sync, unsigned, all + one)
EMU_REDUCTION(__reduce_max_sync, int, all < one ? one : all)
EMU_REDUCTION(__reduce_max_sync, unsigned, all < one ? one : all)
EMU_REDUCTION(__reduce_min_sync, int, one < all ? one : all)
EMU_REDUCTION(__reduce_min_sync, unsigned, one < all ? one : all)
EMU_REDUCTION(__reduce_and_sync, unsigned, all & one)
EMU_REDUCTION(__reduce_or_sync, unsigned, all | one)
EMU_REDUCTION(__reduce_xor_sync, unsigned, all ^ one)

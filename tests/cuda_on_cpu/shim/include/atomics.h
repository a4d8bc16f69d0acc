// Atomic functions.  They are atomic for the host, too: several workers may run blocks at once.
#pragma once

template <class T>
using emu_same = std::common_type_t<T>;  // a parameter from which T is not deduced

template <class T, class Combine>
EMU_FUNCTION T emu_read_modify_write(T* p, Combine combine) {
  T old, value;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    value = combine(old);
  } while (!__atomic_compare_exchange(p, &old, &value, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return old;
}

#define EMU_ATOMIC(name, combined)                                              \
  template <class T>                                                            \
  EMU_FUNCTION T name(T* p, emu_same<T> value) {                                \
    return emu_read_modify_write(p, [value](T old) { return T(combined); });    \
  }                                                                             \
  template <class T>                                                            \
  EMU_FUNCTION T name##_block(T* p, emu_same<T> value) { return name(p, value); }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicExch, ((void)old, value))
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)

template <class T>
EMU_FUNCTION T atomicCAS(T* p, emu_same<T> expected, emu_same<T> value) {
  __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

// The functions that g++ calls at each access in code compiled with -fsanitize=thread, and at each
// misaligned one with -fsanitize=alignment.  They are ours instead of the runtime library's.
#include "checker.h"

#define CALLER ((uintptr_t)__builtin_return_address(0))
#define CHECK(address, size, is_write, is_atomic) \
  check({(const char*)(address), (size_t)(size), is_write, is_atomic, false, CALLER})

#define PLAIN(size)                                                                 \
  void __tsan_read##size(void* p) { CHECK(p, size, false, false); }                 \
  void __tsan_write##size(void* p) { CHECK(p, size, true, false); }                 \
  void __tsan_unaligned_read##size(void* p) { CHECK(p, size, false, false); }       \
  void __tsan_unaligned_write##size(void* p) { CHECK(p, size, true, false); }       \
  void __tsan_volatile_read##size(void* p) { CHECK(p, size, false, false); }        \
  void __tsan_volatile_write##size(void* p) { CHECK(p, size, true, false); }

#define READ_MODIFY_WRITE(bits, T, name)                                   \
  T __tsan_atomic##bits##_##name(volatile T* p, T value, int) {            \
    CHECK(p, sizeof(T), true, true);                                       \
    return __atomic_##name(p, value, __ATOMIC_SEQ_CST);                    \
  }

#define COMPARE_EXCHANGE(bits, T, name, is_weak)                                                \
  int __tsan_atomic##bits##_compare_exchange_##name(volatile T* p, T* expected, T value, int, int) { \
    CHECK(p, sizeof(T), true, true);                                                            \
    return __atomic_compare_exchange_n(p, expected, value, is_weak, __ATOMIC_SEQ_CST,           \
                                       __ATOMIC_SEQ_CST);                                       \
  }

#define ATOMICS(bits, T)                                                                     \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                   \
    CHECK(p, sizeof(T), false, true);                                                        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                             \
  }                                                                                          \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                            \
    CHECK(p, sizeof(T), true, true);                                                         \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                            \
  }                                                                                          \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {                            \
    CHECK(p, sizeof(T), true, true);                                                         \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                  \
  }                                                                                          \
  READ_MODIFY_WRITE(bits, T, fetch_add)                                                      \
  READ_MODIFY_WRITE(bits, T, fetch_sub)                                                      \
  READ_MODIFY_WRITE(bits, T, fetch_and)                                                      \
  READ_MODIFY_WRITE(bits, T, fetch_or)                                                       \
  READ_MODIFY_WRITE(bits, T, fetch_xor)                                                      \
  COMPARE_EXCHANGE(bits, T, strong, false)                                                   \
  COMPARE_EXCHANGE(bits, T, weak, true)

extern "C" {
void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) { check_misaligned(CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_read_range(void* p, long size) { CHECK(p, size, false, false); }
void __tsan_write_range(void* p, long size) { CHECK(p, size, true, false); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}

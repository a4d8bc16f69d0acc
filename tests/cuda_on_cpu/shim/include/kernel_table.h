// The table of kernels that site/cuda_on_cpu/translate.py appends to the text: how to call each one
// with an array of pointers to its arguments, as cuLaunchKernel takes them, and what they are.
#pragma once

template <class... T, size_t... I>
EMU_FUNCTION void emu_call(void (*kernel)(T...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_cv_t<T>*)arguments[I]...);
}

template <class T>
constexpr char emu_kind = std::is_pointer_v<T>          ? 'p'
                          : std::is_floating_point_v<T> ? 'f'
                          : std::is_integral_v<T>       ? 'i'
                                                        : 's';

template <auto kernel>
struct emu_entry;
template <class... T, void (*kernel)(T...)>
struct emu_entry<kernel> {
  static void run(void** arguments) {
    emu_call(kernel, arguments, std::index_sequence_for<T...>{});
  }
  static constexpr int count = sizeof...(T);
  static constexpr int sizes[] = {(int)sizeof(T)..., 0};
  static constexpr char kinds[] = {emu_kind<T>..., 0};
};

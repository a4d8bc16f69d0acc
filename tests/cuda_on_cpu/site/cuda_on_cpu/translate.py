"""Turns CUDA C, after the preprocessor, into C++ that g++ compiles.

    __global__ void __launch_bounds__(128) f(  ->  void f(        and an entry in the kernel table
    extern __shared__ T name[];                ->  T *name = (T *)emu_current.dynamic_shared;
    __shared__ T name[32];                     ->  static T name[32]; emu_declare_shared(...);

The rest of CUDA C is done by shim/include/cuda_emulation.h.
"""

import re

from cuda_on_cpu.options import EmulationError

# The storage of __shared__ objects.  One worker runs one block at a time, so they can be static.
# For the checker they lie in a section of their own, each with a guard after it.
ONE_WORKER_STORAGE = "static"
CHECKED_STORAGE = 'static __attribute__((section("emu_shared")))'
THREAD_STORAGE = "static thread_local"
SECTION_BOUNDS = """\
extern char section_begin[] __asm__("__start_emu_shared") __attribute__((weak));
extern char section_end[] __asm__("__stop_emu_shared") __attribute__((weak));
extern "C" char *const emu_shared_section[] = {section_begin, section_end};
"""
FIRST_LINE = '# 1 "kernel.cu"'  # between our headers and the kernel's text

# One level of nested parentheses is enough for __launch_bounds__(max(A, B), C).
ARGUMENTS = r"\(((?:[^()]|\([^()]*\))*)\)"
BOUNDS = rf"(?:__launch_bounds__\s*{ARGUMENTS}\s*)?"
KERNEL = re.compile(rf"__global__\s+{BOUNDS}(?:static\s+)?void\s+{BOUNDS}(\w+)\s*\(")
DYNAMIC = re.compile(r"extern\s+__shared__\s+([^;\[\]]*?)(\w+)\s*\[\s*\]\s*;")
STATIC = re.compile(r"(?<!\w)__shared__(?!\w)")
ALIGNMENT = re.compile(r"__attribute__\s*\(\(aligned\s*\([^()]*\)\)\)|alignas\s*\([^()]*\)")
ALIGNAS = re.compile(r"alignas\s*\(([^()]*)\)")
BRACKETS = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}")


def translate(preprocessed: str, storage: str) -> str:
    """Returns the text of a C++ file.

    preprocessed  with line markers, and the four words still in it
    storage       of a __shared__ object: one of the constants below

    The anonymous namespace keeps templates out of sections that linkers merge, where a section of
    our own would be refused.
    """
    kernels = dict[str, str]()  # name -> maximum number of threads, an expression

    def strip_kernel(match: re.Match[str]) -> str:
        before, after, name = match.groups()
        kernels[name] = _first_argument(before or after or "0")
        return re.sub(rf"__global__|__launch_bounds__\s*{ARGUMENTS}", "", match[0])

    text = KERNEL.sub(strip_kernel, preprocessed)
    if "__global__" in text:
        raise EmulationError("a __global__ function has a form that translate.py does not know")
    text = DYNAMIC.sub(_dynamic_shared, text)
    text = _declare_static_shared(text, storage)
    rows = ",\n".join(_table_row(name, bounds) for name, bounds in kernels.items())
    prelude, marker, own = text.partition(FIRST_LINE)
    return (
        f"{prelude}\nnamespace {{\n{marker}{own}\n}}\n"
        f'extern "C" const emu_kernel emu_kernels[] = {{\n{rows}\n}};\n'
        f'extern "C" const int emu_num_kernels = {len(kernels)};\n'
        f"{SECTION_BOUNDS}"
    )


def _table_row(name: str, bounds: str) -> str:
    entry = f"emu_entry<&{name}>"
    return f'{{"{name}", {entry}::run, {entry}::count, {entry}::sizes, {entry}::kinds, {bounds}}}'


def _first_argument(arguments: str) -> str:
    """Up to the first comma that is not within parentheses."""
    depth = 0
    for index, character in enumerate(arguments):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            return arguments[:index]
    return arguments


def _dynamic_shared(match: re.Match[str]) -> str:
    element = ALIGNMENT.sub("", match[1]).strip()
    return f"{element} *{match[2]} = ({element} *)emu_current.dynamic_shared;"


def _declare_static_shared(text: str, storage: str) -> str:
    parts, end = [], 0
    for match in STATIC.finditer(text):
        stop = _end_of_statement(text, match.end())
        declaration = text[match.end() : stop]
        parts += [text[end : match.start()], storage]
        parts.append(ALIGNAS.sub(r"__attribute__((aligned(\1)))", declaration))
        for name in _declared_names(declaration):
            parts.append(f"; emu_declare_shared((void *)&{name}, sizeof({name}))")
            if storage == CHECKED_STORAGE:
                parts.append(f"; {storage} __attribute__((used)) char emu_guard_{name}[64]")
        end = stop
    return "".join([*parts, text[end:]])


def _end_of_statement(text: str, start: int) -> int:
    """The index of the semicolon that ends a declaration, which may hold a struct's body."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if text[index] == ";" and depth == 0:
            return index
    raise EmulationError("a __shared__ declaration has no end")


def _declared_names(declaration: str) -> list[str]:
    previous = None
    text = ALIGNMENT.sub("", declaration)
    while text != previous:
        previous, text = text, BRACKETS.sub(" ", text)
    return [re.findall(r"\w+", declarator)[-1] for declarator in text.split(",")]

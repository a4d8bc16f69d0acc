#!/usr/bin/env bash
# cupy-cuda13x 14.2.0: nvrtc.getCUBIN returns a cubin without its last byte.
#
# A good guess: it returns what NVRTC holds, a whole ELF file that can be stored and loaded later.
# Seen: it cuts one byte off the end.  That is right for PTX, which ends in a NUL, but a cubin ends
# in its table of program headers.  So the ELF's own headers point one byte past the end of the file.
# No GPU is needed.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q 'cupy-cuda13x==14.2.0' 'nvidia-cuda-nvrtc==13.3.33' \
    'numpy==2.3.5'

"$directory/venv/bin/python" - <<'PYTHON'
import ctypes
import struct
import sysconfig
from importlib.metadata import version
from pathlib import Path

from cupy.cuda import nvrtc

SOURCE = """
extern "C" __global__ void add(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i];
}
"""
program = nvrtc.createProgram(SOURCE, "add.cu", (), ())
nvrtc.compileProgram(program, ("--gpu-architecture=sm_90",))
from_cupy = nvrtc.getCUBIN(program)

folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/lib"
library = ctypes.CDLL(str(next(folder.glob("libnvrtc.so.*"))))
size = ctypes.c_size_t()
assert library.nvrtcGetCUBINSize(ctypes.c_void_p(program), ctypes.byref(size)) == 0
buffer = ctypes.create_string_buffer(size.value)
assert library.nvrtcGetCUBIN(ctypes.c_void_p(program), buffer) == 0


def end_of_program_headers(elf):
    (offset,) = struct.unpack_from("<Q", elf, 32)
    entry_bytes, count = struct.unpack_from("<HH", elf, 54)
    return offset + entry_bytes * count


print("cupy", version("cupy-cuda13x"), "nvrtc", version("nvidia-cuda-nvrtc"))
print("from CuPy:", len(from_cupy), "bytes; from NVRTC:", size.value, "bytes;")
print("the program headers end at byte", end_of_program_headers(from_cupy))
assert from_cupy == buffer.raw[:-1], "the behaviour has changed"
assert end_of_program_headers(from_cupy) == len(from_cupy) + 1, "the behaviour has changed"
PYTHON

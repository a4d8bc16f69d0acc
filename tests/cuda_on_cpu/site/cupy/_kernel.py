"""RawModule and RawKernel."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_on_cpu.build import CompileError
from cuda_on_cpu.build import Module
from cuda_on_cpu.build import compile_kernels
from cuda_on_cpu.launch import Argument
from cuda_on_cpu.launch import LaunchRefused
from cuda_on_cpu.launch import check_arguments
from cuda_on_cpu.launch import launch

from cupy._array import ndarray
from cupy.cuda import runtime
from cupy.cuda.compiler import CompileException
from cupy.cuda.driver import CUDADriverError
from cupy.cuda.memory import MemoryPointer
from cupy.cuda.stream import Operation
from cupy.cuda.stream import Stream
from cupy.cuda.stream import get_current_stream

ERROR_INVALID_VALUE = 1
ERROR_NOT_FOUND = 500
PLAIN_SHARED = 48 << 10  # static and dynamic, of a kernel that has not asked for more
KINDS = {"f": "f", "i": "i", "u": "i", "b": "i", "V": "s"}  # dtype.kind -> Argument.kind


class RawModule:
    def __init__(
        self,
        *,
        code: str | None = None,
        path: str | None = None,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Sequence[str] | None = None,
        jitify: bool = False,
    ) -> None:
        if code is None or name_expressions:
            raise NotImplementedError("the stand-in compiles kernels that are extern C, from code")
        self.code = code
        self.options = tuple(options)
        self._module: Module | None = None

    def compile(self, log_stream: Any = None) -> None:
        self._compiled()

    def get_function(self, name: str) -> "RawKernel":
        return RawKernel(self.code, name, self.options)._of(self)

    def _compiled(self) -> Module:
        if self._module is None:
            macros = tuple(option for option in self.options if option.startswith("-D"))
            try:
                self._module = compile_kernels(self.code, macros)
            except CompileError as error:
                raise CompileException(str(error), self.code, "kernel.cu", self.options) from None
        return self._module


class RawKernel:
    def __init__(
        self,
        code: str,
        name: str,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        *,
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        jitify: bool = False,
    ) -> None:
        self.name = name
        self._raw_module = RawModule(code=code, options=options)
        self._max_dynamic_shared: int | None = None

    def _of(self, module: RawModule) -> "RawKernel":
        self._raw_module = module
        if self.name not in module._compiled().kernels:
            raise CUDADriverError(
                ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND: named symbol not found"
            )
        return self

    def compile(self, log_stream: Any = None) -> None:
        self._raw_module.compile()

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return PLAIN_SHARED if self._max_dynamic_shared is None else self._max_dynamic_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, num_bytes: int) -> None:
        if num_bytes > runtime.shared_memory_optin():
            raise CUDADriverError(
                ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE: invalid argument"
            )
        self._max_dynamic_shared = num_bytes

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Stream | None = None,
    ) -> None:
        """Takes the arguments' values now; the kernel runs when the stream gets to it."""
        module = self._raw_module._compiled()
        kernel = module.kernels[self.name]
        arguments = [_argument(value) for value in args]
        check_arguments(kernel, arguments)
        grids, blocks = _three(grid), _three(block)
        limit = self.max_dynamic_shared_size_bytes
        has_asked = self._max_dynamic_shared is not None
        total = runtime.shared_memory_optin() if has_asked else PLAIN_SHARED

        def run() -> None:
            try:
                launch(module, kernel, grids, blocks, arguments, shared_mem, limit, total)
            except LaunchRefused as error:
                raise CUDADriverError(ERROR_INVALID_VALUE, str(error)) from None

        owners = tuple(value._allocation for value in args if hasattr(value, "_allocation"))
        (stream or get_current_stream())._enqueue(Operation(self.name, run, owners))


def _three(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*(int(size) for size in sizes), 1, 1)[:3]


def _argument(value: Any) -> Argument:
    """As cupy/cuda/function.pyx passes it: a Python int has 8 bytes, a float is a double."""
    if isinstance(value, ndarray):
        value = value.data
    if isinstance(value, MemoryPointer):
        return Argument(ctypes.c_void_p(value.ptr), "p", value._extent)
    if value is None:
        raise TypeError("CuPy 13 passes None as the address 0xffffffff; pass np.uintp(0)")
    if isinstance(value, bool | np.bool_):
        return Argument(ctypes.c_bool(bool(value)), "i")
    if isinstance(value, int):
        return Argument(ctypes.c_int64(value), "i")
    if isinstance(value, float):
        return Argument(ctypes.c_double(value), "f")
    if isinstance(value, np.generic):
        content = value.tobytes()
        buffer = (ctypes.c_char * len(content)).from_buffer_copy(content)
        return Argument(buffer, KINDS[value.dtype.kind])
    raise TypeError(f"Unsupported type {type(value)}")

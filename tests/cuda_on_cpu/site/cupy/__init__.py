"""A stand-in for the part of cupy that the CUDA backend uses.  "Device" memory is host memory.

Kernels are compiled by g++ and run on the CPU (cuda_on_cpu).  Every public name here exists in
cupy, and behaves as in cupy, or stricter where cupy lets errors pass: kernel arguments of the wrong
size, freed memory in a graph, host memory that changes while it is still to be copied.
"""

from cupy import cuda
from cupy._array import array
from cupy._array import asarray
from cupy._array import ascontiguousarray
from cupy._array import asnumpy
from cupy._array import copyto
from cupy._array import empty
from cupy._array import empty_like
from cupy._array import full
from cupy._array import ndarray
from cupy._array import zeros
from cupy._array import zeros_like
from cupy._kernel import RawKernel
from cupy._kernel import RawModule
from cupy.cuda.memory import get_default_memory_pool

__version__ = "14.2.0"

__all__ = [
    "RawKernel",
    "RawModule",
    "array",
    "asarray",
    "ascontiguousarray",
    "asnumpy",
    "copyto",
    "cuda",
    "empty",
    "empty_like",
    "full",
    "get_default_memory_pool",
    "ndarray",
    "zeros",
    "zeros_like",
]

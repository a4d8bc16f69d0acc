"""Arrays on the "device".

ndarray wraps a numpy array instead of being one, so that a host array where a device array is
needed fails, and the reverse, as in cupy.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_on_cpu.options import EmulationError

from cupy.cuda.memory import Allocation
from cupy.cuda.memory import MemoryPointer
from cupy.cuda.pinned_memory import is_pinned
from cupy.cuda.stream import Operation
from cupy.cuda.stream import Stream
from cupy.cuda.stream import get_current_stream

Shape = int | tuple[int, ...]


class ndarray:
    __array_ufunc__ = None  # numpy's operators refuse it

    def __init__(
        self, shape: Shape, dtype: npt.DTypeLike = float, memptr: Any = None, strides: Any = None
    ) -> None:
        if memptr is not None or strides is not None:
            raise NotImplementedError("the stand-in has no memptr or strides")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._allocation = Allocation(size)
        self._host = self._allocation.bytes.view(dtype).reshape(shape)

    @classmethod
    def _view(cls, host: Any, allocation: Allocation) -> "ndarray":
        array = object.__new__(cls)
        array._host = host
        array._allocation = allocation
        return array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._host.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self._host.strides)

    @property
    def dtype(self) -> Any:
        return self._host.dtype

    @property
    def flags(self) -> Any:
        return self._host.flags

    @property
    def ndim(self) -> int:
        return int(self._host.ndim)

    @property
    def size(self) -> int:
        return int(self._host.size)

    @property
    def itemsize(self) -> int:
        return int(self._host.itemsize)

    @property
    def nbytes(self) -> int:
        return int(self._host.nbytes)

    @property
    def data(self) -> MemoryPointer:
        low, high = np.lib.array_utils.byte_bounds(self._host)
        return MemoryPointer(self._host.ctypes.data, self._allocation, (low, high - low))

    def __len__(self) -> int:
        return len(self._host)

    def __array__(self, *_: object, **__: object) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def get(
        self,
        stream: Stream | None = None,
        order: str = "C",
        out: Any = None,
        blocking: bool = True,
    ) -> Any:
        stream = stream or get_current_stream()
        stream._refuse_in_capture("a copy to the host")
        host, target = self._host, np.empty(self.shape, self.dtype) if out is None else out
        if target.shape != host.shape or target.dtype != host.dtype:
            raise ValueError("Shape or dtype mismatch")
        stream._enqueue(_copy("get", target, host, self._allocation))
        if blocking:
            stream.synchronize()
        return target

    def set(self, arr: Any, stream: Stream | None = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        stream = stream or get_current_stream()
        stream._refuse_in_capture("a copy from the host")
        # The driver copies pageable memory before it returns; of pinned memory it reads later.
        source = arr if is_pinned(arr) else arr.copy()
        stream._enqueue(_copy("set", self._host, source, self._allocation))

    def fill(self, value: Any) -> None:
        host = self._host
        get_current_stream()._enqueue(
            Operation("fill", lambda: host.fill(value), (self._allocation,))
        )

    def copy(self) -> "ndarray":
        result = empty(self.shape, self.dtype)
        copyto(result, self)
        return result

    def astype(self, dtype: npt.DTypeLike, copy: bool = True) -> "ndarray":
        result = empty(self.shape, dtype)
        copyto(result, self)
        return result

    def view(self, dtype: npt.DTypeLike) -> "ndarray":
        return ndarray._view(self._host.view(dtype), self._allocation)

    def reshape(self, *shape: Any) -> "ndarray":
        reshaped = self._host.reshape(*shape)
        if not np.shares_memory(reshaped, self._host) and self.size:
            raise EmulationError("reshape would copy")
        return ndarray._view(reshaped, self._allocation)

    def ravel(self) -> "ndarray":
        return self.reshape(-1)

    def __getitem__(self, index: Any) -> "ndarray":
        """A view; also of one element."""
        parts = index if isinstance(index, tuple) else (index,)
        if not any(part is Ellipsis for part in parts):
            parts = (*parts, ...)
        picked = self._host[parts]
        if picked.size and not np.may_share_memory(picked, self._host):
            raise NotImplementedError("the stand-in has no indices that copy")
        return ndarray._view(picked, self._allocation)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        target = self[index]
        if isinstance(value, ndarray):
            copyto(target, value)
        else:
            target.fill(value)

    def item(self) -> Any:
        return self.get().item()

    __hash__ = None  # type: ignore[assignment]


def _copy(name: str, target: Any, source: Any, *owners: Any) -> Operation:
    run = functools.partial(np.copyto, target, source, casting="unsafe")
    return Operation(name, run, owners)


def copyto(dst: ndarray, src: ndarray, casting: str = "same_kind") -> None:
    operation = _copy("copyto", dst._host, src._host, dst._allocation, src._allocation)
    get_current_stream()._enqueue(operation)


def empty(shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype)


def full(shape: Shape, fill_value: Any, dtype: npt.DTypeLike | None = None) -> ndarray:
    result = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype)
    result.fill(fill_value)
    return result


def zeros(shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype)


def empty_like(prototype: ndarray, dtype: npt.DTypeLike | None = None) -> ndarray:
    return empty(prototype.shape, prototype.dtype if dtype is None else dtype)


def zeros_like(a: ndarray, dtype: npt.DTypeLike | None = None) -> ndarray:
    return zeros(a.shape, a.dtype if dtype is None else dtype)


def array(obj: Any, dtype: npt.DTypeLike | None = None) -> ndarray:
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype)
    host = np.array(obj, dtype)
    result = empty(host.shape, host.dtype)
    result.set(host)
    return result


def asarray(a: Any, dtype: npt.DTypeLike | None = None) -> ndarray:
    if isinstance(a, ndarray) and dtype in (None, a.dtype):
        return a
    return array(a, dtype)


def ascontiguousarray(a: Any, dtype: npt.DTypeLike | None = None) -> ndarray:
    if isinstance(a, ndarray) and not a.flags.c_contiguous:
        return a.copy()
    return asarray(a, dtype)


def asnumpy(a: Any, stream: Stream | None = None) -> Any:
    return a.get(stream) if isinstance(a, ndarray) else np.asarray(a)

"""An arena for all memory that C sees: each buffer ends right before a page that faults, and
another process can map the arena at the same addresses.

All pointers that the CPU backend gives to C come from `Memory.array`, `address_of` or
`ctypes.addressof`; `install` replaces all three.  Memory allocated by numpy or ctypes is copied
into the arena before each call of the library, and back afterwards.
"""

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from math import prod
from threading import RLock
from typing import Any
from typing import NamedTuple

import numpy as np

from llmsrv.backend.cpu import library as cpu_library
from llmsrv.backend.cpu import weights as cpu_weights

ADDRESS, SIZE = 0x2000_0000_0000, 1 << 32  # an unused range; pages exist once touched
PAGE = mmap.PAGESIZE
PROT_NONE, MAP_NORESERVE, MAP_FIXED_NOREPLACE, MADV_REMOVE = 0, 0x4000, 0x100000, 9  # on Linux

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
addressof = ctypes.addressof


class Copy(NamedTuple):
    """The arena's copy of an array or structure that numpy or ctypes allocated."""

    owner: weakref.ref[Any]
    original: int
    size: int
    is_writable: bool


class Arena:
    """fd: the file mapped at ADDRESS."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("arena")
        os.ftruncate(self.fd, SIZE)
        flags = mmap.MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE
        place = libc.mmap(ADDRESS, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.fd, 0)
        assert place == ADDRESS
        self._next = ADDRESS
        self._lock = RLock()  # weights are packed by several threads
        self._unused: dict[int, list[int]] = {}  # by number of pages
        self._copies: dict[int, Copy] = {}  # by address

    def install(self) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("llmsrv.backend.") and module is not cpu_library:
                if hasattr(module, "address_of"):
                    setattr(module, "address_of", self.address_of)
        setattr(cpu_library.Memory, "array", lambda _, *given, **options: self.array(*given))
        setattr(cpu_weights, "MARGIN_BYTES", 0)  # nothing but prefetches may go there
        setattr(ctypes, "addressof", self._addressof)

    def library(self, functions: Mapping[str, Callable[..., Any]]) -> Any:
        """Stands in for the compiled library: its functions, called through the arena."""
        return _Library(self, functions)

    def array(self, shape: tuple[int, ...], dtype: Any, *_: object) -> Any:
        size = prod(shape) * np.dtype(dtype).itemsize
        owner = (ctypes.c_uint8 * max(size, 1)).from_address(self._take(max(size, 1)))
        weakref.finalize(owner, self._free_pages, addressof(owner), max(size, 1))
        return np.frombuffer(owner, np.uint8)[:size].view(dtype).reshape(shape)

    def address_of(self, array: Any) -> int:
        address = array.__array_interface__["data"][0]
        return self._place(Copy(weakref.ref(array), address, array.nbytes, array.flags.writeable))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            return self._call(function, *arguments)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        for address, copy, owner in self._live_copies():
            if copy.is_writable:
                ctypes.memmove(address, copy.original, copy.size)
        result = function(*arguments)
        for address, copy, owner in self._live_copies():
            if copy.is_writable:
                ctypes.memmove(copy.original, address, copy.size)
        return result

    def _live_copies(self) -> Iterator[tuple[int, Copy, object]]:
        """The copies whose owners still exist; frees the others."""
        for address in list(self._copies):
            copy = self._copies.get(address)  # None if a finalizer's call removed it meanwhile
            if copy and (owner := copy.owner()) is not None:
                yield address, copy, owner
            elif copy and self._copies.pop(address, None):
                self._free_pages(address, copy.size)

    def _addressof(self, value: Any) -> int:
        size = ctypes.sizeof(value)
        return self._place(Copy(weakref.ref(value), addressof(value), size, is_writable=True))

    def _place(self, copy: Copy) -> int:
        """The address of the bytes for C."""
        if ADDRESS <= copy.original < ADDRESS + SIZE:
            return copy.original
        with self._lock:
            for address, known in self._copies.items():
                if known[1:] == copy[1:] and known.owner() is copy.owner():
                    return address
            address = self._take(copy.size)
            ctypes.memmove(address, copy.original, copy.size)
            self._copies[address] = copy
            return address

    def _take(self, size: int) -> int:
        pages = -(-size // PAGE)
        if not (free := self._unused.setdefault(pages, [])):
            free.append(self._next)
            self._next += PAGE * (pages + 1)
            assert self._next < ADDRESS + SIZE
            assert libc.mprotect(self._next - PAGE, PAGE, PROT_NONE) == 0
        return free.pop() + PAGE * pages - size

    def _free_pages(self, address: int, size: int) -> None:
        pages = -(-size // PAGE)
        start = address + size - PAGE * pages
        libc.madvise(start, PAGE * pages, MADV_REMOVE)  # zeroes it
        self._unused[pages].append(start)


class _Library:
    def __init__(self, arena: Arena, functions: Mapping[str, Callable[..., Any]]) -> None:
        for name, function in functions.items():
            setattr(self, name, functools.partial(arena.call, function))

"""Read-only memory maps of files that hold no file descriptor.

A map outlives the descriptor it was made from, but Python's `mmap`, and with it `np.memmap`,
keeps a duplicate open (until Python 3.13's `trackfd=False`). A run with thousands of token files
would exceed the limit of open files (`ulimit -n`), which sockets and pipes share. The function of
the C library is therefore called directly.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os

import numpy as np

_FAILED = ctypes.c_void_p(-1).value  # MAP_FAILED


def map_file(path: str | os.PathLike) -> np.ndarray:
    """Map a file into memory, and return its content as a read-only uint8 array.

    The map is shared with forked processes and removed with its last view.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:  # an empty file cannot be mapped
            empty = np.empty(0, np.uint8)
            empty.flags.writeable = False
            return empty
        return np.asarray(_Mapping(descriptor, size, os.fspath(path)))
    finally:
        os.close(descriptor)


def advise_random_access(array: np.ndarray) -> None:
    """Disable the kernel's read-ahead for the file that a view of `map_file` belongs to.

    Does nothing for other arrays.
    """
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, _Mapping):
        _libc().madvise(base.address, base.size, mmap.MADV_RANDOM)


class _Mapping:
    """Memory of one mapped file, which numpy reads through the array interface.

    Args:
        descriptor: open file, of `size` bytes; not needed afterwards.
        path: name of the file in messages.
    """

    def __init__(self, descriptor: int, size: int, path: str):
        self.address = None
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            message = os.strerror(code)
            if code == errno.ENOMEM:  # of address space or, more often, of maps
                message += "; raise sysctl vm.max_map_count or ulimit -v"
            raise OSError(code, message, path)
        self.address = address
        self.size = size
        self._munmap = _libc().munmap  # module globals may be gone when the process exits

    @property
    def __array_interface__(self) -> dict:
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": (self.size,),
            "data": (self.address, True),
        }

    def __del__(self):
        if self.address is not None:
            self._munmap(self.address, self.size)


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,  # off_t of all 64-bit systems
    )
    for function in (library.munmap, library.madvise):
        function.restype = ctypes.c_int
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library

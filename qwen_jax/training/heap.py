"""What compiling leaves behind in the process's memory."""

import ctypes
import sys


def release() -> None:
    """Returns what is free in the heap to the system, where the allocator is glibc's.

    Compiling takes hundreds of megabytes in small pieces, which glibc would hold on to through the whole run.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))

"""The C library's allocator, told to keep the pages of large blocks."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_pages() -> bool:
    """Keep freed memory for the next step instead of giving it back to the kernel and faulting its pages in again.

    glibc maps blocks above 32 MiB afresh for each tensor; memory-bound operations take two to four times as long for it
    (docs/log.md). False where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))

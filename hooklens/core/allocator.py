"""Reuse of the memory of freed caches, instead of fresh pages from the system.

glibc gives large tensors pages of their own, and returns them when the tensor is freed. The system fills each fresh
page with zeros, on a virtual machine often through the host: for a cache of a gigabyte this takes a third of the time
of the forward pass. If the process keeps freed memory, the next cache reuses its pages.
"""

import ctypes
import functools
import os
import sys

#: `HOOKLENS_KEEP_PAGES=0` in the environment leaves the allocator as it is.
ENV = "HOOKLENS_KEEP_PAGES"
# Numbers of glibc's mallopt, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TENSOR = 2**30  # larger ones still get pages of their own, and return them
_MOST_KEPT = 2**31 - 1  # bytes of free memory at the end of the heap; mallopt takes an int


@functools.cache
def keep_freed_pages() -> bool:
    """Make the allocator keep up to 2 GiB of freed memory for this process; return whether it does.

    Only with glibc, and unless the environment configures the allocator. `ctypes.CDLL(None).malloc_trim(0)` returns
    the memory to the system.
    """
    if os.environ.get(ENV, "1") == "0" or not sys.platform.startswith("linux"):
        return False
    if any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_TENSOR)) and bool(mallopt(_TRIM_THRESHOLD, _MOST_KEPT))

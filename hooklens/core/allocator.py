"""Memory that a dropped cache leaves behind is used again, in place of pages that are fresh from the system.

glibc gives large tensors pages of their own, and returns them when the tensor goes. The system fills each fresh page
with zeros, on a virtual machine often by way of the host: for a cache of a gigabyte that takes as long as a third of
the forward pass that filled it. With freed memory kept by the process the next cache finds its pages ready.
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
_MOST_KEPT = 2**31 - 1  # of what is free at the end of the heap; mallopt takes an int


@functools.cache
def keep_freed_pages() -> bool:
    """Have the allocator keep up to 2 GiB of freed memory for this process. Takes effect once; is it in effect?

    Only where glibc is the allocator, and not where the environment already says how it should behave. `malloc_trim`
    returns what is kept: `ctypes.CDLL(None).malloc_trim(0)`.
    """
    if os.environ.get(ENV, "1") == "0" or not sys.platform.startswith("linux"):
        return False
    if any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_TENSOR)) and bool(mallopt(_TRIM_THRESHOLD, _MOST_KEPT))

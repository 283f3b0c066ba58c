"""Memory from the system: freed pages that are used again, and large pages for long vectors.

glibc gives large tensors pages of their own, and returns them when the tensor is freed. The system fills each fresh
page with zeros, on a virtual machine often through the host: for a cache of a gigabyte this takes a third of the time
of the forward pass. If the process keeps freed memory, the next cache reuses its pages.
"""

import ctypes
import functools
import os
import sys
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

#: `HOOKLENS_KEEP_PAGES=0` in the environment leaves the allocator as it is.
ENV = "HOOKLENS_KEEP_PAGES"
# Numbers of glibc's mallopt, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TENSOR = 2**30  # larger ones still get pages of their own, and return them
_MOST_KEPT = 2**31 - 1  # bytes of free memory at the end of the heap; mallopt takes an int
_MADV_HUGEPAGE = 14  # of Linux's madvise, in mman.h
_LARGE_PAGE = 2**21  # bytes


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


def long_zeros(size: int, *, dtype: torch.dtype, device: Any = None) -> Shaped[Tensor, "size"]:
    """A vector of zeros, on the CPU in pages of 2 MiB where the system has them.

    >>> long_zeros(3, dtype=torch.float32)
    tensor([0., 0., 0.])

    A vector of hundreds of megabytes that is read from end to end in every step needs fewer lookups of addresses then.
    """
    vector = torch.empty(size, dtype=dtype, device=device)
    n_bytes = size * vector.element_size()
    if vector.device.type == "cpu" and sys.platform.startswith("linux") and os.environ.get(ENV, "1") != "0":
        start = -(-vector.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        whole = (vector.data_ptr() + n_bytes - start) // _LARGE_PAGE * _LARGE_PAGE
        if whole > 0:  # before the first write; a system that refuses gives small pages as before
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return vector.zero_()

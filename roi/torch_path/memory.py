"""Memory that is cheap to get: blocks that a thread keeps from call to call, and large pages for large tensors.

A page of fresh memory is mapped and zeroed when it is first written, which takes longer than to fill it. The C library
keeps blocks of less than 32 MiB; larger ones are fresh each time.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**25  # bytes: blocks of this size are fresh each time
HUGE_PAGES = 14  # Linux's MADV_HUGEPAGE
PAGE = 4096


class _Kept(threading.local):
    """What a thread keeps; freed when the thread ends."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}


_kept = _Kept()


def empty_cache() -> None:
    """Free the memory that this thread keeps between calls of the operators on CPU tensors.

    A thread keeps at most what the largest maps of one call take as float32, and as much as the output of one call;
    all of it is freed when the thread ends.
    """
    _kept.blocks.clear()


def scratch(use: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous Tensor[*shape] on the device of `like`, valid until the next call for the same use.

    On the CPU it lies in memory that the thread keeps.
    """
    if like.device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)
    size = torch.Size(shape).numel() * dtype.itemsize
    block = _kept.blocks.get(use)
    if block is None or block.numel() < size:
        _kept.blocks.pop(use, None)  # freed before the larger one is taken
        with torch.inference_mode(False):  # it may be written to outside that mode later
            block = in_large_pages(torch.empty(-(-size // 64) * 64, dtype=torch.uint8))
        _kept.blocks[use] = block
    return block[:size].view(dtype).view(tuple(shape))


def in_large_pages(x: Tensor) -> Tensor:
    """`x`, which has not been written to: where it is large, the system is advised to map it in large pages."""
    size = x.numel() * x.element_size()
    if size >= LARGE and x.device.type == "cpu" and _madvise is not None:
        first = -(-x.data_ptr() // PAGE) * PAGE
        _madvise(first, (x.data_ptr() + size - first) // PAGE * PAGE, HUGE_PAGES)  # an advice: may be refused
    return x


def _find_madvise() -> ctypes._FuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_madvise = _find_madvise()

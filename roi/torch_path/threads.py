"""As many threads as there are cores to run them.

A parallel call of PyTorch ends when its slowest thread ends. Where another process keeps a core busy, that thread waits
for its turn, for some milliseconds in every call, while the others wait for it. Fewer threads are faster then.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# Seconds. A parallel call without work takes some ten microseconds where every thread has a core; the turn of another
# process takes a few milliseconds.
STALL = 1e-3
REMEMBERED = 20  # times what it took to find out, so that finding out costs a twentieth of the time
SMALL = 2**17  # values: one thread has done so little work before others have started
GRAIN = 2**15  # elements that PyTorch gives to a thread at least


@contextmanager
def enough_threads(features: Tensor, values: int) -> Iterator[None]:
    """Use as many threads as have a core of their own; one, where there are few values to work on.

    Args:
        features: decides the device; only the CPU has such threads.
    """
    usual = torch.get_num_threads()
    if _set_threads is None or usual == 1 or features.device.type != "cpu":
        yield
        return
    threads = free_cores(usual) if values >= SMALL else 1
    _set_threads(threads)
    try:
        yield
    finally:
        _set_threads(usual)


class _Known(threading.local):
    """What this thread found out: how many threads have a core, and until when that is believed."""

    usual = 0
    threads = 0
    until = 0.0


_known = _Known()


def free_cores(usual: int) -> int:
    """How many of this thread's usual number of threads run at once: all, all but one, half of them or one."""
    assert _set_threads is not None
    start = time.perf_counter()
    if _known.usual == usual and start < _known.until:
        return _known.threads
    threads = usual
    for fewer in (usual - 1, usual // 2, 1):
        # Twice, since the first call may have had to start the threads.
        if not (stalls(threads) and stalls(threads)):
            break
        threads = max(1, min(threads, fewer))
        _set_threads(threads)
        if threads == 1:
            break
    if threads != usual:
        _set_threads(usual)
    end = time.perf_counter()
    _known.usual, _known.threads, _known.until = usual, threads, end + REMEMBERED * (end - start)
    return threads


def stalls(threads: int) -> bool:
    """Whether a parallel call without work waits for a core."""
    start = time.perf_counter()
    torch.empty(threads * GRAIN, dtype=torch.uint8).zero_()
    return time.perf_counter() - start > STALL


def _find_set_threads() -> Callable[[int], None] | None:
    """OpenMP's own function, for the calling thread. torch.set_num_threads would be for threads to come as well.

    None where the library is not found, or is not what PyTorch runs on: then all threads are used, always.
    """
    names = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("*omp*")]
    for name in (*names, "libgomp.so.1", "libiomp5.so", "libomp.so"):
        try:
            set_threads: Callable[[int], None] = ctypes.CDLL(name, mode=os.RTLD_NOLOAD).omp_set_num_threads
        except (OSError, AttributeError):
            continue
        usual = torch.get_num_threads()
        set_threads(usual + 1)
        works = torch.get_num_threads() == usual + 1
        set_threads(usual)
        if works:
            return set_threads
    return None


_set_threads = _find_set_threads()

"""What memory a process takes, as Linux tells it: for the tests of memory and the benchmarks."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path


def reset_peak_resident() -> float:
    """Lowers the process's mark of its peak resident set to what is resident now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return resident("VmRSS")


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return float(kilobytes) * 1024


def in_a_process(call: Callable[[], float]) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call)

"""Runs the CUDA kernels on the CPU: builds them with g++ and takes the place of the launch."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
KERNELS = FOLDER.parent.parent / "kernels"
COMPILER = os.environ.get("CXX") or shutil.which("g++")

_LANES = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}


def roi_pool_variants(
    features: Sequence[str] = tuple(_LANES),
    coordinates: Sequence[str] = ("float", "double"),
    indices: Sequence[str] = ("int", "long long"),
) -> list[str]:
    """Name expressions of every instantiation of the kernels in roi_pool.cu."""
    names = []
    for feature, coordinate, index, flag in itertools.product(features, coordinates, indices, ("false", "true")):
        types = f"{feature}, {coordinate}, {index}, {flag}"
        names.append(f"roi::roi_pool_contiguous<{types}>")
        names += [f"roi::roi_pool_channels_last<{types}, {lanes}>" for lanes in (1, _LANES[feature])]
        names += [f"roi::roi_pool_backward_atomic<{types}>", f"roi::roi_pool_backward_gather<{types}>"]
    return names


def build(
    folder: Path, source: str, variants: Iterable[str], options: Sequence[str] = (), main: Path | None = None
) -> Path:
    """Compiles a kernel source for the CPU.

    Args:
        folder: where the result goes.
        source: file name in `kernels/`.
        variants: name expressions of the instantiations.
        options: for the compiler, such as a sanitizer.
        main: C++ file with a `main`; makes the result an executable, else it is a shared library.

    Returns:
        The path of the result.
    """
    assert COMPILER is not None
    lines = ['#include "registry.h"', f'#include "{KERNELS / source}"', *(f"KERNEL({name})" for name in variants)]
    if main is not None:
        lines.append(f'#include "{main}"')
    generated = folder / f"{Path(source).stem}.cpp"
    generated.write_text("\n".join(lines) + "\n")
    result = folder / ("kernels" if main is not None else "kernels.so")
    command = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-fno-strict-aliasing", "-ffp-contract=off", "-pthread", f"-I{FOLDER}", f"-I{KERNELS}", *options]
    command += ["-fPIC", *([] if main is not None else ["-shared"]), str(generated), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return result


class Library:
    """Kernels built by `build`; its `launch` takes the place of `roi.cupy_path._launch`."""

    def __init__(self, path: Path) -> None:
        self._launch = ctypes.CDLL(str(path)).launch_kernel
        self._launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self.launched: list[str] = []

    def launch(
        self,
        source: str,
        expression: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int,
        device: object,
    ) -> None:
        # As CuPy does it: NumPy scalars keep their size, a Python int is 64 bits.
        values = [np.atleast_1d(np.int64(value) if type(value) is int else value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = [np.array((*size, 1)[:2], dtype=np.uint32) for size in (grid, block)]
        missing = self._launch(
            expression.encode(), sizes[0].ctypes.data, sizes[1].ctypes.data, shared_bytes, ctypes.addressof(pointers)
        )
        assert not missing, f"{expression} was not built"
        self.launched.append(expression)

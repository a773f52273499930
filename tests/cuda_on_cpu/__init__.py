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

from roi.cupy_path.launch import COORDINATES as COORDINATE_TYPES
from roi.cupy_path.launch import LaunchGrid, levels_struct

FOLDER = Path(__file__).resolve().parent
KERNELS = FOLDER.parent.parent / "kernels"
COMPILER = os.environ.get("CXX") or shutil.which("g++")

FEATURES = ("float", "double", "__half", "__nv_bfloat16")
COORDINATES = ("float", "double")
_LANES = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}
_SINGLE = ("roi::Contiguous<1>", "roi::ChannelsLast<1>")
_SEVERAL = ("roi::Contiguous<4>", "roi::ChannelsLast<1>")
_FLAGS = ("false", "true")


def roi_pool_variants(
    features: Sequence[str] = FEATURES,
    coordinates: Sequence[str] = COORDINATES,
    indices: Sequence[str] = ("int", "long long"),
) -> list[str]:
    """Name expressions of every instantiation of the kernels in roi_pool.cu."""
    names = []
    for feature, coordinate, index, flag in itertools.product(features, coordinates, indices, _FLAGS):
        types = f"{feature}, {coordinate}, {index}, {flag}"
        lanes = _LANES[feature]
        layouts = (*_SEVERAL, f"roi::ChannelsLast<{lanes}>", f"roi::Transposed<{lanes}>")
        names += [f"roi::roi_pool<{types}, {layout}>" for layout in layouts]
        names.append(f"roi::roi_pool_backward_gather<{types}>")
    for feature, coordinate, index in itertools.product(features, coordinates, indices):
        types = f"{feature}, {coordinate}, {index}"
        layouts = (*_SINGLE, "roi::Transposed<1>")
        names += [f"roi::roi_pool_backward_atomic<{types}, {layout}>" for layout in layouts]
    return names


def roi_align_variants(features: Sequence[str] = FEATURES, coordinates: Sequence[str] = COORDINATES) -> list[str]:
    """Name expressions of every instantiation of the kernels in roi_align.cu."""
    names = []
    for feature, coordinate in itertools.product(features, coordinates):
        types = f"{feature}, {coordinate}"
        lanes = _LANES[feature]
        forward = (*_SEVERAL, f"roi::ChannelsLast<{lanes}>", f"roi::Transposed<{lanes}>")
        vectors = ("roi::ChannelsLast<4>", "roi::Transposed<4>") if feature != "double" else ()
        atomic = (*_SEVERAL, "roi::Transposed<1>", *vectors)
        names += [f"roi::roi_align<{types}, {layout}, false>" for layout in forward]
        names += [f"roi::roi_align_backward_atomic<{types}, {layout}, false>" for layout in atomic]
        for kind, layout in itertools.product(("", "_backward_atomic"), _SINGLE):
            names.append(f"roi::roi_align{kind}<{types}, {layout}, true>")
        for flags in itertools.product(_FLAGS, _FLAGS):
            names.append(f"roi::roi_align_backward_gather<{types}, {', '.join(flags)}>")
    return names


def ps_roi_pool_variants(features: Sequence[str] = FEATURES, coordinates: Sequence[str] = COORDINATES) -> list[str]:
    """Name expressions of every instantiation of the kernels in ps_roi_pool.cu."""
    names = []
    for feature, coordinate in itertools.product(features, coordinates):
        types = f"{feature}, {coordinate}"
        for kind, layout in itertools.product(("", "_backward_atomic"), _SINGLE):
            names.append(f"roi::ps_roi_pool{kind}<{types}, {layout}>")
        names += [f"roi::ps_roi_pool_backward_gather<{types}, {flag}>" for flag in _FLAGS]
    return names


def transpose_variants(features: Sequence[str] = FEATURES) -> list[str]:
    """Name expressions of every instantiation of the kernel in transpose.cu."""
    types = [(name, name) for name in (*features, "int", "long long")]
    types += [("float", name) for name in features if name not in ("float", "double")]
    return [f"roi::transpose<{source}, {target}>" for source, target in types]


def levels_assertions() -> list[str]:
    """C++ that compiles if `Levels` of roi_levels.cuh has the layout of the argument that the launch passes."""
    # NVRTC has no offsetof; this is how its compiler spells it.
    lines = [
        "#ifdef __CUDACC_RTC__",
        "#define OFFSET_OF(type, member) (unsigned long long)__INTADDR__(&((type*)0)->member)",
        "#else",
        "#define OFFSET_OF(type, member) __builtin_offsetof(type, member)",
        "#endif",
    ]
    for coordinates, number in COORDINATE_TYPES.items():
        struct, levels = levels_struct(coordinates), f"roi::Levels<float, {number}>"
        lines.append(f"using Levels_{number} = {levels};")
        lines.append(f"static_assert(sizeof(Levels_{number}) == {struct.itemsize});")
        for name, (_, offset, *_) in (struct.fields or {}).items():
            lines.append(f"static_assert(OFFSET_OF(Levels_{number}, {name}) == {offset});")
    return lines


def build(folder: Path, source: str, variants: Iterable[str]) -> Path:
    """A library for `Library`, in `folder`, of some instantiations (name expressions) of `kernels/{source}.cu`."""
    included = ("registry.h", KERNELS / f"{source}.cu", KERNELS / "roi_levels.cuh")
    lines = [*(f'#include "{path}"' for path in included), *(f"KERNEL({name})" for name in variants)]
    return _compile("\n".join((*lines, *levels_assertions(), "")), folder / f"{source}.so", ["-shared"])


def build_stress(folder: Path, options: Sequence[str]) -> Path:
    """The program stress.cpp, in `folder`, built with options such as a sanitizer's."""
    return _compile((FOLDER / "stress.cpp").read_text(), folder / "stress", options)


def _compile(text: str, result: Path, options: Sequence[str]) -> Path:
    assert COMPILER is not None
    generated = result.with_suffix(".cpp")
    generated.write_text(text)
    command = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-fno-strict-aliasing", "-ffp-contract=off", "-pthread", f"-I{FOLDER}", f"-I{KERNELS}"]
    command += ["-fPIC", *options, str(generated), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return result


class Library:
    """Kernels built by `build`; its `run` takes the place of `roi.cupy_path.launch.run`."""

    def __init__(self, *paths: Path) -> None:
        self._launch = {path.stem: ctypes.CDLL(str(path)).launch_kernel for path in paths}
        for launch in self._launch.values():
            launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self.launched: list[str] = []

    @property
    def operators(self) -> list[str]:
        """What was launched, but for copies of tensors."""
        return [name for name in self.launched if not name.startswith("roi::transpose<")]

    def run(self, source: str, expression: str, grid: LaunchGrid, arguments: tuple[Any, ...], device: object) -> None:
        # As CuPy does it: NumPy scalars and structures keep their size, a Python int is 64 bits.
        values = [np.atleast_1d(np.int64(value) if type(value) is int else value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = [np.array((*size, 1)[:2], dtype=np.uint32) for size in (grid.blocks, grid.threads)]
        shared_bytes, addresses = grid.shared_bytes, ctypes.addressof(pointers)
        missing = self._launch[source](
            expression.encode(), sizes[0].ctypes.data, sizes[1].ctypes.data, shared_bytes, addresses
        )
        assert not missing, f"{expression} was not built"
        self.launched.append(expression)

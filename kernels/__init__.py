"""CUDA C++ sources of the RoI operators, and their compilation at run time.

The package knows CuPy, source files and C++ names, and nothing of tensors. It imports without CuPy, which is needed
only to compile.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Kernel", "KernelCompilationError", "compile_options", "get_kernel", "sources"]

_FOLDER = Path(__file__).resolve().parent
IN_MEMORY = "CUPY_CACHE_IN_MEMORY"  # CuPy's variable, read at every compilation


class Kernel(Protocol):
    """A compiled kernel. A call launches it on CuPy's current stream and does not wait for it."""

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None: ...


class KernelCompilationError(RuntimeError):
    """A kernel could not be compiled or loaded; the message ends with the compiler's log, or the driver's reason."""


def sources() -> tuple[str, ...]:
    """The names of the sources that `get_kernel` compiles: files of this folder, without `.cu`."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.cu")))


def read_source(source: str) -> str:
    """The text of one of `sources()`.

    Raises:
        ValueError: there is no such source.
    """
    if source not in sources():
        raise ValueError(f"source must be one of {', '.join(sources())}, got {source!r}")
    return (_FOLDER / f"{source}.cu").read_text(encoding="utf-8")


@cache
def compile_options() -> tuple[str, ...]:
    """Options for NVRTC, the same for every kernel. CuPy adds the architecture, its include folders and `-ftz=true`."""
    # CuPy's disk cache is keyed by the source and the options, not by what the source includes: the digest is there so
    # that a changed header is not answered with an old binary.
    digest = hashlib.sha256()
    for header in sorted(_FOLDER.glob("*.cuh")):
        digest.update(header.read_bytes())
    return ("-std=c++17", f"-I{_FOLDER}", f"-DROI_HEADERS_DIGEST=0x{digest.hexdigest()[:16]}")


_kernels: dict[tuple[str, str, int], Kernel | KernelCompilationError] = {}
_lock = threading.Lock()


def get_kernel(source: str, expression: str, device: int) -> Kernel:
    """A kernel for one device, compiled on the first request.

    Each expression is a module of its own, so that a first call pays for one instantiation. Binaries are kept in CuPy's
    disk cache (versions of CuPy that do not cache named instantiations compile once per process, and so does any whose
    cache is full or read-only). Threads may call at the same time: one compiles, the others wait for it.

    Args:
        source: one of `sources()`.
        expression: C++ name of the instantiation, such as
            ``"roi::roi_pool<float, float, int, true, roi::Contiguous<4>>"``.
        device: index of the CUDA device.

    Raises:
        ValueError: there is no such source.
        KernelCompilationError: the instantiation could not be compiled or loaded, now or at the first request.
        ImportError: CuPy is not installed.
    """
    key = (source, expression, device)
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = _compile(source, expression, device)
    if isinstance(kernel, KernelCompilationError):
        raise kernel
    return kernel


def _compile(source: str, expression: str, device: int) -> Kernel | KernelCompilationError:
    import cupy

    def built() -> Kernel:
        module = cupy.RawModule(code=text, options=options, name_expressions=(expression,))
        kernel: Kernel = module.get_function(expression)
        return kernel

    text, options = read_source(source), compile_options()
    try:
        with cupy.cuda.Device(device):
            try:
                return built()
            except OSError:  # the cache is full, or not ours to write
                with _without_disk_cache():
                    return built()
    except Exception as error:  # the compiler's, NVRTC's when its library is missing, the driver's
        return KernelCompilationError(f"{source}.cu cannot be built for {expression}: {type(error).__name__}: {error}")


@contextmanager
def _without_disk_cache() -> Iterator[None]:
    before = os.environ.get(IN_MEMORY)
    os.environ[IN_MEMORY] = "1"
    try:
        yield
    finally:
        del os.environ[IN_MEMORY]
        if before is not None:
            os.environ[IN_MEMORY] = before

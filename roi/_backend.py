"""Which path runs an operator, and why: pure torch, or the CUDA kernels that CuPy compiles."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from roi import cupy_path, torch_path
from roi.kernels import KernelCompilationError

BACKENDS = ("auto", "torch", "cupy")
VARIABLE = "ROI_BACKEND"
INSTALL = "pip install 'fpn-roi[cuda12]' (or 'fpn-roi[cuda13]'), for the CUDA version of your driver"

_default = os.environ.get(VARIABLE, "auto")  # checked where it is used, so that importing never fails
_last_problems: dict[str, str] = {}  # operator -> why its kernel was last not to be had
_warned: set[str] = set()


def check_backend(backend: str, name: str = "backend") -> str:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def default_backend() -> str:
    """What backend="auto" means in this process: at first the environment variable ROI_BACKEND, else "auto".

    Raises:
        ValueError: the environment variable names no backend.
    """
    return check_backend(_default, f"the environment variable {VARIABLE}")


def set_default_backend(backend: str) -> None:
    """Let backend="auto" mean `backend` from now on, in every thread of this process.

    Args:
        backend: "torch", "cupy", or "auto": CuPy for CUDA tensors where it runs, torch otherwise.

    Raises:
        ValueError: `backend` is none of these.
    """
    global _default
    _default = check_backend(backend)


def run(function: str, operator: str, device: torch.device, backend: str, *args: Any) -> Any:
    """Call a function of the path that `backend` means for tensors on `device`.

    Args:
        function: its name, the same in both paths.
        operator: what messages call it.

    Raises:
        RuntimeError: "cupy" was asked for where it cannot run; the message says what is missing.
    """
    wanted = backend if backend != "auto" else default_backend()
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return getattr(torch_path, function)(*args)
    problem = cupy_problem(device.type)
    if problem is None:
        try:
            return getattr(cupy_path, function)(*args)
        except cupy_path.KernelLimitError as error:
            problem = str(error)
        except KernelCompilationError as error:
            problem = _last_problems[operator] = f"{error}\n{INSTALL}"
    if wanted == "cupy":
        raise RuntimeError(f"backend 'cupy' cannot run {operator}: {problem}")
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"{operator} runs on the torch path, slower than CuPy's kernels: {problem}", stacklevel=2)
    return getattr(torch_path, function)(*args)


@cache
def cupy_problem(device_type: str) -> str | None:
    """Why CuPy's kernels cannot run on tensors of that device; None where they can be tried."""
    if device_type != "cuda":
        return f"its kernels run on CUDA tensors, and these are on {device_type!r}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    try:
        import cupy
    except Exception as error:  # a CuPy that does not match the machine fails to import in many ways
        return f"CuPy does not import ({type(error).__name__}: {error}); {INSTALL}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy sees no CUDA device ({error}); {INSTALL}"
    return None


@dataclass(frozen=True)
class BackendInfo:
    """What runs where.

    Attributes:
        default: the process-wide default (`set_default_backend`, ROI_BACKEND).
        cpu: the path that backend="auto" takes for CPU tensors.
        cuda: the path that it takes for CUDA tensors.
        reason: why `cuda` is what it is.
    """

    default: str
    cpu: str
    cuda: str
    reason: str

    def __str__(self) -> str:
        return f"RoI operators (default {self.default}): cpu -> {self.cpu}; cuda -> {self.cuda} ({self.reason})"


def backend_info() -> BackendInfo:
    """Which path runs for CPU and for CUDA tensors in this process when backend="auto", and why."""
    problems = [problem for problem in (cupy_problem("cuda"), *_last_problems.values()) if problem]
    default = default_backend()
    if default == "torch":
        return BackendInfo(default, "torch", "torch", "torch is the default of this process")
    without = "torch" if default == "auto" else "RuntimeError"
    outcome = without if problems else "cupy"
    cpu = "RuntimeError" if default == "cupy" else "torch"
    return BackendInfo(default, cpu, outcome, "; ".join(problems) or "CuPy imports and sees the device")

"""Which path runs an operator, and why: pure torch, the CUDA kernels that CuPy compiles, or torchvision's operators."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from roi import cupy_path, torch_path, torchvision_path
from roi.kernels import KernelCompilationError

BACKENDS = ("auto", "torch", "cupy", "torchvision")
VARIABLE = "ROI_BACKEND"
INSTALL = "pip install 'fpn-roi[cuda12]' (or 'fpn-roi[cuda13]'), for the CUDA version of your driver"
NO_DEVICE = "this torch sees no CUDA device"

_default = os.environ.get(VARIABLE, "auto")  # checked where it is used, so that importing never fails
_last_problems: dict[str, str] = {}  # operator -> why its kernel was last not to be had
_warned: set[str] = set()


def check_backend(backend: str, name: str = "backend") -> str:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def backend_repr(backend: str) -> str:
    """What a module's repr says of it: nothing by default, so that the repr is torchvision's."""
    return "" if backend == "auto" else f", backend={backend!r}"


def default_backend() -> str:
    """What backend="auto" means in this process: at first the environment variable ROI_BACKEND, else "auto".

    Raises:
        ValueError: the environment variable names no backend.
    """
    return check_backend(_default, f"the environment variable {VARIABLE}")


def set_default_backend(backend: str) -> None:
    """Let backend="auto" mean `backend` from now on, in every thread of this process.

    Args:
        backend: "torch", "cupy", "torchvision", or "auto": torch for CPU tensors; for CUDA tensors CuPy where it runs,
            else torchvision where it has CUDA operators, else torch.

    Raises:
        ValueError: `backend` is none of these.
    """
    global _default
    _default = check_backend(backend)


def run(function: str, operator: str, device: torch.device, backend: str, *args: Any) -> Any:
    """Call a function of the path that `backend` means for tensors on `device`.

    Args:
        function: its name, the same in all paths.
        operator: what messages call it.

    Raises:
        RuntimeError: the path that was asked for cannot run; the message says what is missing.
    """
    wanted = backend if backend != "auto" else default_backend()
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return getattr(torch_path, function)(*args)
    problems: list[str] = []
    for path in candidates(wanted):
        problem = PROBLEMS[path](device.type)
        if problem is None:
            try:
                output = getattr(PATHS[path], function)(*args)
            except (cupy_path.KernelLimitError, torchvision_path.OperatorLimitError) as error:
                problem = str(error)
            except KernelCompilationError as error:
                problem = _last_problems[operator] = f"{error}\n{INSTALL}"
            else:
                warn(operator, f"torchvision's {device.type.upper()} operators", problems)
                return output
        problems.append(problem)
    if wanted != "auto":
        raise RuntimeError(f"backend {wanted!r} cannot run {operator}: {problems[0]}")
    warn(operator, "the torch path", problems)
    return getattr(torch_path, function)(*args)


def candidates(wanted: str) -> tuple[str, ...]:
    """The paths besides torch's that are tried on CUDA tensors, best first."""
    return ("cupy", "torchvision") if wanted == "auto" else (wanted,)


def warn(operator: str, path: str, problems: Sequence[str]) -> None:
    """Say once what stands in the way of the paths before `path`, if anything does."""
    reason = "; ".join(problems)
    if problems and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{operator} runs on {path}, slower than CuPy's kernels: {reason}", stacklevel=levels_to_user() + 1
        )


def levels_to_user() -> int:
    """How many frames lie between the caller of this function and the first one outside of roi and torch, and 1."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("roi", "torch"):
        level, frame = level + 1, frame.f_back
    return level - 1


@cache
def cupy_problem(device_type: str) -> str | None:
    """Why CuPy's kernels cannot run on tensors of that device; None where they can be tried."""
    if device_type != "cuda":
        return f"its kernels run on CUDA tensors, and these are on {device_type!r}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return NO_DEVICE
    try:
        import cupy
    except Exception as error:  # a CuPy that does not match the machine fails to import in many ways
        return f"CuPy does not import ({type(error).__name__}: {error}); {INSTALL}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy sees no CUDA device ({error}); {INSTALL}"
    return None


@cache
def torchvision_problem(device_type: str) -> str | None:
    """Why torchvision's operators cannot run on tensors of that device; None where they can be tried."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return NO_DEVICE
    try:
        import torchvision.ops  # registers them
    except Exception as error:  # one that does not match torch fails to import in many ways
        return f"torchvision does not import ({type(error).__name__}: {error})"
    key = device_type.upper()
    try:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::roi_align", key)
    except RuntimeError as error:  # no such operator: it was built without them; or no such device
        return f"torchvision {torchvision.__version__} has no operators here ({error})"
    return None if registered else f"torchvision {torchvision.__version__} has no operators for {device_type!r}"


PATHS: dict[str, ModuleType] = {"cupy": cupy_path, "torchvision": torchvision_path}
# Looked up by name, that a test may replace them.
PROBLEMS: dict[str, Callable[[str], str | None]] = {
    "cupy": lambda device_type: cupy_problem(device_type),
    "torchvision": lambda device_type: torchvision_problem(device_type),
}


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
    default = default_backend()
    (cpu, _), (cuda, reason) = planned(default, "cpu"), planned(default, "cuda")
    return BackendInfo(default, cpu, cuda, reason)


def planned(default: str, device_type: str) -> tuple[str, str]:
    """The path that is tried first on that device, or "RuntimeError", and why."""
    if default == "torch" or (default == "auto" and device_type != "cuda"):
        return "torch", f"{default} is the default of this process"
    problems: list[str] = []
    for path in candidates(default):
        found = PROBLEMS[path](device_type)
        own = [found] if found else list(_last_problems.values()) if path == "cupy" else []
        if not own:
            return path, "; ".join(problems) or f"{path} imports and has kernels for {device_type}"
        problems += own
    return "torch" if default == "auto" else "RuntimeError", "; ".join(dict.fromkeys(problems))

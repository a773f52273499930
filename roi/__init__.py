"""RoI feature extraction: pure torch, and CUDA kernels that CuPy compiles at run time."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # A source checkout, where the folder that installs as roi.kernels lies beside this one.
    _kernels = _here.parent / "kernels"
    _spec = spec_from_file_location("roi.kernels", _kernels / "__init__.py", submodule_search_locations=[str(_kernels)])
    assert _spec is not None
    assert _spec.loader is not None
    kernels = sys.modules["roi.kernels"] = module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from roi._backend import backend_info, default_backend, set_default_backend  # noqa: E402
from roi.functions import (  # noqa: E402
    multiscale_roi_align,
    multiscale_roi_pool,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from roi.modules import PSRoIAlign, PSRoIPool, RoIAlign, RoIPool  # noqa: E402
from roi.torch_path.memory import empty_cache  # noqa: E402

if TYPE_CHECKING:
    from roi.poolers import MultiScaleRoIAlign, MultiScaleRoIPool

__version__ = "0.1.0"

__all__ = [
    "MultiScaleRoIAlign",
    "MultiScaleRoIPool",
    "PSRoIAlign",
    "PSRoIPool",
    "RoIAlign",
    "RoIPool",
    "backend_info",
    "default_backend",
    "empty_cache",
    "multiscale_roi_align",
    "multiscale_roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "roi_align",
    "roi_pool",
    "set_default_backend",
]


def __getattr__(name: str) -> object:
    """What is imported on first use: the poolers, which import torchvision where it is installed, and `roi.onnx`."""
    if name == "onnx":
        return import_module("roi.onnx")
    if name in ("MultiScaleRoIAlign", "MultiScaleRoIPool"):
        value: object = getattr(import_module("roi.poolers"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

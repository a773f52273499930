"""RoI feature extraction: pure torch, and CUDA kernels that CuPy compiles at run time."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

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
from roi.modules import (  # noqa: E402
    MultiScaleRoIAlign,
    MultiScaleRoIPool,
    PSRoIAlign,
    PSRoIPool,
    RoIAlign,
    RoIPool,
)
from roi.torch_path.memory import empty_cache  # noqa: E402

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

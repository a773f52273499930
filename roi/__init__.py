"""RoI feature extraction: pure torch, and CUDA kernels that CuPy compiles at run time."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # A source checkout, where the folder that installs as roi.kernels lies beside this one.
    __path__.append(str(_here.parent))

from roi.backend import backend_info, default_backend, set_default_backend  # noqa: E402
from roi.pool import RoIPool, roi_pool  # noqa: E402

__all__ = ["RoIPool", "backend_info", "default_backend", "roi_pool", "set_default_backend"]

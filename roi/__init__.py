"""RoI feature extraction: pure torch, and CUDA kernels that CuPy compiles at run time."""

from roi.backend import backend_info, default_backend, set_default_backend
from roi.pool import RoIPool, roi_pool

__all__ = ["RoIPool", "backend_info", "default_backend", "roi_pool", "set_default_backend"]

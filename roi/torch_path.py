"""The pure-torch implementations of the operators, a file for each family."""

from roi.torch_align import (
    multiscale_roi_align,
    multiscale_roi_align_backward,
    roi_align,
    roi_align_backward,
)
from roi.torch_multiscale_pool import multiscale_roi_pool, multiscale_roi_pool_backward
from roi.torch_pool import roi_pool, roi_pool_backward
from roi.torch_position_sensitive import (
    ps_roi_align,
    ps_roi_align_backward,
    ps_roi_pool,
    ps_roi_pool_backward,
)

__all__ = [
    "multiscale_roi_align",
    "multiscale_roi_align_backward",
    "multiscale_roi_pool",
    "multiscale_roi_pool_backward",
    "ps_roi_align",
    "ps_roi_align_backward",
    "ps_roi_pool",
    "ps_roi_pool_backward",
    "roi_align",
    "roi_align_backward",
    "roi_pool",
    "roi_pool_backward",
]

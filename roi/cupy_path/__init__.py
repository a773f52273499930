"""The CUDA path: launches of the kernels that CuPy compiles.

The functions take checked CUDA tensors of one device and return new ones. Memory comes from torch's allocator, launches
go to torch's current stream, nothing waits for the device and nothing is read back: after a first call, which compiles,
a CUDA graph can capture them.

In all of them `rois` is Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64; a fraction in an index is
dropped. Features are Tensor[N, C, H, W], float32, float64, float16 or bfloat16; contiguous and channels_last memory is
read as it lies, any other is copied to contiguous first. The maps of a pyramid come finest first, at most 8 of them;
the first one's memory format is taken for all. Half precision is summed in float32. A row that is not finite or off
the batch gives NaN and takes no gradient.

Under `torch.use_deterministic_algorithms(True)` one thread sums each element of a gradient, in the order of the boxes
and of the bins, so that every run gives the same; otherwise gradients are summed by atomic additions.

Every function raises KernelLimitError for a size or a dtype that the kernels do not take.
"""

from roi.cupy_path.align import (
    multiscale_roi_align,
    multiscale_roi_align_backward,
    roi_align,
    roi_align_backward,
)
from roi.cupy_path.average_pool import (
    ps_roi_align,
    ps_roi_align_backward,
    ps_roi_pool,
    ps_roi_pool_backward,
)
from roi.cupy_path.launch import KernelLimitError
from roi.cupy_path.max_pool import multiscale_roi_pool, multiscale_roi_pool_backward, roi_pool, roi_pool_backward

__all__ = [
    "KernelLimitError",
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

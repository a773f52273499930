"""The CUDA path: launches of the kernels that CuPy compiles.

The functions take checked CUDA tensors of one device and return new ones. Memory comes from torch's allocator, launches
go to torch's current stream, nothing waits for the device and nothing is read back: after a first call, which compiles,
a CUDA graph can capture them.

In all of them `rois` is Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64; a fraction in an index is
dropped. Features are Tensor[N, C, H, W], float32, float64, float16 or bfloat16; contiguous and channels_last memory is
read as it lies, any other is copied to contiguous first. A pyramid has at most 8 maps; the first one's memory format is
taken for all. Half precision is summed in float32. A row that is not finite or off the batch gives NaN, one on none of
the levels 0; neither takes a gradient.

Under `torch.use_deterministic_algorithms(True)` one thread sums each element of a gradient, in the order of the boxes
and of the bins, so that every run gives the same; otherwise gradients are summed by atomic additions.

Every function raises KernelLimitError for a size or a dtype that the kernels do not take.
"""

from roi.cupy_path.launch import KernelLimitError
from roi.cupy_path.ps_roi_pool_launches import average_pool, average_pool_adjoint
from roi.cupy_path.roi_align_launches import align, align_adjoint
from roi.cupy_path.roi_pool_launches import max_gather_adjoint, max_pool, max_pool_with_argmax
from roi.torch_path import max_gather  # PyTorch's operators, on any device

__all__ = [
    "KernelLimitError",
    "align",
    "align_adjoint",
    "average_pool",
    "average_pool_adjoint",
    "max_gather",
    "max_gather_adjoint",
    "max_pool",
    "max_pool_with_argmax",
]

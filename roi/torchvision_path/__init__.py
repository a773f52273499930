"""torchvision's own operators as a path: what CUDA tensors take where CuPy is missing.

The functions are those of `roi.torch_path`, with the same arguments. A pyramid is pooled level by level. What
torchvision's operators leave undefined is defined here: a row that is not finite or off the batch comes out as NaN and
takes no gradient. Half precision is computed in float32. Two functions are the torch path's: torchvision has no
`max_gather`, and its gradient of `ps_roi_pool` is not that of the output.
"""

from roi.torch_path import average_pool_adjoint, max_gather
from roi.torchvision_path.pooling import (
    align,
    align_adjoint,
    average_pool,
    max_gather_adjoint,
    max_pool,
    max_pool_with_argmax,
)
from roi.torchvision_path.problem import OperatorLimitError

__all__ = [
    "OperatorLimitError",
    "align",
    "align_adjoint",
    "average_pool",
    "average_pool_adjoint",
    "max_gather",
    "max_gather_adjoint",
    "max_pool",
    "max_pool_with_argmax",
]

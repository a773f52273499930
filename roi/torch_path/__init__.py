"""The pure-torch path, on any device. Every function takes a pyramid's maps, Tensor[N, C, Hl, Wl], or their shape.

In all of them `rois` is Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64; a row that is not finite or
off the batch comes out as NaN and takes no gradient, and so does one on none of the levels as 0. Outputs have the
memory format of the first map. Inside there is one layout: the cells of a map as rows of channels, as channels_last
maps lie in memory; others are copied to it first.
"""

from roi.torch_path.adaptive import max_gather, max_gather_adjoint, max_pool, max_pool_with_argmax
from roi.torch_path.linear import align, align_adjoint, average_pool, average_pool_adjoint

__all__ = [
    "align",
    "align_adjoint",
    "average_pool",
    "average_pool_adjoint",
    "max_gather",
    "max_gather_adjoint",
    "max_pool",
    "max_pool_with_argmax",
]

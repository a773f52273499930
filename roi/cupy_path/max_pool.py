"""RoI max pooling: launches of roi_pool.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roi._outputs import empty_argmax, empty_pooled
from roi._problem import memory_format
from roi.cupy_path import launch

CANDIDATE_BYTES = 24  # Candidate<Extent>


def roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling of one map: `multiscale_roi_pool` with Tensor[N, C, H, W]."""
    return multiscale_roi_pool(
        [input], rois, [spatial_scale], *launch.ONE_LEVEL, pooled_height, pooled_width, with_argmax
    )


def roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """`multiscale_roi_pool_backward` for one map."""
    (gradient,) = multiscale_roi_pool_backward(
        grad, rois, argmax, [spatial_scale], *launch.ONE_LEVEL, batch, channels, [height], [width], channels_last
    )
    return gradient


def multiscale_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
    pooled_height: int,
    pooled_width: int,
    with_argmax: bool,
) -> tuple[Tensor, Tensor]:
    """RoI max pooling of each box from its level of a pyramid.

    Args:
        features: Tensor[N, C, H, W] for each level.
        rois: Tensor[K, 5].
        scales: cells of each map per unit of the boxes.
        canonical_scale, canonical_level: a box of that side belongs to that level.
        pooled_height, pooled_width: bins of the output.
        with_argmax: whether to keep what the gradient needs.

    Returns:
        output: Tensor[K, C, pooled_height, pooled_width] in the dtype and the memory format of the first map.
        argmax: the same shape and format, integer: the cell y·W + x, of the box's level, of the first maximum, or of
            the last NaN where there is one; -1 for an empty bin. Tensor[0] where it was not asked for.
    """
    batch, channels, *_ = features[0].shape
    bins = pooled_height * pooled_width
    sizes = [(x.shape[2], x.shape[3]) for x in features]
    launch.check_limits(batch, channels, sizes, channels * bins, pooled_height, pooled_width)
    feature = launch.feature_type(features[0].dtype)
    features = launch.of_one_format(features)
    channels_last = memory_format(features[0]) is torch.channels_last
    rois = rois.contiguous()
    output = empty_pooled(features[0], len(rois), pooled_height, pooled_width)
    largest = max(features, key=lambda x: x.shape[2] * x.shape[3])
    argmax = empty_argmax(largest, output, with_argmax, memory_format(features[0]))
    if output.numel() == 0:
        return output, argmax

    per_thread = launch.lanes(features) if channels_last else launch.CHANNELS_PER_THREAD
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {launch.INDICES[argmax.dtype]}, {str(with_argmax).lower()}"
    expression = f"roi::roi_pool<{types}, {launch.layout(channels_last, per_thread)}>"
    levels = launch.levels(features, scales, (canonical_scale, canonical_level), rois.dtype)
    pointers = (rois.data_ptr(), output.data_ptr(), argmax.data_ptr() if with_argmax else 0)
    arguments = (levels, *pointers, *launch.int32(batch, channels, pooled_height, pooled_width))
    shared_bytes = launch.RANGE_BYTES * (pooled_height + pooled_width)
    grid = launch.per_box(len(rois), launch.ceil_divide(channels, per_thread) * bins, shared_bytes)
    launch.run("roi_pool", expression, grid, arguments, rois.device)
    return output, argmax


def multiscale_roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
    batch: int,
    channels: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """Gradient of `multiscale_roi_pool` with respect to its features: a bin's gradient is added at the bin's argmax.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width] in the dtype of the features, in any memory format.
        rois, scales, canonical_scale, canonical_level: those of the forward pass.
        argmax: what the forward pass gave.
        batch, channels, heights, widths: shapes of the features.
        channels_last: their memory format, and that of the result.

    Returns:
        Tensor[batch, channels, height, width] for each level, in the dtype of `grad`.
    """
    pooled_height, pooled_width = argmax.shape[2:]
    sizes = list(zip(heights, widths, strict=True))
    elements = channels * pooled_height * pooled_width
    launch.check_limits(batch, channels, sizes, elements, pooled_height, pooled_width)
    feature = launch.feature_type(grad.dtype)
    rois = rois.contiguous()
    grad = grad.contiguous(memory_format=format_of(channels_last))
    argmax = argmax.contiguous(memory_format=format_of(channels_last))
    maps = launch.gradient_maps(grad, batch, channels, sizes, channels_last)
    if grad.numel() == 0 or not any(x.numel() for x in maps):
        return [x.to(grad.dtype) for x in maps]

    index = launch.INDICES[argmax.dtype]
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {index}, {str(channels_last).lower()}"
    levels = launch.levels(maps, scales, (canonical_scale, canonical_level), rois.dtype)
    pointers = (grad.data_ptr(), rois.data_ptr(), argmax.data_ptr())
    shape = launch.int32(batch, channels, pooled_height, pooled_width)
    if torch.are_deterministic_algorithms_enabled():
        expression = f"roi::roi_pool_backward_gather<{types}>"
        bins = (pooled_height, pooled_width)
        grid, slots = launch.per_cell(batch, channels, sizes, channels_last, CANDIDATE_BYTES, 0, *bins)
        arguments = (levels, *pointers, *launch.int32(len(rois)), *shape, *launch.int32(slots))
    else:
        expression = f"roi::roi_pool_backward_atomic<{types}>"
        grid = launch.per_box(len(rois), elements, 0)
        arguments = (levels, *pointers, *shape)
    launch.run("roi_pool", expression, grid, arguments, rois.device)
    return [x.to(grad.dtype) for x in maps]

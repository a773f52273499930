"""Position-sensitive RoI average pooling and RoIAlign: launches of ps_roi_pool.cu and roi_align.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from roi._problem import memory_format
from roi.cupy_path import launch
from roi.cupy_path.align import align_backward, align_forward

CANDIDATE_BYTES = 24  # Candidate<Extent>


def ps_roi_align(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int
) -> Tensor:
    """Position-sensitive RoIAlign.

    Args:
        input: Tensor[N, C·pooled_height·pooled_width, H, W].
        rois: Tensor[K, 5].
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.
        sampling_ratio: samples per bin and axis; 0 or less for as many as the bin has cells, rounded up.

    Returns:
        Tensor[K, C, pooled_height, pooled_width] in the dtype and the memory format of `input`.
    """
    bins = (pooled_height, pooled_width)
    return align_forward(
        [input], rois, [spatial_scale], launch.ONE_LEVEL, bins, sampling_ratio, True, position_sensitive=True
    )


def ps_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of `ps_roi_align`, Tensor[batch, channels, height, width] in the dtype of `grad`."""
    shape = (batch, channels)
    scales, canonical, sizes = [spatial_scale], launch.ONE_LEVEL, [(height, width)]
    (gradient,) = align_backward(
        grad, rois, scales, canonical, sampling_ratio, True, shape, sizes, channels_last, position_sensitive=True
    )
    return gradient


def ps_roi_pool(input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int) -> Tensor:
    """Position-sensitive RoI average pooling.

    Args:
        input: Tensor[N, C·pooled_height·pooled_width, H, W].
        rois: Tensor[K, 5].
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.

    Returns:
        Tensor[K, C, pooled_height, pooled_width] in the dtype and the memory format of `input`.
    """
    batch, input_channels, height, width = input.shape
    bins = pooled_height * pooled_width
    channels = input_channels // bins
    launch.check_limits(batch, input_channels, [(height, width)], input_channels, pooled_height, pooled_width)
    feature = launch.feature_type(input.dtype)
    (input,) = launch.of_one_format([input])
    channels_last = memory_format(input) is torch.channels_last
    rois = rois.contiguous()
    shape = (len(rois), channels, pooled_height, pooled_width)
    output = torch.empty(shape, dtype=input.dtype, device=rois.device, memory_format=format_of(channels_last))
    if output.numel() == 0:
        return output

    expression = f"roi::ps_roi_pool<{feature}, {launch.COORDINATES[rois.dtype]}, {launch.layout(channels_last, 1)}>"
    levels = launch.levels([input], [spatial_scale], launch.ONE_LEVEL, rois.dtype)
    pointers = (rois.data_ptr(), output.data_ptr())
    arguments = (levels, *pointers, *launch.int32(batch, channels, pooled_height, pooled_width))
    shared_bytes = launch.RANGE_BYTES * (pooled_height + pooled_width)
    grid = launch.per_box(len(rois), channels * bins, shared_bytes)
    launch.run("ps_roi_pool", expression, grid, arguments, rois.device)
    return output


def ps_roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of `ps_roi_pool`, Tensor[batch, channels, height, width] in the dtype of `grad`."""
    _, output_channels, pooled_height, pooled_width = grad.shape
    sizes = [(height, width)]
    launch.check_limits(batch, channels, sizes, channels, pooled_height, pooled_width)
    feature = launch.feature_type(grad.dtype)
    rois = rois.contiguous()
    grad = grad.contiguous(memory_format=format_of(channels_last))
    maps = launch.gradient_maps(grad, batch, channels, sizes, channels_last)
    if grad.numel() == 0 or maps[0].numel() == 0:
        return maps[0].to(grad.dtype)

    types = f"{feature}, {launch.COORDINATES[rois.dtype]}"
    levels = launch.levels(maps, [spatial_scale], launch.ONE_LEVEL, rois.dtype)
    pointers = (grad.data_ptr(), rois.data_ptr())
    shape = launch.int32(batch, output_channels, pooled_height, pooled_width)
    if torch.are_deterministic_algorithms_enabled():
        expression = f"roi::ps_roi_pool_backward_gather<{types}, {str(channels_last).lower()}>"
        memory = (CANDIDATE_BYTES, launch.number_bytes(grad.dtype))
        grid, slots = launch.per_cell(batch, channels, sizes, channels_last, *memory, pooled_height, pooled_width)
        arguments = (levels, *pointers, *launch.int32(len(rois)), *shape, *launch.int32(slots))
    else:
        expression = f"roi::ps_roi_pool_backward_atomic<{types}, {launch.layout(channels_last, 1)}>"
        shared_bytes = launch.RANGE_BYTES * (pooled_height + pooled_width)
        grid = launch.per_box(len(rois), output_channels * pooled_height * pooled_width, shared_bytes)
        arguments = (levels, *pointers, *shape)
    launch.run("ps_roi_pool", expression, grid, arguments, rois.device)
    return maps[0].to(grad.dtype)

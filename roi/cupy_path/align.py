"""RoIAlign: launches of roi_align.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from roi._problem import memory_format
from roi.cupy_path import launch

CANDIDATE_BYTES = {torch.float32: 32, torch.float64: 56}  # Candidate<Sampling<…>>
VECTOR_ATOMICS = 4  # numbers, all float32
# Where coordinates are so large that neighbouring bins seem to overlap, an axis may have more taps.
MORE_TAPS = 64


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of one map: `multiscale_roi_align` with Tensor[N, C, H, W]."""
    return multiscale_roi_align(
        [input], rois, [spatial_scale], *launch.ONE_LEVEL, pooled_height, pooled_width, sampling_ratio, aligned
    )


def roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """`multiscale_roi_align_backward` for one map."""
    shape = (batch, channels)
    scales, canonical, sizes = [spatial_scale], launch.ONE_LEVEL, [(height, width)]
    (gradient,) = align_backward(
        grad, rois, scales, canonical, sampling_ratio, aligned, shape, sizes, channels_last, position_sensitive=False
    )
    return gradient


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of each box from its level of a pyramid.

    Args:
        features: Tensor[N, C, H, W] for each level.
        rois: Tensor[K, 5].
        scales: cells of each map per unit of the boxes.
        canonical_scale, canonical_level: a box of that side belongs to that level.
        pooled_height, pooled_width: bins of the output.
        sampling_ratio: samples per bin and axis; 0 or less for as many as the bin has cells, rounded up.
        aligned: whether the centres of cells, not their corners, are at whole coordinates plus a half.

    Returns:
        Tensor[K, C, pooled_height, pooled_width] in the dtype and the memory format of the first map.
    """
    canonical, bins = (canonical_scale, canonical_level), (pooled_height, pooled_width)
    return align_forward(features, rois, scales, canonical, bins, sampling_ratio, aligned, position_sensitive=False)


def multiscale_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
    sampling_ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """Gradient of `multiscale_roi_align` with respect to its features.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width] in the dtype of the features, in any memory format.
        rois, scales, canonical_scale, canonical_level, sampling_ratio, aligned: those of the forward pass.
        batch, channels, heights, widths: shapes of the features.
        channels_last: their memory format, and that of the result.

    Returns:
        Tensor[batch, channels, height, width] for each level, in the dtype of `grad`.
    """
    shape = (batch, channels)
    canonical, sizes = (canonical_scale, canonical_level), list(zip(heights, widths, strict=True))
    return align_backward(
        grad, rois, scales, canonical, sampling_ratio, aligned, shape, sizes, channels_last, position_sensitive=False
    )


def align_forward(
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    canonical: tuple[float, float],
    bins: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    *,
    position_sensitive: bool,
) -> Tensor:
    """Both forms of RoIAlign: the position-sensitive one makes one channel of each `bins` channels of the features."""
    batch, input_channels, *_ = features[0].shape
    channels = input_channels // (bins[0] * bins[1]) if position_sensitive else input_channels
    sizes = [(x.shape[2], x.shape[3]) for x in features]
    elements = channels * bins[0] * bins[1]
    check_cells(sizes)
    launch.check_limits(batch, input_channels, sizes, elements, *bins)
    feature = launch.feature_type(features[0].dtype)
    features = launch.of_one_format(features)
    channels_last = memory_format(features[0]) is torch.channels_last
    rois = rois.contiguous()
    shape = (len(rois), channels, *bins)
    output = torch.empty(shape, dtype=features[0].dtype, device=rois.device, memory_format=format_of(channels_last))
    if output.numel() == 0:
        return output

    together = launch.lanes(features) if channels_last else launch.CHANNELS_PER_THREAD
    per_thread = 1 if position_sensitive else together
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {launch.layout(channels_last, per_thread)}"
    expression = f"roi::roi_align<{types}, {str(position_sensitive).lower()}>"
    capacity, shared_bytes = taps_memory(sizes, bins, sampling_ratio, launch.number_bytes(output.dtype))
    options = launch.int32(batch, channels, *bins, sampling_ratio, aligned, capacity)
    levels = launch.levels(features, scales, canonical, rois.dtype)
    arguments = (levels, rois.data_ptr(), output.data_ptr(), *options)
    items = launch.ceil_divide(channels, per_thread) * bins[0] * bins[1]
    launch.run("roi_align", expression, launch.per_box(len(rois), items, shared_bytes), arguments, rois.device)
    return output


def align_backward(
    grad: Tensor,
    rois: Tensor,
    scales: Sequence[float],
    canonical: tuple[float, float],
    sampling_ratio: int,
    aligned: bool,
    shape: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    channels_last: bool,
    *,
    position_sensitive: bool,
) -> list[Tensor]:
    """Gradients of `align_forward`, whose features are Tensor[*shape, *size] for each of `sizes`."""
    batch, input_channels = shape
    channels, *_ = grad.shape[1:]
    bins = (grad.shape[2], grad.shape[3])
    elements = channels * bins[0] * bins[1]
    check_cells(sizes)
    launch.check_limits(batch, input_channels, sizes, elements, *bins)
    feature = launch.feature_type(grad.dtype)
    rois = rois.contiguous()
    grad = grad.contiguous(memory_format=format_of(channels_last))
    maps = launch.gradient_maps(grad, batch, input_channels, sizes, channels_last)
    if grad.numel() == 0 or batch == 0:
        return [x.to(grad.dtype) for x in maps]

    types = f"{feature}, {launch.COORDINATES[rois.dtype]}"
    sensitive = str(position_sensitive).lower()
    levels = launch.levels(maps, scales, canonical, rois.dtype)
    pointers = (grad.data_ptr(), rois.data_ptr())
    if torch.are_deterministic_algorithms_enabled():
        expression = f"roi::roi_align_backward_gather<{types}, {str(channels_last).lower()}, {sensitive}>"
        weight_bytes = launch.number_bytes(grad.dtype)
        memory = (CANDIDATE_BYTES[rois.dtype], weight_bytes)
        grid, slots = launch.per_cell(batch, input_channels, sizes, channels_last, *memory, *bins)
        options = launch.int32(len(rois), batch, channels, *bins, sampling_ratio, aligned, slots)
    else:
        per_thread = channels_per_atomic(grad, maps, channels_last, position_sensitive)
        expression = f"roi::roi_align_backward_atomic<{types}, {launch.layout(channels_last, per_thread)}, {sensitive}>"
        capacity, shared_bytes = taps_memory(sizes, bins, sampling_ratio, launch.number_bytes(grad.dtype))
        items = launch.ceil_divide(channels, per_thread) * bins[0] * bins[1]
        grid = launch.per_box(len(rois), items, shared_bytes)
        options = launch.int32(batch, channels, *bins, sampling_ratio, aligned, capacity)
    launch.run("roi_align", expression, grid, (levels, *pointers, *options), rois.device)
    return [x.to(grad.dtype) for x in maps]


def check_cells(sizes: Sequence[tuple[int, int]]) -> None:
    if min(min(size) for size in sizes) < 1:
        raise launch.KernelLimitError(f"the CUDA kernels interpolate in maps of at least one cell, got {sizes}")


def taps_memory(
    sizes: Sequence[tuple[int, int]], bins: tuple[int, int], sampling_ratio: int, number_bytes: int
) -> tuple[int, int]:
    """How many taps share_taps() may need for its two axes, and the shared memory that it then takes."""
    cells = (max(height for height, _ in sizes), max(width for _, width in sizes))
    capacity = 0
    for count, axis_bins in zip(cells, bins, strict=True):
        most = count + 2 * axis_bins + MORE_TAPS
        capacity += min(most, 2 * sampling_ratio * axis_bins) if sampling_ratio > 0 else most
    header, tap = 2 * number_bytes, 2 * number_bytes
    shared_bytes = header + launch.RANGE_BYTES * sum(bins) + tap * capacity
    launch.check_shared(shared_bytes, f"{capacity} weights for maps of {cells[0]} x {cells[1]}")
    return capacity, shared_bytes


def channels_per_atomic(grad: Tensor, maps: Sequence[Tensor], channels_last: bool, position_sensitive: bool) -> int:
    """Channels that a thread of the atomic backward takes: four with one addition, where the device has such."""
    if position_sensitive:
        return 1
    if not channels_last:
        return launch.CHANNELS_PER_THREAD
    vectors = maps[0].dtype == torch.float32 and grad.shape[1] % VECTOR_ATOMICS == 0 and has_vector_atomics(grad.device)
    aligned = all(x.data_ptr() % launch.VECTOR_BYTES == 0 for x in (grad, *maps))
    return VECTOR_ATOMICS if vectors and aligned else 1


@lru_cache
def has_vector_atomics(device: torch.device) -> bool:
    """Whether atomic_add() of roi_common.cuh is one instruction for four numbers."""
    return torch.cuda.get_device_capability(device) >= (9, 0)

"""RoIAlign, position-sensitive or not: launches of roi_align.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from roi._outputs import empty_pooled
from roi._problem import Maps, Pooling
from roi.cupy_path import launch

CANDIDATE_BYTES = {torch.float32: 32, torch.float64: 56}  # Candidate<Sampling<…>>
VECTOR_ATOMICS = 4  # numbers, all float32
# Where coordinates are so large that neighbouring bins seem to overlap, an axis may have more taps.
MORE_TAPS = 64


def align(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """RoIAlign of each box from its level of a pyramid: Tensor[K, C, pooled_height, pooled_width]."""
    shape = Maps.of(maps)
    check_cells(shape)
    launch.check_limits(shape, pooling)
    feature = launch.feature_type(maps[0].dtype)
    maps, rois = launch.of_one_format(maps), rois.contiguous()
    output = empty_pooled(maps[0], len(rois), shape, pooling)
    if output.numel() == 0:
        return output

    together = launch.lanes(maps) if shape.channels_last else launch.CHANNELS_PER_THREAD
    per_thread = 1 if pooling.position_sensitive else together
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {launch.layout(shape.channels_last, per_thread)}"
    expression = f"roi::roi_align<{types}, {launch.flag(pooling.position_sensitive)}>"
    capacity, shared_bytes = taps_memory(shape, pooling, launch.number_bytes(output.dtype))
    channels = output.shape[1]
    arguments = (
        launch.levels(maps, pooling, rois.dtype),
        rois.data_ptr(),
        output.data_ptr(),
        *sampling_arguments(shape.batch, channels, pooling, capacity),
    )
    items = launch.ceil_divide(channels, per_thread) * pooling.bins
    launch.run("roi_align", expression, launch.per_box(len(rois), items, shared_bytes), arguments, rois.device)
    return output


def align_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """Gradients of `align` with respect to the maps, of Tensor[K, C, pooled_height, pooled_width] `grad`."""
    check_cells(maps)
    launch.check_limits(maps, pooling)
    feature = launch.feature_type(grad.dtype)
    rois, grad = rois.contiguous(), grad.contiguous(memory_format=maps.layout)
    gradients = launch.gradient_maps(grad, maps)
    if grad.numel() == 0 or maps.batch == 0:
        return [x.to(grad.dtype) for x in gradients]

    channels = grad.shape[1]
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}"
    sensitive = launch.flag(pooling.position_sensitive)
    levels, pointers = launch.levels(gradients, pooling, rois.dtype), (grad.data_ptr(), rois.data_ptr())
    if torch.are_deterministic_algorithms_enabled():
        expression = f"roi::roi_align_backward_gather<{types}, {launch.flag(maps.channels_last)}, {sensitive}>"
        weight_bytes = launch.number_bytes(grad.dtype)
        grid, slots = launch.per_cell(maps, pooling, CANDIDATE_BYTES[rois.dtype], weight_bytes)
        options = (*launch.int32(len(rois)), *sampling_arguments(maps.batch, channels, pooling, slots))
    else:
        per_thread = channels_per_atomic(grad, gradients, maps, pooling)
        layout = launch.layout(maps.channels_last, per_thread)
        expression = f"roi::roi_align_backward_atomic<{types}, {layout}, {sensitive}>"
        capacity, shared_bytes = taps_memory(maps, pooling, launch.number_bytes(grad.dtype))
        items = launch.ceil_divide(channels, per_thread) * pooling.bins
        grid = launch.per_box(len(rois), items, shared_bytes)
        options = sampling_arguments(maps.batch, channels, pooling, capacity)
    launch.run("roi_align", expression, grid, (levels, *pointers, *options), rois.device)
    return [x.to(grad.dtype) for x in gradients]


def sampling_arguments(batch: int, channels: int, pooling: Pooling, last: int) -> tuple[object, ...]:
    """What all kernels of RoIAlign take after their tensors: `last` is what the kernel has of its own."""
    bins = pooling.pooled_height, pooling.pooled_width
    return launch.int32(batch, channels, *bins, pooling.sampling_ratio, pooling.aligned, last)


def check_cells(maps: Maps) -> None:
    if min(min(size) for size in maps.sizes) < 1:
        raise launch.KernelLimitError(f"the CUDA kernels interpolate in maps of at least one cell, got {maps.sizes}")


def taps_memory(maps: Maps, pooling: Pooling, number_bytes: int) -> tuple[int, int]:
    """How many taps share_taps() may need for its two axes, and the shared memory that it then takes."""
    cells, bins = (max(maps.heights), max(maps.widths)), (pooling.pooled_height, pooling.pooled_width)
    ratio = pooling.sampling_ratio
    capacity = 0
    for count, axis_bins in zip(cells, bins, strict=True):
        most = count + 2 * axis_bins + MORE_TAPS
        capacity += min(most, 2 * ratio * axis_bins) if ratio > 0 else most
    header, tap = 2 * number_bytes, 2 * number_bytes
    shared_bytes = header + launch.RANGE_BYTES * sum(bins) + tap * capacity
    launch.check_shared(shared_bytes, f"{capacity} weights for maps of {cells[0]} x {cells[1]}")
    return capacity, shared_bytes


def channels_per_atomic(grad: Tensor, gradients: Sequence[Tensor], maps: Maps, pooling: Pooling) -> int:
    """Channels that a thread of the atomic backward takes: four with one addition, where the device has such."""
    if pooling.position_sensitive:
        return 1
    if not maps.channels_last:
        return launch.CHANNELS_PER_THREAD
    whole = grad.shape[1] % VECTOR_ATOMICS == 0
    vectors = gradients[0].dtype == torch.float32 and whole and has_vector_atomics(grad.device)
    aligned = all(x.data_ptr() % launch.VECTOR_BYTES == 0 for x in (grad, *gradients))
    return VECTOR_ATOMICS if vectors and aligned else 1


@lru_cache
def has_vector_atomics(device: torch.device) -> bool:
    """Whether atomic_add() of roi_common.cuh is one instruction for four numbers."""
    return torch.cuda.get_device_capability(device) >= (9, 0)

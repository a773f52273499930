"""RoIAlign, position-sensitive or not: launches of roi_align.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from roi._outputs import empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.cupy_path import access, launch
from roi.cupy_path.transpose_launches import to_channels_last, to_contiguous

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

    channels = output.shape[1]
    capacity, taps_bytes = taps_memory(shape, pooling, launch.number_bytes(output.dtype))
    work = access.Work(len(rois), channels, pooling.bins, taps_bytes, most=channels)
    if pooling.position_sensitive:
        how = access.as_they_lie(work, shape.channels_last, 1)
    else:
        maps, how = access.of_maps(work, maps, (output.element_size(),))
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {how.layout}"
    expression = f"roi::roi_align<{types}, {launch.flag(pooling.position_sensitive)}>"
    arguments = (
        launch.levels(maps, pooling, rois.dtype),
        rois.data_ptr(),
        output.data_ptr(),
        *sampling_arguments(shape.batch, channels, pooling, capacity),
        *launch.int32(how.turn),
    )
    launch.run("roi_align", expression, how.grid(work), arguments, rois.device)
    return output


def align_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """Gradients of `align` with respect to the maps, of Tensor[K, C, pooled_height, pooled_width] `grad`."""
    check_cells(maps)
    launch.check_limits(maps, pooling)
    launch.feature_type(grad.dtype)
    rois, grad = rois.contiguous(), grad.contiguous(memory_format=maps.layout)
    if grad.numel() == 0 or maps.batch == 0:
        return [torch.zeros_like(x) for x in empty_gradients(grad, maps)]
    channels = grad.shape[1]
    work = access.Work(len(rois), channels, pooling.bins, 0, most=channels)
    may_turn = not (maps.channels_last or pooling.position_sensitive)
    through_last, last = may_turn and access.copy_pays(work, maps, access.ADDITIONS), maps._replace(channels_last=True)
    if torch.are_deterministic_algorithms_enabled():
        if not through_last:
            return gather(grad, rois, pooling, maps)
        return [to_contiguous(x, x.dtype) for x in gather(to_channels_last(grad), rois, pooling, last)]

    capacity, taps_bytes = taps_memory(maps, pooling, launch.number_bytes(grad.dtype))
    work = work._replace(used_bytes=taps_bytes)
    how, target = access.as_they_lie(work, maps.channels_last, channels_per_atomic(grad, maps, pooling)), maps
    if through_last:
        turned = access.transposed(work, channels_per_atomic(grad, last, pooling), (grad.element_size(),))
        how, target = (turned, last) if turned else (how, maps)
    gradients = launch.zeros(grad, target)
    types = f"{launch.FEATURES[grad.dtype]}, {launch.COORDINATES[rois.dtype]}, {how.layout}"
    expression = f"roi::roi_align_backward_atomic<{types}, {launch.flag(pooling.position_sensitive)}>"
    arguments = (
        launch.levels(gradients, pooling, rois.dtype),
        grad.data_ptr(),
        rois.data_ptr(),
        *sampling_arguments(maps.batch, channels, pooling, capacity),
        *launch.int32(how.turn),
    )
    launch.run("roi_align", expression, how.grid(work), arguments, rois.device)
    if how.turned:
        return [to_contiguous(x, grad.dtype) for x in gradients]
    return [x.to(grad.dtype) for x in gradients]


def gather(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """A thread for each cell, in an order that is always the same."""
    gradients = empty_gradients(grad, maps)
    types = f"{launch.FEATURES[grad.dtype]}, {launch.COORDINATES[rois.dtype]}, {launch.flag(maps.channels_last)}"
    expression = f"roi::roi_align_backward_gather<{types}, {launch.flag(pooling.position_sensitive)}>"
    weight_bytes = launch.number_bytes(grad.dtype)
    grid, slots = launch.per_cell(maps, pooling, CANDIDATE_BYTES[rois.dtype], weight_bytes)
    arguments = (
        launch.levels(gradients, pooling, rois.dtype),
        grad.data_ptr(),
        rois.data_ptr(),
        *launch.int32(len(rois)),
        *sampling_arguments(maps.batch, grad.shape[1], pooling, slots),
    )
    launch.run("roi_align", expression, grid, arguments, rois.device)
    return gradients


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


def channels_per_atomic(grad: Tensor, maps: Maps, pooling: Pooling) -> int:
    """Channels that a thread of the atomic backward takes: four with one addition, where the device has such."""
    if pooling.position_sensitive:
        return 1
    if not maps.channels_last:
        return launch.CHANNELS_PER_THREAD
    whole = grad.shape[1] % VECTOR_ATOMICS == 0 and grad.data_ptr() % launch.VECTOR_BYTES == 0
    vectors = grad.dtype != torch.float64 and has_vector_atomics(grad.device)
    return VECTOR_ATOMICS if vectors and whole else 1


@lru_cache
def has_vector_atomics(device: torch.device) -> bool:
    """Whether atomic_add() of roi_common.cuh is one instruction for four numbers."""
    return torch.cuda.get_device_capability(device) >= (9, 0)

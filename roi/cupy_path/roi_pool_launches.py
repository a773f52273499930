"""RoI max pooling: launches of roi_pool.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roi._outputs import argmax_dtype, empty_argmax, empty_pooled
from roi._problem import Maps, Pooling
from roi.cupy_path import launch

CANDIDATE_BYTES = 24  # Candidate<Extent>


def max_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """RoI max pooling of each box from its level of a pyramid: Tensor[K, C, pooled_height, pooled_width]."""
    shape = Maps.of(maps)
    launch.check_limits(shape, pooling)
    output = empty_pooled(maps[0], len(rois), shape, pooling)
    pool(maps, rois, pooling, output, output.new_empty(0, dtype=argmax_dtype(shape)))
    return output


def max_pool_with_argmax(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """`max_pool`, and where each maximum is: the cell y·W + x, of the box's level, of the first one in the bin.

    Of NaN the last; -1 where the bin is empty. An integer tensor of the output's shape and memory format.
    """
    shape = Maps.of(maps)
    launch.check_limits(shape, pooling)
    output = empty_pooled(maps[0], len(rois), shape, pooling)
    argmax = empty_argmax(output, len(rois), shape, pooling).contiguous(memory_format=shape.layout)
    pool(maps, rois, pooling, output, argmax)
    return output, argmax


def pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling, output: Tensor, argmax: Tensor) -> None:
    """Fills `output`, and `argmax` where it is not empty."""
    shape = Maps.of(maps)
    feature = launch.feature_type(maps[0].dtype)
    if output.numel() == 0:
        return
    maps, rois = launch.of_one_format(maps), rois.contiguous()
    per_thread = launch.lanes(maps) if shape.channels_last else launch.CHANNELS_PER_THREAD
    wanted = argmax.numel() > 0
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {launch.INDICES[argmax.dtype]}, {launch.flag(wanted)}"
    expression = f"roi::roi_pool<{types}, {launch.layout(shape.channels_last, per_thread)}>"
    pointers = (rois.data_ptr(), output.data_ptr(), argmax.data_ptr() if wanted else 0)
    sizes = launch.int32(shape.batch, shape.channels, pooling.pooled_height, pooling.pooled_width)
    arguments = (launch.levels(maps, pooling, rois.dtype), *pointers, *sizes)
    shared_bytes = launch.RANGE_BYTES * (pooling.pooled_height + pooling.pooled_width)
    grid = launch.per_box(len(rois), launch.ceil_divide(shape.channels, per_thread) * pooling.bins, shared_bytes)
    launch.run("roi_pool", expression, grid, arguments, rois.device)


def max_gather_adjoint(grad: Tensor, rois: Tensor, argmax: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """The gradient of max pooling: each bin's gradient is added at the bin's argmax."""
    launch.check_limits(maps, pooling)
    feature = launch.feature_type(grad.dtype)
    rois, grad, argmax = (rois.contiguous(), *(x.contiguous(memory_format=maps.layout) for x in (grad, argmax)))
    gradients = launch.gradient_maps(grad, maps)
    if grad.numel() == 0 or not any(x.numel() for x in gradients):
        return [x.to(grad.dtype) for x in gradients]

    index = launch.INDICES[argmax.dtype]
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {index}, {launch.flag(maps.channels_last)}"
    levels = launch.levels(gradients, pooling, rois.dtype)
    pointers = (grad.data_ptr(), rois.data_ptr(), argmax.data_ptr())
    sizes = launch.int32(maps.batch, maps.channels, pooling.pooled_height, pooling.pooled_width)
    if torch.are_deterministic_algorithms_enabled():
        expression = f"roi::roi_pool_backward_gather<{types}>"
        grid, slots = launch.per_cell(maps, pooling, CANDIDATE_BYTES, 0)
        arguments = (levels, *pointers, *launch.int32(len(rois)), *sizes, *launch.int32(slots))
    else:
        expression = f"roi::roi_pool_backward_atomic<{types}>"
        grid = launch.per_box(len(rois), maps.channels * pooling.bins, 0)
        arguments = (levels, *pointers, *sizes)
    launch.run("roi_pool", expression, grid, arguments, rois.device)
    return [x.to(grad.dtype) for x in gradients]

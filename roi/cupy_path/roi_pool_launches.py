"""RoI max pooling: launches of roi_pool.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roi._outputs import argmax_dtype, empty_argmax, empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.cupy_path import access, launch
from roi.cupy_path.transpose_launches import to_channels_last, to_contiguous

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
    rois = rois.contiguous()
    wanted = argmax.numel() > 0
    ranges = launch.RANGE_BYTES * (pooling.pooled_height + pooling.pooled_width)
    most = access.LINES_BYTES // output.element_size()
    work = access.Work(len(rois), shape.channels, pooling.bins, ranges, most)
    tile = [x.element_size() for x in ((output, argmax) if wanted else (output,))]
    maps, how = access.of_maps(work, launch.of_one_format(maps), tile)
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}, {launch.INDICES[argmax.dtype]}, {launch.flag(wanted)}"
    expression = f"roi::roi_pool<{types}, {how.layout}>"
    pointers = (rois.data_ptr(), output.data_ptr(), argmax.data_ptr() if wanted else 0)
    sizes = launch.int32(shape.batch, shape.channels, pooling.pooled_height, pooling.pooled_width, how.turn)
    arguments = (launch.levels(maps, pooling, rois.dtype), *pointers, *sizes)
    launch.run("roi_pool", expression, how.grid(work), arguments, rois.device)


def max_gather_adjoint(grad: Tensor, rois: Tensor, argmax: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """The gradient of max pooling: each bin's gradient is added at the bin's argmax."""
    launch.check_limits(maps, pooling)
    launch.feature_type(grad.dtype)
    rois, grad, argmax = (rois.contiguous(), *(x.contiguous(memory_format=maps.layout) for x in (grad, argmax)))
    if grad.numel() == 0 or maps.batch == 0 or not any(height * width for height, width in maps.sizes):
        return [torch.zeros_like(x) for x in empty_gradients(grad, maps)]
    most = access.LINES_BYTES // grad.element_size()
    work = access.Work(len(rois), maps.channels, pooling.bins, 0, most)
    last = maps._replace(channels_last=True)
    through_last = not maps.channels_last and access.copy_pays(work, maps, access.READS)
    if torch.are_deterministic_algorithms_enabled():
        if not through_last:
            return gather(grad, rois, argmax, pooling, maps)
        gradients = gather(to_channels_last(grad), rois, to_channels_last(argmax), pooling, last)
        return [to_contiguous(x, x.dtype) for x in gradients]

    how, target = access.as_they_lie(work, maps.channels_last, 1), maps
    if through_last:
        turned = access.transposed(work, 1, (grad.element_size(), argmax.element_size()))
        how, target = (turned, last) if turned else (how, maps)
    gradients = launch.zeros(grad, target)
    types = f"{launch.FEATURES[grad.dtype]}, {launch.COORDINATES[rois.dtype]}, {launch.INDICES[argmax.dtype]}"
    arguments = (
        launch.levels(gradients, pooling, rois.dtype),
        *(x.data_ptr() for x in (grad, rois, argmax)),
        *launch.int32(maps.batch, maps.channels, pooling.pooled_height, pooling.pooled_width, how.turn),
    )
    expression = f"roi::roi_pool_backward_atomic<{types}, {how.layout}>"
    launch.run("roi_pool", expression, how.grid(work), arguments, rois.device)
    if how.turned:
        return [to_contiguous(x, grad.dtype) for x in gradients]
    return [x.to(grad.dtype) for x in gradients]


def gather(grad: Tensor, rois: Tensor, argmax: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """A thread for each cell, in an order that is always the same."""
    gradients = empty_gradients(grad, maps)
    types = f"{launch.FEATURES[grad.dtype]}, {launch.COORDINATES[rois.dtype]}, {launch.INDICES[argmax.dtype]}"
    expression = f"roi::roi_pool_backward_gather<{types}, {launch.flag(maps.channels_last)}>"
    grid, slots = launch.per_cell(maps, pooling, CANDIDATE_BYTES, 0)
    arguments = (
        launch.levels(gradients, pooling, rois.dtype),
        *(x.data_ptr() for x in (grad, rois, argmax)),
        *launch.int32(len(rois), maps.batch, maps.channels, pooling.pooled_height, pooling.pooled_width, slots),
    )
    launch.run("roi_pool", expression, grid, arguments, rois.device)
    return gradients

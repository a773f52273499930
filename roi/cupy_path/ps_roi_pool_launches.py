"""Position-sensitive RoI average pooling: launches of ps_roi_pool.cu, which take one map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roi._outputs import empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.cupy_path import access, launch

CANDIDATE_BYTES = 24  # Candidate<Extent>


def average_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """The mean of a bin's cells: Tensor[K, C, pooled_height, pooled_width]."""
    shape = Maps.of(maps)
    launch.check_limits(shape, pooling)
    feature = launch.feature_type(maps[0].dtype)
    maps, rois = launch.of_one_format(maps), rois.contiguous()
    output = empty_pooled(maps[0], len(rois), shape, pooling)
    if output.numel() == 0:
        return output

    how = access.Access(launch.layout(shape.channels_last, 1), 1, 0, ranges_bytes(pooling))
    work = access.Work(len(rois), output.shape[1], pooling.bins, how.shared_bytes, most=output.shape[1])
    expression = f"roi::ps_roi_pool<{feature}, {launch.COORDINATES[rois.dtype]}, {how.layout}>"
    sizes = launch.int32(shape.batch, *output.shape[1:])
    arguments = (launch.levels(maps, pooling, rois.dtype), rois.data_ptr(), output.data_ptr(), *sizes)
    launch.run("ps_roi_pool", expression, how.grid(work), arguments, rois.device)
    return output


def average_pool_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """Gradients of `average_pool` with respect to the maps, of Tensor[K, C, pooled_height, pooled_width] `grad`."""
    launch.check_limits(maps, pooling)
    feature = launch.feature_type(grad.dtype)
    rois, grad = rois.contiguous(), grad.contiguous(memory_format=maps.layout)
    if grad.numel() == 0 or min(maps.batch, *maps.sizes[0]) == 0:
        return [torch.zeros_like(x) for x in empty_gradients(grad, maps)]

    ordered = torch.are_deterministic_algorithms_enabled()
    gradients = empty_gradients(grad, maps) if ordered else launch.zeros(grad, maps)
    types = f"{feature}, {launch.COORDINATES[rois.dtype]}"
    levels, pointers = launch.levels(gradients, pooling, rois.dtype), (grad.data_ptr(), rois.data_ptr())
    sizes = launch.int32(maps.batch, *grad.shape[1:])
    if ordered:
        expression = f"roi::ps_roi_pool_backward_gather<{types}, {launch.flag(maps.channels_last)}>"
        grid, slots = launch.per_cell(maps, pooling, CANDIDATE_BYTES, launch.number_bytes(grad.dtype))
        arguments = (levels, *pointers, *launch.int32(len(rois)), *sizes, *launch.int32(slots))
    else:
        how = access.Access(launch.layout(maps.channels_last, 1), 1, 0, ranges_bytes(pooling))
        expression = f"roi::ps_roi_pool_backward_atomic<{types}, {how.layout}>"
        work = access.Work(len(rois), grad.shape[1], pooling.bins, how.shared_bytes, most=grad.shape[1])
        grid = how.grid(work)
        arguments = (levels, *pointers, *sizes)
    launch.run("ps_roi_pool", expression, grid, arguments, rois.device)
    return [x.to(grad.dtype) for x in gradients]


def ranges_bytes(pooling: Pooling) -> int:
    """Shared memory of the bins' ranges, PH rows and PW columns: of share_bins() in roi_bins.cuh."""
    return launch.RANGE_BYTES * (pooling.pooled_height + pooling.pooled_width)

"""torchvision's operators, for the maps of a pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from roi._outputs import argmax_dtype, empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.torchvision_path.levels import OnLevel, assign
from roi.torchvision_path.problem import check_deterministic, check_limits

PoolLevel = Callable[[Tensor, OnLevel, Pooling], tuple[Tensor, ...]]
# (gradient of the bins, boxes, pooling, (N, C, H, W)) -> the map's gradient
SpreadLevel = Callable[[Tensor, OnLevel, Pooling, Sequence[int]], Tensor]


def align(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """RoIAlign: the mean of a bin's bilinearly interpolated samples. Tensor[K, C, pooled_height, pooled_width]."""
    return pool(maps, rois, pooling, align_level)[0]


def align_level(map_: Tensor, own: OnLevel, pooling: Pooling) -> tuple[Tensor, ...]:
    bins = bins_of(own, pooling)
    if pooling.position_sensitive:
        output, _ = operators().ps_roi_align(map_, own.rois, *bins, pooling.sampling_ratio)
        return (output,)
    return (operators().roi_align(map_, own.rois, *bins, pooling.sampling_ratio, pooling.aligned),)


def align_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """Gradients of `align` with respect to the maps, of Tensor[K, C, pooled_height, pooled_width] `grad`."""
    return spread(grad, rois, pooling, maps, align_level_adjoint)


def align_level_adjoint(grad: Tensor, own: OnLevel, pooling: Pooling, shape: Sequence[int]) -> Tensor:
    bins, sampling = bins_of(own, pooling), pooling.sampling_ratio
    if pooling.position_sensitive:
        mapping = bin_channels(grad)
        gradient: Tensor = operators()._ps_roi_align_backward(grad, own.rois, mapping, *bins, sampling, *shape)
    else:
        gradient = operators()._roi_align_backward(grad, own.rois, *bins, *shape, sampling, pooling.aligned)
    return gradient


def average_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """The mean of a bin's cells. Tensor[K, C, pooled_height, pooled_width]."""
    return pool(maps, rois, pooling, average_level)[0]


def average_level(map_: Tensor, own: OnLevel, pooling: Pooling) -> tuple[Tensor, ...]:
    output, _ = operators().ps_roi_pool(map_, own.rois, *bins_of(own, pooling))
    return (output,)


def max_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """Tensor[K, C, pooled_height, pooled_width]: the maximum of each bin, 0 where it is empty."""
    return pool(maps, rois, pooling, max_level)[0]


def max_pool_with_argmax(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """`max_pool`, and where each maximum is: the cell y·W + x, of the box's level; -1 where the bin is empty."""
    output, argmax = pool(maps, rois, pooling, max_level)
    return output, argmax


def max_level(map_: Tensor, own: OnLevel, pooling: Pooling) -> tuple[Tensor, ...]:
    output, argmax = operators().roi_pool(map_, own.rois, *bins_of(own, pooling))
    return output, argmax


def max_gather_adjoint(grad: Tensor, rois: Tensor, argmax: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """The gradient of max pooling: each bin's gradient is added at the bin's argmax."""

    def spread_level(grad: Tensor, own: OnLevel, pooling: Pooling, shape: Sequence[int]) -> Tensor:
        cells = own.take(argmax).to(torch.int32).contiguous()
        gradient: Tensor = operators()._roi_pool_backward(grad, own.rois, cells, *bins_of(own, pooling), *shape)
        return gradient

    return spread(grad, rois, pooling, maps, spread_level)


def pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling, level: PoolLevel) -> list[Tensor]:
    """`level` for the boxes of each map, and the results joined: the output, and the argmax where there is one."""
    shape = Maps.of(maps)
    check_limits(shape, pooling, len(rois), maps[0].dtype, rois.dtype)
    if shape.batch * shape.channels * len(rois) == 0:
        output = empty_pooled(maps[0], len(rois), shape, pooling).fill_(torch.nan)
        return [output, torch.full_like(output, -1, dtype=argmax_dtype(shape))]
    assigned = assign(rois, shape.batch, pooling)
    parts = [level(maps[own.level].to(rois.dtype).contiguous(), own, pooling) for own in assigned.levels]
    outputs, *cells = (list(part) for part in zip(*parts, strict=True))
    output = assigned.join(outputs, 0).to(maps[0].dtype, memory_format=shape.layout)
    return [output, *(assigned.join(argmax, -1, -1).to(argmax_dtype(shape)) for argmax in cells)]


def spread(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps, level: SpreadLevel) -> list[Tensor]:
    """The gradients that `level` gives for each map."""
    check_deterministic()
    check_limits(maps, pooling, len(rois), grad.dtype, rois.dtype)
    if maps.batch * grad.numel() == 0:
        return [gradient.zero_() for gradient in empty_gradients(grad, maps)]
    assigned = assign(rois, maps.batch, pooling)
    terms = grad.to(rois.dtype).masked_fill(~assigned.valid, 0)
    gradients = []
    for own in assigned.levels:
        gradient = level(own.take(terms).contiguous(), own, pooling, maps.shapes[own.level])
        gradients.append(gradient.to(grad.dtype, memory_format=maps.layout))
    return gradients


def bins_of(own: OnLevel, pooling: Pooling) -> tuple[float, int, int]:
    """The scale and the output size, as all of torchvision's operators take them."""
    return pooling.scales[own.level], pooling.pooled_height, pooling.pooled_width


def bin_channels(grad: Tensor) -> Tensor:
    """The channel of the map that each element of Tensor[K, C, h, w] reads, of position-sensitive pooling."""
    bins = grad[0].numel()
    return torch.arange(bins, dtype=torch.int32, device=grad.device).view_as(grad[0]).expand_as(grad).contiguous()


def operators() -> Any:
    return torch.ops.torchvision

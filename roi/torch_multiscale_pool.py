"""RoI max pooling on a pyramid: the pure-torch implementation, level by level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roi.layout import argmax_format, empty_pooled, empty_pyramid_argmax
from roi.levels import map_levels
from roi.torch_pool import roi_pool, roi_pool_backward, roi_pool_gather


def multiscale_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    canonical_scale: int,
    canonical_level: int,
    pooled_height: int,
    pooled_width: int,
    with_argmax: bool,
) -> tuple[Tensor, Tensor]:
    """`roi_pool` of each RoI on its own level of a pyramid.

    Args:
        features: Tensor[N, C, Hl, Wl] of each level, finest first.
        scales: of each level, cells per unit of the boxes.
        canonical_scale, canonical_level: as `roi.levels.map_levels` has them.
        rois, pooled_height, pooled_width, with_argmax: as in `roi_pool`.

    Returns:
        output: Tensor[K, C, pooled_height, pooled_width] in the memory format of the first level.
        argmax: the same shape, integer: cells of the RoI's own level; Tensor[0] where it was not asked for.
    """
    output = empty_pooled(features[0], len(rois), pooled_height, pooled_width)
    argmax = empty_pyramid_argmax(features, output, with_argmax, argmax_format(features[0]))
    level = map_levels(rois, scales, canonical_scale, canonical_level)
    for index, (map_, scale) in enumerate(zip(features, scales, strict=True)):
        own = (level == index).nonzero().flatten()
        if len(own):
            values, cells = roi_pool(map_, rois[own], scale, pooled_height, pooled_width, with_argmax)
            output[own] = values
            if with_argmax:
                argmax[own] = cells.to(argmax.dtype)
    return output, argmax


def multiscale_roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    scales: Sequence[float],
    canonical_scale: int,
    canonical_level: int,
    batch: int,
    channels: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """Gradients of `multiscale_roi_pool` with respect to the levels: Tensor[N, C, Hl, Wl] each."""
    level = map_levels(rois, scales, canonical_scale, canonical_level)
    gradients = []
    for index, (height, width) in enumerate(zip(heights, widths, strict=True)):
        own = (level == index).nonzero().flatten()
        shape = batch, channels, height, width
        gradients.append(roi_pool_backward(grad[own], rois[own], argmax[own], scales[index], *shape, channels_last))
    return gradients


def multiscale_roi_pool_gather(
    features: Sequence[Tensor],
    rois: Tensor,
    argmax: Tensor,
    scales: Sequence[float],
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    """The values of `features` at `argmax`, and 0 where there is none: the pooling of tangents.

    It is the adjoint of `multiscale_roi_pool_backward`, and so its gradient. Built of differentiable operators.
    """
    level = map_levels(rois, scales, canonical_scale, canonical_level)
    places = [(level == index).nonzero().flatten() for index in range(len(features))]
    parts = [roi_pool_gather(map_, rois[own], argmax[own]) for map_, own in zip(features, places, strict=True)]
    return torch.cat(parts)[torch.cat(places).argsort()]

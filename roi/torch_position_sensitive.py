"""Position-sensitive pooling by `embedding_bag`: the pure-torch implementations.

Each bin has channels of its own, so that the table which is summed over has a row for every cell and bin.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from roi.bin_weights import Array, BinWeights, CellBins
from roi.bins import bin_edges, roi_windows
from roi.layout import empty_gradient, empty_position_sensitive, format_of
from roi.torch_align import align_bins, checked, whole_grid
from roi.weighted_sums import Grid, pool, pool_adjoint

# (boxes, pooled_height, pooled_width, height, width) -> the bins of those boxes
BinsOf = Callable[[Array, int, int, int, int], BinWeights]


def ps_roi_pool(input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int) -> Tensor:
    """Position-sensitive average pooling (Dai et al., R-FCN, 2016, equation 1).

    Args:
        input: Tensor[N, C·pooled_height·pooled_width, H, W], any floating-point dtype. Half precision is summed in
            float32.
        rois: Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64.
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.

    Returns:
        Tensor[K, C, pooled_height, pooled_width]; a row that is not finite or off the batch is NaN.
    """
    return means(input, rois, pooled_height, pooled_width, cell_bins(spatial_scale))


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
    """Gradient of `ps_roi_pool` with respect to its input, Tensor[batch, channels, height, width]: its adjoint."""
    return means_adjoint(grad, rois, (batch, channels, height, width), channels_last, cell_bins(spatial_scale))


def ps_roi_align(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int
) -> Tensor:
    """Position-sensitive RoIAlign (Li et al., Light-Head R-CNN, 2017, section 3.2); arguments as in `ps_roi_pool`.

    Args:
        sampling_ratio: samples of a bin's side; 0 or less: as many as it is cells long, rounded up.
    """
    return means(input, rois, pooled_height, pooled_width, centred_bins(spatial_scale, sampling_ratio))


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
    """Gradient of `ps_roi_align` with respect to its input, Tensor[batch, channels, height, width]: its adjoint."""
    bins_of = centred_bins(spatial_scale, sampling_ratio)
    return means_adjoint(grad, rois, (batch, channels, height, width), channels_last, bins_of)


def cell_bins(spatial_scale: float) -> BinsOf:
    """Bins of whole cells. A RoI ends before the cell of its second corner, the map before its last row and column."""

    def bins_of(boxes: Array, pooled_height: int, pooled_width: int, height: int, width: int) -> BinWeights:
        _, y, x, h, w = roi_windows(boxes, spatial_scale).T
        rows = bin_edges(y, np.maximum(h - 1, 1), pooled_height, height - 1)
        columns = bin_edges(x, np.maximum(w - 1, 1), pooled_width, width - 1)
        low, high = (np.concatenate(edges, axis=1) for edges in zip(rows, columns, strict=True))
        return CellBins(pooled_height, low, high)

    return bins_of


def centred_bins(spatial_scale: float, sampling_ratio: int) -> BinsOf:
    """RoIAlign's bins, cells having their values at their centres."""

    def bins_of(boxes: Array, pooled_height: int, pooled_width: int, height: int, width: int) -> BinWeights:
        return align_bins(boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, True, height, width)

    return bins_of


def means(input: Tensor, rois: Tensor, pooled_height: int, pooled_width: int, bins_of: BinsOf) -> Tensor:
    batch, _, height, width = input.shape
    output = empty_position_sensitive(input, len(rois), pooled_height, pooled_width)
    if output.numel() * batch == 0:  # with no image, no row is valid
        return output.fill_(torch.nan)
    boxes, invalid = checked(rois, batch)
    bins = bins_of(boxes, pooled_height, pooled_width, height, width)
    count, channels = pooled_height * pooled_width, output.shape[1]
    maps = input.reshape(batch, channels, count, height, width).permute(0, 3, 4, 2, 1)
    table = maps.to(torch.promote_types(input.dtype, torch.float32)).contiguous().view(-1, channels)
    pool(table, grid_of_bins(boxes, batch, height, width, count), bins, output, slice(0, len(boxes)))
    if invalid is not None:
        output[invalid] = torch.nan
    return output


def means_adjoint(
    grad: Tensor, rois: Tensor, shape: tuple[int, int, int, int], channels_last: bool, bins_of: BinsOf
) -> Tensor:
    batch, _, height, width = shape
    if grad.numel() * batch == 0:
        return empty_gradient(grad, shape, channels_last).zero_()
    boxes, invalid = checked(rois, batch)
    if invalid is not None:
        grad = grad.index_fill(0, invalid, 0)
    channels, pooled_height, pooled_width = grad.shape[1:]
    count = pooled_height * pooled_width
    bins = bins_of(boxes, pooled_height, pooled_width, height, width)
    grid = grid_of_bins(boxes, batch, height, width, count)
    cells = pool_adjoint(grad, grid, bins, torch.promote_types(grad.dtype, torch.float32))
    maps = cells.view(batch, height, width, count, channels).permute(0, 4, 3, 1, 2).to(grad.dtype)
    return maps.flatten(1, 2).contiguous(memory_format=format_of(channels_last))


def grid_of_bins(boxes: Array, batch: int, height: int, width: int, count: int) -> Grid:
    cells = whole_grid(boxes, batch, 1, height, width)
    return cells._replace(rows=cells.rows * count, bins=count)

"""RoIAlign on one map and on a pyramid by `embedding_bag`: the pure-torch implementations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from roi.bin_weights import Array, SampledBins, sampled_bins
from roi.layout import empty_gradient, empty_pooled, format_of, memory_format
from roi.levels import map_levels
from roi.weighted_sums import Grid, pool, pool_adjoint, pool_at_once

CELLS_PER_CROP = 64  # that are copied in the time that it takes to begin with a crop


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, 2017, section 3). Half precision is summed in float32.

    Args:
        input: Tensor[N, C, H, W], any floating-point dtype.
        rois: Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64.
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.
        sampling_ratio: samples of a bin's side; 0 or less: as many as it is cells long, rounded up.
        aligned: whether a cell's value is that at its centre, and not at its corner.

    Returns:
        Tensor[K, C, pooled_height, pooled_width]; a row that is not finite or off the batch is NaN.
    """
    output = empty_pooled(input, len(rois), pooled_height, pooled_width)
    if output.numel() * len(input) == 0:  # with no image, no row is valid
        return output.fill_(torch.nan)
    boxes, invalid = checked(rois, len(input))
    bins = align_bins(
        boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, input.shape[2], input.shape[3]
    )
    table, grid = table_of(input, boxes, bins)
    whole = None
    if memory_format(input) is torch.channels_last and table.dtype == input.dtype:
        whole = pool_at_once(table, grid, bins, pooled_height, pooled_width)
    if whole is None:
        pool(table, grid, bins, output)
    else:
        output = whole
    if invalid is not None:
        output[invalid] = torch.nan
    return output


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
    """Gradient of `roi_align` with respect to its input: its adjoint. Half precision is summed in float32.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width].
        rois, spatial_scale, sampling_ratio, aligned: those of the forward pass.
        batch, channels, height, width: shape of the forward pass's input.
        channels_last: the memory format of the result; otherwise it is contiguous.

    Returns:
        Tensor[N, C, H, W] of the dtype of `grad`.
    """
    shape = batch, channels, height, width
    if grad.numel() * batch == 0:
        return empty_gradient(grad, shape, channels_last).zero_()
    boxes, invalid = checked(rois, batch)
    if invalid is not None:
        grad = grad.index_fill(0, invalid, 0)
    pooled_height, pooled_width = grad.shape[2:]
    bins = align_bins(boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, height, width)
    return maps_of(grad, boxes, bins, shape, channels_last)


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    canonical_scale: int,
    canonical_level: int,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """`roi_align` of each RoI on its own level of a pyramid.

    Args:
        features: Tensor[N, C, Hl, Wl] of each level, finest first.
        scales: of each level, cells per unit of the boxes.
        canonical_scale, canonical_level: as `roi.levels.map_levels` has them.
        rois, pooled_height, pooled_width, sampling_ratio, aligned: as in `roi_align`.

    Returns:
        Tensor[K, C, pooled_height, pooled_width] in the memory format of the first level.
    """
    batch = len(features[0])
    output = empty_pooled(features[0], len(rois), pooled_height, pooled_width)
    if output.numel() * batch == 0:
        return output.fill_(torch.nan)
    boxes, invalid = checked(rois, batch)
    for level, places in places_by_level(boxes, scales, canonical_scale, canonical_level):
        own, map_ = boxes[places], features[level]
        args = pooled_height, pooled_width, sampling_ratio, aligned, map_.shape[2], map_.shape[3]
        bins = align_bins(own, scales[level], *args)
        table, grid = table_of(map_, own, bins)
        pool(table, grid, bins, output, places)
    if invalid is not None:
        output[invalid] = torch.nan
    return output


def multiscale_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    scales: Sequence[float],
    canonical_scale: int,
    canonical_level: int,
    sampling_ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """Gradients of `multiscale_roi_align` with respect to the levels, Tensor[N, C, Hl, Wl] each: its adjoint."""
    shapes = [(batch, channels, height, width) for height, width in zip(heights, widths, strict=True)]
    if grad.numel() * batch == 0:
        return [empty_gradient(grad, shape, channels_last).zero_() for shape in shapes]
    boxes, invalid = checked(rois, batch)
    if invalid is not None:
        grad = grad.index_fill(0, invalid, 0)
    gradients: list[Tensor | None] = [None] * len(shapes)
    for level, places in places_by_level(boxes, scales, canonical_scale, canonical_level):
        own, terms = boxes[places], grad[torch.from_numpy(places).to(grad.device)]
        args = terms.shape[2], terms.shape[3], sampling_ratio, aligned, heights[level], widths[level]
        gradients[level] = maps_of(terms, own, align_bins(own, scales[level], *args), shapes[level], channels_last)
    return [
        empty_gradient(grad, shape, channels_last).zero_() if gradient is None else gradient
        for gradient, shape in zip(gradients, shapes, strict=True)
    ]


def align_bins(
    rois: Array,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    height: int,
    width: int,
) -> SampledBins:
    offset, smallest = (0.5, None) if aligned else (0.0, 1.0)
    sides = pooled_height, pooled_width
    return sampled_bins(rois, spatial_scale, *sides, sampling_ratio, offset, smallest, height, width)


def checked(rois: Tensor, batch: int) -> tuple[Array, Tensor | None]:
    """`rois` on the host, with zeros for those that are not valid, and the indices of these; None if there is none."""
    boxes = rois.detach().cpu().numpy()
    valid = np.isfinite(boxes).all(axis=1) & (boxes[:, 0] >= 0) & (boxes[:, 0] < batch)
    if valid.all():
        return boxes, None
    return np.where(valid[:, None], boxes, 0), torch.from_numpy(np.flatnonzero(~valid)).to(rois.device)


def places_by_level(
    boxes: Array, scales: Sequence[float], canonical_scale: int, canonical_level: int
) -> Iterator[tuple[int, Array]]:
    """The levels that have boxes, and which these are."""
    level = map_levels(torch.from_numpy(boxes), scales, canonical_scale, canonical_level).numpy()
    for index in np.unique(level).tolist():
        yield index, np.flatnonzero(level == index)


def table_of(input: Tensor, rois: Array, bins: SampledBins) -> tuple[Tensor, Grid]:
    """The cells of the maps, or of those crops that the RoIs need, as rows; float32 or float64."""
    batch, channels, height, width = input.shape
    dtype = torch.promote_types(input.dtype, torch.float32)
    if input.dtype == dtype and memory_format(input) is torch.channels_last:
        return input.permute(0, 2, 3, 1).view(-1, channels), whole_grid(rois, batch, height, width)
    grid = crops_grid(bins, batch) or whole_grid(rois, batch, height, width)
    table = input.new_empty((grid.rows, channels), dtype=dtype)
    if grid.window is None:
        table.view(batch, height, width, channels).copy_(input.permute(0, 2, 3, 1))
    else:
        for rows, crop in crops(table, input, rois, grid):
            rows.copy_(crop)
    return table, grid


def maps_of(
    grad: Tensor, rois: Array, bins: SampledBins, shape: tuple[int, int, int, int], channels_last: bool
) -> Tensor:
    """The adjoint of pooling from a Tensor[*shape]: of the bins' gradients, Tensor[K, C, h, w]."""
    batch, channels, height, width = shape
    dtype, layout = torch.promote_types(grad.dtype, torch.float32), format_of(channels_last)
    grid = crops_grid(bins, batch) or whole_grid(rois, batch, height, width)
    cells = pool_adjoint(grad, grid, bins, dtype)
    if grid.window is None:
        maps = cells.view(batch, height, width, channels).permute(0, 3, 1, 2)
    else:
        maps = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout).zero_()
        for rows, crop in crops(cells, maps, rois, grid):
            crop.add_(rows)
    return maps.to(grad.dtype).contiguous(memory_format=layout)


def whole_grid(rois: Array, batch: int, height: int, width: int) -> Grid:
    start = rois[:, 0].astype(np.int64) * (height * width)
    return Grid(start, np.full_like(start, width), batch * height * width)


def crops_grid(bins: SampledBins, batch: int) -> Grid | None:
    """A grid with a crop of its own for each RoI; None where these are more work than the maps."""
    cells = batch * float(bins.limits[0] * bins.limits[-1])
    if CELLS_PER_CROP * len(bins.begin) > cells:
        return None
    first, last = bins.window()
    sides = last - first + 1
    ends = sides.prod(axis=1).cumsum()
    rows = int(ends[-1])
    if 2 * rows + CELLS_PER_CROP * len(ends) > cells:
        return None
    stride = sides[:, 1]
    start = ends - sides[:, 0] * stride - first[:, 0] * stride - first[:, 1]
    return Grid(start, stride, rows, (first, last))


def crops(table: Tensor, maps: Tensor, rois: Array, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every RoI its rows of Tensor[rows, C] `table` and its crop of `maps`: Tensor[h, w, C] each."""
    assert grid.window is not None
    row = 0
    corners = zip(*(side.tolist() for side in grid.window), strict=True)
    for image, ((y, x), (bottom, right)) in zip(rois[:, 0].astype(int).tolist(), corners, strict=True):
        crop = maps[image, :, y : bottom + 1, x : right + 1].permute(1, 2, 0)
        end = row + crop.shape[0] * crop.shape[1]
        yield table[row:end].view(crop.shape), crop
        row = end

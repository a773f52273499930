"""RoIAlign on one map and on a pyramid by `embedding_bag`: the pure-torch implementations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from roi.bin_weights import Array, Rows, SampledBins, sampled_bins
from roi.layout import empty_gradient, empty_pooled, format_of, memory_format
from roi.levels import map_levels
from roi.weighted_sums import Grid, parts_of, pool, pool_adjoint, pool_at_once

CELLS_PER_CROP = 32  # that are copied in the time that it takes to begin with a crop
CROP_VALUES = 2**19  # of the crops of a few RoIs, each its own
BAND_VALUES = 2**23  # of a crop that many RoIs share
CHANNELS_AT_ONCE = 32  # of a large crop: as many planes as the cache can read from together


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
    whole = None
    if as_it_is(input):
        table, grid = input.permute(0, 2, 3, 1).view(-1, input.shape[1]), whole_grid(boxes, *input.shape)
        whole = pool_at_once(table, grid, bins, pooled_height, pooled_width)
    if whole is None:
        for rois_of_table, table, grid in tables(input, boxes, bins):
            pool(table, grid, bins[rois_of_table], output, rois_of_table)
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
        for rois_of_table, table, grid in tables(map_, own, bins):
            pool(table, grid, bins[rois_of_table], output, places[rois_of_table])
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


def as_it_is(input: Tensor) -> bool:
    """Whether the cells of the maps are rows of a table in memory."""
    return memory_format(input) is torch.channels_last and input.dtype in (torch.float32, torch.float64)


def tables(input: Tensor, rois: Array, bins: SampledBins) -> Iterator[tuple[Rows, Tensor, Grid]]:
    """The cells that the RoIs need, as rows, in float32 or float64: (RoIs, table, grid of those RoIs)."""
    channels, dtype = input.shape[1], torch.promote_types(input.dtype, torch.float32)
    if as_it_is(input):
        table = input.permute(0, 2, 3, 1).view(-1, channels)
        yield slice(0, len(rois)), table, whole_grid(rois, *input.shape)
        return
    for some, grid, crops in cropped(rois, bins, input.shape):
        table = input.new_empty((grid.rows, channels), dtype=dtype)
        for rows, crop in pairs(table, input, crops):
            step = CHANNELS_AT_ONCE if crop.numel() > CROP_VALUES else channels
            for first in range(0, channels, step):
                rows[..., first : first + step].copy_(crop[..., first : first + step])
        yield some, table, grid


def maps_of(
    grad: Tensor, rois: Array, bins: SampledBins, shape: tuple[int, int, int, int], channels_last: bool
) -> Tensor:
    """The adjoint of pooling from a Tensor[*shape]: of the bins' gradients, Tensor[K, C, h, w]."""
    batch, channels, height, width = shape
    dtype, layout = torch.promote_types(grad.dtype, torch.float32), format_of(channels_last)
    parts = list(cropped(rois, bins, shape))
    if channels_last and sum(grid.rows for _, grid, _ in parts) > batch * height * width / 2:
        cells = pool_adjoint(grad, whole_grid(rois, *shape), bins, dtype)
        return cells.view(batch, height, width, channels).permute(0, 3, 1, 2).to(grad.dtype)
    maps = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout).zero_()
    for some, grid, crops in parts:
        terms = grad[some] if isinstance(some, slice) else grad[torch.from_numpy(some).to(grad.device)]
        for rows, crop in pairs(pool_adjoint(terms, grid, bins[some], dtype), maps, crops):
            crop.add_(rows)
    return maps.to(grad.dtype)


def whole_grid(rois: Array, batch: int, channels: int, height: int, width: int) -> Grid:
    start = rois[:, 0].astype(np.int64) * (height * width)
    return Grid(start, np.full_like(start, width), batch * height * width)


class Crop(NamedTuple):
    """Rows y … bottom - 1, columns x … right - 1 of an image."""

    image: int
    y: int
    x: int
    bottom: int
    right: int


def cropped(
    rois: Array, bins: SampledBins, shape: tuple[int, int, int, int] | torch.Size
) -> Iterator[tuple[Rows, Grid, list[Crop]]]:
    """Parts of Tensor[*shape] that together have all cells which the RoIs need: (RoIs, grid of these, crops).

    In a part either every RoI has a crop of its own, one after the other, or all share one of whole rows: whatever is
    less work. So a part's memory is bounded, and the allocator can give it again: more than a few megabytes come from
    the system every time, which takes longer than to fill them.
    """
    _, channels, _, width = shape
    images = rois[:, 0].astype(np.int64)
    first, last = bins.window()
    bands = list(row_bands(images, first[:, 0], last[:, 0] + 1, max(1, BAND_VALUES // (width * channels))))
    sides = last - first + 1
    areas = sides.prod(axis=1)
    if areas.sum() + CELLS_PER_CROP * len(rois) < width * sum(bottom - y for _, _, y, bottom in bands):
        for some in parts_of(areas * channels, CROP_VALUES):
            ends, stride = areas[some].cumsum(), sides[some, 1]
            start = ends - areas[some] - first[some, 0] * stride - first[some, 1]
            corners = np.concatenate([images[some, None], first[some], last[some] + 1], axis=1)
            crops = [Crop(*corner) for corner in corners.tolist()]
            yield some, Grid(start, stride, int(ends[-1]), (first[some], last[some])), crops
    else:
        for own, image, y, bottom in bands:
            start = np.full(len(images[own]), -y * width)
            grid = Grid(start, np.full_like(start, width), (bottom - y) * width, (first[own], last[own]))
            yield own, grid, [Crop(image, y, 0, bottom, width)]


def row_bands(images: Array, first: Array, end: Array, most: int) -> Iterator[tuple[Rows, int, int, int]]:
    """Rows of an image that have all rows first … end - 1 of some RoIs: (RoIs, image, first row, end).

    They are `most`, or as many as one RoI takes.
    """
    for image in np.unique(images).tolist():
        own = np.flatnonzero(images == image)
        y, bottom = int(first[own].min()), int(end[own].max())
        if bottom - y <= most:
            yield own if len(own) < len(images) else slice(0, len(images)), image, y, bottom
            continue
        order = own[first[own].argsort(kind="stable")]
        begin, y, bottom = 0, int(first[order[0]]), 0
        for k, (own_first, own_end) in enumerate(zip(first[order].tolist(), end[order].tolist(), strict=True)):
            if k > begin and max(bottom, own_end) - y > max(most, bottom - y):
                yield np.sort(order[begin:k]), image, y, bottom
                begin, y, bottom = k, own_first, 0
            bottom = max(bottom, own_end)
        yield np.sort(order[begin:]), image, y, bottom


def pairs(table: Tensor, maps: Tensor, crops: list[Crop]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every crop its rows of Tensor[rows, C] `table` and its cells of `maps`: Tensor[h, w, C] each."""
    row = 0
    for image, y, x, bottom, right in crops:
        crop = maps[image, :, y:bottom, x:right].permute(1, 2, 0)
        end = row + crop.shape[0] * crop.shape[1]
        yield table[row:end].view(crop.shape), crop
        row = end

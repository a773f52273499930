"""The pure-torch implementations of the RoI operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d_with_indices

from roi.bins import clipped_side, empty_bins, roi_windows
from roi.boxes import valid_rows
from roi.layout import empty_argmax, empty_pooled, memory_format
from roi.range_max import roi_maxima, table_is_cheaper

CELLS_AT_ONCE = 2**18  # of the forward pass: what the indices of a chunk of RoIs address
VALUES_AT_ONCE = 2**21  # of the forward pass: what is gathered for one call of adaptive pooling
BINS_AT_ONCE = 2**16  # of the backward pass: their 64-bit positions stay in the cache


def roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling (Girshick, Fast R-CNN, 2015, section 2.1) by `adaptive_max_pool2d`, whose bins are RoIPool's.

    Its vectorised kernel for channels_last crops is what makes it fast, so the cells of each RoI are gathered in that
    format, and RoIs of one size are pooled together.

    Args:
        input: Tensor[N, C, H, W], any floating-point dtype.
        rois: Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64.
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.
        with_argmax: whether to keep what the gradient needs.

    Returns:
        output: Tensor[K, C, pooled_height, pooled_width]; a row that is not finite or off the batch is NaN.
        argmax: the same shape, integer: the cell y·W + x of the first maximum (of the last NaN where there is
            one), -1 for an empty bin; Tensor[0] where it was not asked for.
    """
    batch, _, height, width = input.shape
    output = empty_pooled(input, len(rois), pooled_height, pooled_width)
    argmax = empty_argmax(input, output, with_argmax)
    if output.numel() == 0:
        return output, argmax

    valid = valid_rows(rois, batch)
    windows = roi_windows(torch.where(valid[:, None], rois, 0), spatial_scale)
    if not with_argmax and table_is_cheaper(input, windows, pooled_height, pooled_width):
        output.copy_(roi_maxima(input, windows, pooled_height, pooled_width))
    else:
        pool_windows(input, windows, output, argmax)
    mark_empty(output, argmax, empty_bins(windows, pooled_height, pooled_width, height, width))
    if not valid.all():
        output[~valid] = torch.nan
        if with_argmax:
            argmax[~valid] = -1
    return output, argmax


def pool_windows(input: Tensor, windows: Tensor, output: Tensor, argmax: Tensor) -> None:
    """Fills `output` and, unless it is empty, `argmax`; what lies off the map is left for `mark_empty`.

    Adaptive pooling may see a window's outermost cells on the map again in the place of those off it: that changes
    neither a maximum nor where it is found.
    """
    _, channels, height, width = input.shape
    _, y, x, h, w = windows.unbind(1)
    rows = (y + h).clamp(max=height) - y.clamp(min=0)
    columns = (x + w).clamp(max=width) - x.clamp(min=0)
    meets = (rows > 0) & (columns > 0)
    whole = meets & (2 * h <= 3 * rows) & (2 * w <= 3 * columns)
    gather = gatherer(input, int((rows * columns)[meets].sum()))

    order = whole.nonzero().squeeze(1)
    order = order[(h[order] * (2 * width) + w[order]).argsort(stable=True)]  # windows of one size together
    for batches in chunked(windows[order], channels):
        first, last = batches[0][0], batches[-1][1]
        cells = window_cells(windows[order[first:last]], height, width)
        places = cells.remainder(height * width).to(argmax.dtype) if argmax.numel() else cells
        done = 0
        for start, stop, size_y, size_x in batches:
            some = slice(done, done + (stop - start) * size_y * size_x)
            done = some.stop
            crops = gather(cells[some]).view(stop - start, size_y, size_x, channels)
            maximum, found = pooled(crops, places[some], output.shape[2], output.shape[3], argmax.numel() > 0)
            output.index_copy_(0, order[start:stop], maximum)
            if argmax.numel():
                argmax.index_copy_(0, order[start:stop], found)

    for k in (meets & ~whole).nonzero().flatten().tolist():
        image, top, left, size_y, size_x = windows[k].tolist()
        down = clipped_side(top, size_y, output.shape[2], height)
        across = clipped_side(left, size_x, output.shape[3], width)
        rows, columns = (torch.tensor(side.cells, device=input.device) for side in (down, across))
        places = (rows[:, None] * width + columns).flatten()
        crops = gather(places + image * (height * width)).view(1, len(rows), len(columns), channels)
        target = output[k, :, down.bins, across.bins]
        maximum, found = pooled(crops, places, target.shape[1], target.shape[2], argmax.numel() > 0)
        target.copy_(maximum[0])
        if argmax.numel():
            argmax[k, :, down.bins, across.bins] = found[0].to(argmax.dtype)


def gatherer(input: Tensor, needed: int) -> Callable[[Tensor], Tensor]:
    """A function from cells (n·H + y)·W + x to their channels, Tensor[cells, C], when about `needed` are asked for."""
    batch, _, height, width = input.shape
    size = height * width
    if memory_format(input) is torch.contiguous_format and needed < batch * size:
        maps = input.flatten(2)  # to convert it all would be more work
        return lambda cells: maps[cells // size, :, cells % size]
    rows = input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(0, 2)
    return lambda cells: rows.index_select(0, cells)


def chunked(windows: Tensor, channels: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Windows sorted by size as batches (start, stop, height, width) of one size, in lists of bounded memory."""
    sizes, counts = torch.unique_consecutive(windows[:, 3:], return_counts=True, dim=0)
    chunk: list[tuple[int, int, int, int]] = []
    start = cells = 0
    for (height, width), count in zip(sizes.tolist(), counts.tolist(), strict=True):
        end, step = start + count, max(1, VALUES_AT_ONCE // (height * width * channels))
        while start < end:
            stop = min(start + step, end)
            chunk.append((start, stop, height, width))
            cells += (stop - start) * height * width
            start = stop
            if cells > CELLS_AT_ONCE:
                yield chunk
                chunk, cells = [], 0
    if chunk:
        yield chunk


def window_cells(windows: Tensor, height: int, width: int) -> Tensor:
    """The cells (n·H + y)·W + x of all windows, row by row; of one off the map the nearest on it."""
    image, y, x, h, w = windows.unbind(1)
    area = h * w
    window = torch.repeat_interleave(area)
    offset = torch.arange(len(window), device=windows.device) - (area.cumsum(0) - area)[window]
    columns = w[window]
    dy = offset // columns
    row = (y[window] + dy).clamp_(0, height - 1)
    column = (x[window] + offset - dy * columns).clamp_(0, width - 1)
    return (image[window] * height + row) * width + column


def pooled(crops: Tensor, places: Tensor, height: int, width: int, with_places: bool) -> tuple[Tensor, Tensor]:
    """Adaptive max pooling of Tensor[G, h, w, C] to Tensor[G, C, height, width], and the place of each maximum.

    `places` holds one for every cell of the crops.
    """
    maximum, index = adaptive_max_pool2d_with_indices(crops.permute(0, 3, 1, 2), (height, width))
    if not with_places:
        return maximum, places
    index = index.permute(0, 2, 3, 1)  # as it lies in memory: `take` would be three times as slow
    if len(crops) > 1:
        cells = crops.shape[1] * crops.shape[2]
        index = index + torch.arange(0, cells * len(crops), cells, device=crops.device).view(-1, 1, 1, 1)
    found = places.index_select(0, index.flatten()).view(index.shape)
    return maximum, found.permute(0, 3, 1, 2)


def mark_empty(output: Tensor, argmax: Tensor, empty: Tensor) -> None:
    """Puts 0 and -1 into the bins that are empty, Tensor[K, pooled_height, pooled_width] of bool."""
    all_empty, any_empty = empty.flatten(1).all(dim=1), empty.flatten(1).any(dim=1)
    for target, value in ((output, 0), (argmax, -1)):
        if target.numel() and any_empty.any():
            some = (any_empty & ~all_empty).nonzero().squeeze(1)
            target.index_fill_(0, all_empty.nonzero().squeeze(1), value)
            target[some] = target[some].masked_fill(empty[some][:, None], value)


def roi_pool_backward(
    grad: Tensor, rois: Tensor, argmax: Tensor, spatial_scale: float, batch: int, channels: int, height: int, width: int
) -> Tensor:
    """Gradient of `roi_pool` with respect to its input: each bin's gradient is added at the bin's argmax.

    Half precision is accumulated in float32.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width].
        rois, spatial_scale: those of the forward pass.
        argmax: as `roi_pool` gave it.
        batch, channels, height, width: shape of the forward pass's input.

    Returns:
        Tensor[N, C, H, W] of the dtype of `grad`, in the memory format of `argmax`.
    """
    layout = memory_format(argmax)
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros((batch, channels, height, width), dtype=wide, device=grad.device).to(memory_format=layout)
    sums = flat(total, layout)
    chunk = max(1, BINS_AT_ONCE // (grad[:1].numel() or 1))
    for part in range(0, len(rois), chunk):
        some = slice(part, part + chunk)
        found, terms = argmax[some], grad[some].to(wide)
        where = positions(found, rois[some], height, width)
        empty = found < 0
        if empty.any():
            where, terms = where.masked_fill(empty, 0), terms.masked_fill(empty, 0)
        sums.scatter_add_(0, flat(where, layout), flat(terms.contiguous(memory_format=layout), layout))
    return total.to(grad.dtype)


def roi_pool_gather(features: Tensor, rois: Tensor, argmax: Tensor) -> Tensor:
    """The values of `features`, Tensor[N, C, H, W], at `argmax`, and 0 where there is none: the pooling of a tangent.

    It is the adjoint of `roi_pool_backward`, and so its gradient. Built of differentiable operators.
    """
    layout = memory_format(argmax)
    empty = argmax < 0
    where = positions(argmax, rois, *features.shape[2:]).masked_fill(empty, 0)
    return flat(features.contiguous(memory_format=layout), layout)[where].masked_fill(empty, 0)


def positions(argmax: Tensor, rois: Tensor, height: int, width: int) -> Tensor:
    """Where in the memory of a Tensor[N, C, height, width] in the format of `argmax` its cells lie (not its -1)."""
    channels = argmax.shape[1]
    channel = torch.arange(channels, device=argmax.device)
    image = rois[:, :1].to(torch.int64)
    cells = height * width
    if memory_format(argmax) is torch.channels_last:
        first, step = image * (cells * channels) + channel, channels
    else:
        first, step = (image * channels + channel) * cells, 1
    return torch.add(first[:, :, None, None], argmax, alpha=step)


def flat(x: Tensor, layout: torch.memory_format) -> Tensor:
    """`x`, which has that format, as a vector in the order of its memory."""
    return (x.permute(0, 2, 3, 1) if layout is torch.channels_last else x).reshape(-1)

"""The pure-torch implementations of the RoI operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from roi.bins import clipped_side, empty_bins, roi_windows
from roi.boxes import valid_rows
from roi.layout import empty_argmax, empty_pooled, memory_format
from roi.range_max import roi_maxima, table_is_cheaper

CELLS_AT_ONCE = 2**18  # of the forward pass: what the indices of a chunk of RoIs address
WINDOWS_TOGETHER = 4  # of one size, from which on gathering them costs less than a call for each
BINS_AT_ONCE = 2**19  # of the backward pass: larger temporaries cost more to allocate than to fill
VALUES_AT_ONCE = 2**21  # of the forward pass: what is gathered for one call of adaptive pooling


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
    if output.numel() == 0 or batch == 0:  # with no image, no row is valid
        return output.fill_(torch.nan), argmax.fill_(-1)

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
    many = int((rows * columns)[meets].sum()) > input.numel() // max(channels, 1)
    if many:  # it is less work to convert the map than each crop
        input = input.contiguous(memory_format=torch.channels_last)

    size = h * (2 * width) + w
    _, kind, count = torch.unique(size, return_inverse=True, return_counts=True)
    margin = int(many)  # boxes that are clipped to the image end one cell beyond the map: x2 = width rounds to that
    near = meets & (y >= 0) & (x >= 0) & (y + h <= height + margin) & (x + w <= width + margin)
    single = near & (count[kind] < WINDOWS_TOGETHER)
    # Where a window is mostly off the map, filling it up would be more work than its part on the map.
    alike = meets & ~single & (2 * h <= 3 * rows) & (2 * w <= 3 * columns)
    far = meets & ~single & ~alike

    chosen = single.nonzero().flatten()
    pool_singles(input, windows[chosen], chosen, output, argmax)
    chosen = alike.nonzero().flatten()
    chosen = chosen[size[chosen].argsort(stable=True)]
    gather = gatherer(input)
    pool_groups(gather, windows[chosen], chosen, input.shape, output, argmax)
    for k in far.nonzero().flatten().tolist():
        pool_far(gather, windows[k].tolist(), input.shape, output[k], argmax[k : k + 1])


def pool_singles(input: Tensor, windows: Tensor, chosen: Tensor, output: Tensor, argmax: Tensor) -> None:
    """Fills in the rows `chosen` for `windows` that begin on the map and end at most one cell beyond it."""
    height, width = input.shape[2:]
    maps = input.permute(0, 2, 3, 1)
    row, column = torch.arange(height + 1, device=input.device), torch.arange(width + 1, device=input.device)
    row[-1], column[-1] = height - 1, width - 1
    if ((windows[:, 1] + windows[:, 3] > height) | (windows[:, 2] + windows[:, 4] > width)).any():
        padded = maps.new_empty(len(maps), height + 1, width + 1, maps.shape[3])
        padded[:, :height, :width] = maps
        padded[:, height, :width] = maps[:, -1]
        padded[:, :, width] = padded[:, :, width - 1]
        maps = padded
    places = (row[:, None] * width + column).to(argmax.dtype)
    images, outputs, argmaxes = torch.split(maps, 1), torch.split(output, 1), torch.split(argmax, 1)
    for k, (image, y, x, h, w) in zip(chosen.tolist(), windows.tolist(), strict=True):
        crop = images[image].narrow(1, y, h).narrow(2, x, w).contiguous()
        maximum, index = max_pool(crop, output.shape[2], output.shape[3])
        outputs[k].copy_(maximum)
        if argmax.numel():
            argmaxes[k].copy_(looked_up(places.narrow(0, y, h).narrow(1, x, w).flatten(), index))


def pool_groups(
    gather: Callable[[Tensor], Tensor],
    windows: Tensor,
    chosen: Tensor,
    shape: torch.Size,
    output: Tensor,
    argmax: Tensor,
) -> None:
    """Fills in the rows `chosen` for `windows`, which are sorted by size; those of one size are pooled together."""
    _, channels, height, width = shape
    rows = chosen.tolist()
    for batches in chunked(windows, channels):
        cells = window_cells(windows[batches[0][0] : batches[-1][1]], height, width)
        places = cells.remainder(height * width).to(argmax.dtype) if argmax.numel() else cells
        done = 0
        for start, stop, h, w in batches:
            some = slice(done, done + (stop - start) * h * w)
            done = some.stop
            crops = gather(cells[some]).view(stop - start, h, w, channels)
            maximum, index = max_pool(crops, output.shape[2], output.shape[3])
            copy_to(output, rows[start:stop], maximum)
            if argmax.numel():
                index = index + torch.arange(0, h * w * len(crops), h * w, device=index.device).view(-1, 1, 1, 1)
                copy_to(argmax, rows[start:stop], looked_up(places[some], index))


def pool_far(
    gather: Callable[[Tensor], Tensor], window: list[int], shape: torch.Size, output: Tensor, argmax: Tensor
) -> None:
    """Fills in the bins of one window, of which much lies off the map, that lie on it.

    `output` is Tensor[C, pooled_height, pooled_width], `argmax` is that with a dimension of 1, or of 0, before it.
    """
    _, channels, height, width = shape
    image, y, x, h, w = window
    down = clipped_side(y, h, output.shape[1], height)
    across = clipped_side(x, w, output.shape[2], width)
    rows, columns = (torch.tensor(side.cells, device=output.device) for side in (down, across))
    places = (rows[:, None] * width + columns).flatten()
    crop = gather(places + image * (height * width)).view(1, len(rows), len(columns), channels)
    target = output[:, down.bins, across.bins]
    maximum, index = max_pool(crop, target.shape[1], target.shape[2])
    target.copy_(maximum[0])
    if argmax.numel():
        argmax[:, :, down.bins, across.bins] = looked_up(places.to(argmax.dtype), index)


def copy_to(target: Tensor, rows: list[int], values: Tensor) -> None:
    """`target.index_copy_(0, rows, values)`, which takes ten times as long on channels_last tensors."""
    for row, value in zip(rows, values, strict=True):
        target[row].copy_(value)


def max_pool(crops: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Adaptive max pooling of Tensor[G, h, w, C] to Tensor[G, C, height, width], and the cells h·w of the maxima."""
    maximum, index = F.adaptive_max_pool2d(crops.permute(0, 3, 1, 2), (height, width), return_indices=True)
    return maximum, index


def looked_up(places: Tensor, index: Tensor) -> Tensor:
    """`places.take(index)` for a channels_last `index`, a third of the time: as it lies in memory."""
    index = index.permute(0, 2, 3, 1)
    return places.index_select(0, index.flatten()).view(index.shape).permute(0, 3, 1, 2)


def gatherer(input: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from cells (n·H + y)·W + x to their channels, Tensor[cells, C]."""
    if memory_format(input) is torch.contiguous_format:
        maps, size = input.flatten(2), input.shape[2] * input.shape[3]
        return lambda cells: maps[cells // size, :, cells % size]
    rows = input.permute(0, 2, 3, 1).flatten(0, 2)
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
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(batch * (1 + height * width), channels, dtype=wide, device=grad.device)
    if not total.numel():  # no image: no row was valid
        return total.to(grad.dtype).view(batch, channels, height, width)
    step = max(BINS_AT_ONCE, total.numel()) // max(grad[:1].numel(), 1) + 1
    for start in range(0, len(rois) if grad.numel() else 0, step):
        some = slice(start, start + step)
        index, terms = cell_rows(argmax[some], rois[some], batch, height * width), as_rows(grad[some].to(wide))
        if grad.device.type == "cpu":
            # To the gradient of max pooling the images are one tall map and the RoIs one tall output. On the CPU it
            # adds whatever indices it is given, one after the other, at twice the speed of `scatter_add_`.
            total += as_rows(torch.ops.aten.adaptive_max_pool2d_backward(tall(terms), tall(total), tall(index)))
        else:
            total.scatter_add_(0, index, terms)
    cells = total.view(batch, 1 + height * width, channels)[:, 1:].to(grad.dtype)
    maps = cells.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return maps.contiguous(memory_format=memory_format(argmax))


def roi_pool_gather(features: Tensor, rois: Tensor, argmax: Tensor) -> Tensor:
    """The values of `features`, Tensor[N, C, H, W], at `argmax`, and 0 where there is none: the pooling of a tangent.

    It is the adjoint of `roi_pool_backward`, and so its gradient. Built of differentiable operators.
    """
    batch, channels, height, width = features.shape
    if batch == 0 or channels == 0:
        return features.new_zeros(argmax.shape)
    maps = F.pad(features.flatten(2).transpose(1, 2), (0, 0, 1, 0))  # a row of zeros before each image's cells
    values = maps.reshape(-1, channels).gather(0, cell_rows(argmax, rois, batch, height * width))
    count, _, pooled_height, pooled_width = argmax.shape
    return values.view(count, pooled_height, pooled_width, channels).permute(0, 3, 1, 2)


def cell_rows(argmax: Tensor, rois: Tensor, batch: int, cells: int) -> Tensor:
    """The cells `argmax` as rows of a tensor that has for each image a row for "none" (-1), then one for each cell.

    Tensor[K·pooled_height·pooled_width, C] of int64.
    """
    image = rois[:, 0].nan_to_num().clamp(0, batch - 1).to(torch.int64)  # rejected boxes have no argmax
    first = (image * (1 + cells) + 1).repeat_interleave(argmax.shape[2] * argmax.shape[3])
    return as_rows(argmax) + first[:, None]


def tall(rows: Tensor) -> Tensor:
    """Tensor[1, C, R, 1] in channels_last memory of Tensor[R, C] `rows`."""
    return rows.view(1, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)


def as_rows(x: Tensor) -> Tensor:
    """Tensor[N·H·W, C] of Tensor[N, C, H, W]: no copy where that is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])

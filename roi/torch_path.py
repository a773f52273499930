"""The pure-torch implementations of the RoI operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d_with_indices

from roi.boxes import valid_rows
from roi.layout import empty_argmax, empty_pooled, memory_format

BINS_AT_ONCE = 2**16  # of the backward pass: their 64-bit positions stay in the cache
MAX_CELL = 2**30  # coordinates saturate here, so that a window's bins are exact in 32-bit integers everywhere
EVERY = slice(None)


class Window(NamedTuple):
    """One RoI on the map, in cells, not clipped to it."""

    image: int
    y: int
    x: int
    height: int
    width: int


def round_half_away(x: Tensor) -> Tensor:
    """C's `round`; `torch.round` rounds halves to even."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0)


def roi_windows(rois: Tensor, spatial_scale: float) -> list[Window]:
    """The windows of Tensor[K, 5] `rois`: both ends inclusive, at least one cell. Rows must be finite."""
    cells = round_half_away(rois[:, 1:] * spatial_scale).clamp(-MAX_CELL, MAX_CELL).to(torch.int64)
    x1, y1, x2, y2 = cells.unbind(1)
    height, width = (y2 - y1 + 1).clamp(min=1), (x2 - x1 + 1).clamp(min=1)
    image = rois[:, 0].to(torch.int64)
    return [Window(*row) for row in torch.stack([image, y1, x1, height, width], dim=1).tolist()]


class Side(NamedTuple):
    """One side of a window that leaves the map, in a form that adaptive pooling can take."""

    cells: list[int]  # of the clipped side, counted from its start
    bins: int  # that the cells are pooled to
    kept: slice  # of those bins: the ones that meet the map
    targets: slice  # the bins of the output that these are


def clipped_side(start: int, size: int, bins: int, limit: int) -> Side:
    """The bins of a side [start, start + size) that meets the map [0, limit).

    Bin p is floor(p·size/bins) … ceil((p+1)·size/bins) of the unclipped side, then clipped. Repeating a bin's last cell
    on the map changes neither its maximum nor where that is found. So either the side is filled up with its outermost
    cells or, where that is shorter (most of it lies off the map), all bins that meet the map get one length.
    """
    first, last = max(start, 0), min(start + size, limit) - 1
    edges = [(start + p * size // bins, start - (-(p + 1) * size // bins)) for p in range(bins)]
    on_map = [p for p, (low, high) in enumerate(edges) if high > 0 and low < limit]
    kept = slice(on_map[0], on_map[-1] + 1)
    clipped = [range(max(low, 0), min(high, limit)) for low, high in edges[kept]]
    longest = max(map(len, clipped))
    if size <= longest * len(clipped):
        cells = [min(max(cell, first), last) - first for cell in range(start, start + size)]
        return Side(cells, bins, kept, kept)
    cells = [bin[min(i, len(bin) - 1)] - first for bin in clipped for i in range(longest)]
    return Side(cells, len(clipped), EVERY, kept)


def gathered(crop: Tensor, down: Side, across: Side) -> Tensor:
    """The cells `down` × `across` of Tensor[H, W, …] `crop`."""
    rows, columns = (torch.tensor(side.cells, device=crop.device) for side in (down, across))
    cells = (rows[:, None] * crop.shape[1] + columns).flatten()
    return crop.flatten(0, 1).index_select(0, cells).view(len(rows), len(columns), *crop.shape[2:])


def roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling (Girshick, Fast R-CNN, 2015, section 2.1), one `adaptive_max_pool2d` per RoI.

    Adaptive pooling has the bins of RoIPool, and its vectorised kernel for channels_last crops is what makes it fast:
    every crop is taken in that format.

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
    area = sum(min(w.height, height) * min(w.width, width) for w in windows)
    if area > batch * height * width:  # else it is less work to convert each crop
        input = input.contiguous(memory_format=torch.channels_last)
    maps = input.permute(0, 2, 3, 1).unbind()
    outputs, argmaxes = output.unbind(), argmax.unbind()
    grid = torch.arange(height * width, dtype=argmax.dtype, device=input.device).view(height, width)

    for k, (accepted, (image, y, x, h, w)) in enumerate(zip(valid.tolist(), windows, strict=True)):
        top, bottom, left, right = max(y, 0), min(y + h, height), max(x, 0), min(x + w, width)
        if not (accepted and top < bottom and left < right):
            output[k].fill_(0 if accepted else torch.nan)
            argmax[k : k + 1].fill_(-1)
            continue
        crop = maps[image][top:bottom, left:right]
        if bottom - top == h and right - left == w:
            maximum, index = pooled(crop, pooled_height, pooled_width)
            outputs[k].copy_(maximum)
            if with_argmax:
                argmaxes[k].copy_(looked_up(grid[top:bottom, left:right], index))
        else:
            down, across = clipped_side(y, h, pooled_height, height), clipped_side(x, w, pooled_width, width)
            maximum, index = pooled(gathered(crop.contiguous(), down, across), down.bins, across.bins)
            outputs[k].fill_(0)[:, down.targets, across.targets] = maximum[:, down.kept, across.kept]
            if with_argmax:
                cells = looked_up(gathered(grid[top:bottom, left:right], down, across), index)
                argmaxes[k].fill_(-1)[:, down.targets, across.targets] = cells[:, down.kept, across.kept]
    return output, argmax


def pooled(crop: Tensor, pooled_height: int, pooled_width: int) -> tuple[Tensor, Tensor]:
    """Adaptive max pooling of Tensor[h, w, C] to Tensor[C, pooled_height, pooled_width], and its indices."""
    maximum, index = adaptive_max_pool2d_with_indices(crop[None].permute(0, 3, 1, 2), (pooled_height, pooled_width))
    return maximum[0], index[0]


def looked_up(cells: Tensor, index: Tensor) -> Tensor:
    """`cells.take(index)` for the indices that `pooled` gave; three times as fast, as it follows their memory."""
    index = index.permute(1, 2, 0)
    return cells.flatten().index_select(0, index.flatten()).view(index.shape).permute(2, 0, 1)


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

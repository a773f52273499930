"""RoI max pooling by `adaptive_max_pool2d`, whose bins are RoIPool's: on any device, for any dtype, a RoI at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from roi.bins import Integers
from roi.layout import argmax_format, empty_argmax, empty_pooled


def roi_pool(
    input: Tensor, windows: Integers, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling: the output, and the argmax or Tensor[0], as `torch_path.roi_pool` says.

    Args:
        input: Tensor[N, C, H, W].
        windows: [K, 5] of (image, y, x, height, width) in cells.
        pooled_height, pooled_width: bins of the output.
        with_argmax: whether the argmax is wanted.
    """
    height, width = input.shape[2:]
    cells = torch.arange(height * width, device=input.device).view(height, width)
    output = empty_pooled(input, len(windows), pooled_height, pooled_width)
    argmax = empty_argmax(input, output, with_argmax, argmax_format(input))
    for k, (image, y, x, h, w) in enumerate(windows.tolist()):
        rows = clipped_side(y, h, pooled_height, height)
        columns = clipped_side(x, w, pooled_width, width)
        if len(rows.bins) * len(columns.bins) < pooled_height * pooled_width:
            output[k] = 0
            argmax[k : k + 1] = -1
        if not rows.bins or not columns.bins:
            continue
        crop = input[image : image + 1, :, rows.cells][..., columns.cells]
        size = (len(rows.bins), len(columns.bins))
        bins = (slice(k, k + 1), slice(None), as_slice(rows.bins), as_slice(columns.bins))
        maximum, index = F.adaptive_max_pool2d(crop, size, return_indices=True)
        output[bins] = maximum
        if with_argmax:
            argmax[bins] = cells[rows.cells][:, columns.cells].take(index).to(argmax.dtype)
    return output, argmax


def as_slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


class Side(NamedTuple):
    """One side of a window in a form that adaptive pooling can take."""

    cells: slice | list[int]  # of the map
    bins: range  # of the output, that adaptive pooling makes of the cells; the others lie off the map


def clipped_side(start: int, size: int, bins: int, limit: int) -> Side:
    """The bins of a side [start, start + size) that meet the map [0, limit), and the cells they are made of.

    Bins of a side that leaves the map are brought to one length by repeating each one's last cell, which changes
    neither its maximum nor where that is found. So the number of cells is bounded by the map's, however far the side
    reaches beyond it.
    """
    if start >= 0 and start + size <= limit:
        return Side(slice(start, start + size), range(bins))
    edges = [(start + p * size // bins, start - (-(p + 1) * size // bins)) for p in range(bins)]
    on_map = [p for p, (low, high) in enumerate(edges) if high > 0 and low < limit]
    if not on_map:
        return Side([], range(0))
    clipped = [range(max(edges[p][0], 0), min(edges[p][1], limit)) for p in on_map]
    longest = max(map(len, clipped))
    cells = [bin[min(i, len(bin) - 1)] for bin in clipped for i in range(longest)]
    return Side(cells, range(on_map[0], on_map[-1] + 1))

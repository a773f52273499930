"""RoI max pooling by `adaptive_max_pool2d`, whose bins are RoIPool's: on any device, for any dtype, a RoI at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roi.bins import Integers
from roi.layout import argmax_format, empty_argmax, empty_pooled


def roi_pool(
    input: Tensor, windows: Integers, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling: the output, and the argmax or Tensor[0], as `torch_pool.roi_pool` says.

    Args:
        input: Tensor[N, C, H, W].
        windows: [K, 5] of (image, y, x, height, width) in cells.
        pooled_height, pooled_width: bins of the output.
        with_argmax: whether the argmax is wanted.
    """
    height, width = input.shape[2:]
    # On the CPU the pooling of channels_last crops is vectorised, and some ten times as fast.
    crop_format = argmax_format(input)
    output = empty_pooled(input, len(windows), pooled_height, pooled_width)
    argmax = empty_argmax(input, output, with_argmax, crop_format)
    if len(windows) > len(input) and cells_cropped(windows, height, width) > len(input) * height * width:
        input = input.contiguous(memory_format=crop_format)
    if with_argmax:  # Their sums are the map's cells. All of those would take several times a one-channel map's memory.
        first_cells = torch.arange(0, height * width, width, dtype=argmax.dtype, device=input.device)
        across = torch.arange(width, dtype=argmax.dtype, device=input.device)
    counted_in_bfloat16 = input.is_cpu and input.dtype == torch.bfloat16  # torch 2.6: a contiguous map's cells
    for k, (image, y, x, h, w) in enumerate(windows.tolist()):
        rows = clipped_side(y, h, pooled_height, height)
        columns = clipped_side(x, w, pooled_width, width)
        size = (len(rows.bins), len(columns.bins))
        bins: Any = slice(k, k + 1)
        if size != (pooled_height, pooled_width):
            output[k] = 0
            argmax[k : k + 1] = -1
            if 0 in size:
                continue
            bins = (bins, slice(None), as_slice(rows.bins), as_slice(columns.bins))
        crop = cropped(input, image, rows.cells, columns.cells).contiguous(memory_format=crop_format)
        if counted_in_bfloat16 and crop.is_contiguous():
            crop = crop.float()
        maximum, index = F.adaptive_max_pool2d(crop, size, return_indices=True)
        output[bins] = maximum
        if with_argmax:
            places = (first_cells[rows.cells, None] + across[columns.cells]).flatten()
            places = places.index_select(0, index.permute(0, 2, 3, 1).flatten())
            argmax[bins] = places.view(1, *size, -1).permute(0, 3, 1, 2)
    return output, argmax


def cells_cropped(windows: Integers, height: int, width: int) -> int:
    return int((np.minimum(windows[:, 3], height) * np.minimum(windows[:, 4], width)).sum())


def cropped(maps: Tensor, image: int, rows: slice | list[int], columns: slice | list[int]) -> Tensor:
    """Tensor[1, C, rows, columns] of one of the `maps`."""
    if isinstance(rows, slice) and isinstance(columns, slice):
        return maps[image : image + 1, :, rows, columns]
    cells = maps[image : image + 1].permute(0, 2, 3, 1)  # in this order many times as fast: cells are copied whole
    return picked(picked(cells, 1, rows), 2, columns).permute(0, 3, 1, 2)


def picked(cells: Tensor, dim: int, wanted: slice | list[int]) -> Tensor:
    if isinstance(wanted, slice):
        return cells.narrow(dim, wanted.start, wanted.stop - wanted.start)
    return cells.index_select(dim, torch.tensor(wanted, device=cells.device))


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

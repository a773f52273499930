"""Maps as tables: a row of channels for each cell, as channels_last maps lie in memory. What pooling sums up or compares.

Where each bin has channels of its own, a cell has a row for each bin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roi.torch_path.memory import scratch

Array = NDArray[Any]

LINE_BYTES = 64  # that memory is read in


class Cells(NamedTuple):
    """Where a table has the cells of K RoIs: cell (y, x) of RoI k is row start[k] + y·stride[k] + x.

    Where a cell has a row for each bin, bin b has there the row (start[k] + y·stride[k] + x)·bins + b.
    """

    start: Array  # [K] of int64
    stride: Array  # [K] of int64
    rows: int
    window: tuple[Array, Array] | None = None  # [K, 2] each: the first and the last (y, x) that are there; None: all
    bins: int = 1


def wide(x: Tensor) -> torch.dtype:
    """What sums of such elements are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def cell_view(map_: Tensor, bins: int) -> Tensor:
    """A view Tensor[N, H, W, bins, C] of Tensor[N, C·bins, H, W]."""
    return map_.unflatten(1, (map_.shape[1] // bins, bins)).permute(0, 3, 4, 2, 1)


def whole_table(map_: Tensor, bins: int = 1) -> Tensor:
    """Tensor[N·H·W·bins, C] of Tensor[N, C·bins, H, W]: a view where it lies so in memory, else a copy in scratch."""
    cells = cell_view(map_, bins)
    if cells.dtype != wide(map_) or not cells.is_contiguous():
        cells = scratch("maps", cells.shape, map_, wide(map_)).copy_(cells)
    return cells.view(-1, cells.shape[4])


def whole_cells(images: Array, batch: int, height: int, width: int, bins: int = 1) -> Cells:
    """The cells of `whole_table`, for RoIs of the images [K]."""
    start = images * (height * width)
    return Cells(start, np.full_like(start, width), batch * height * width * bins, None, bins)


def cropped(map_: Tensor, images: Array, window: tuple[Array, Array], bins: int) -> tuple[Tensor, Cells] | None:
    """A table of the windows of K RoIs, one after the other. None where to copy the whole map moves less memory.

    Memory is read in lines, of which the ends of a window's rows use a part only.
    """
    height, width = map_.shape[2:]
    first, last = window
    sides = last - first + 1
    lines = (sides[:, 0] * (sides[:, 1] + LINE_BYTES // map_.element_size())).sum()
    if lines >= len(map_) * height * width:
        return None
    areas = sides.prod(axis=1)
    ends = areas.cumsum()
    number = np.arange(ends[-1])
    number -= (ends - areas).repeat(areas)  # of a cell in its window
    columns = sides[:, 1].repeat(areas)
    y = number // columns
    cells = (first[:, 0] * width + first[:, 1]).repeat(areas) + number + y * (width - columns)
    index = [torch.from_numpy(x).to(map_.device) for x in (images.repeat(areas), cells)]
    table = map_.flatten(2).transpose(1, 2)[index[0], index[1]].to(wide(map_))
    if bins > 1:
        table = table.unflatten(1, (-1, bins)).transpose(1, 2).flatten(0, 1)
    start = ends - areas - first[:, 0] * sides[:, 1] - first[:, 1]
    return table, Cells(start, sides[:, 1], int(ends[-1]) * bins, window, bins)


def lies_in_rows(map_: Tensor, bins: int) -> bool:
    """Whether `whole_table` is a view."""
    return map_.dtype == wide(map_) and cell_view(map_, bins).is_contiguous()

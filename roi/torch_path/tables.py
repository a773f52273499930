"""Maps as tables, with a row of channels for each cell, as channels_last maps lie in memory.

Where each bin has channels of its own, a cell has a row for each bin.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Table(NamedTuple):
    """The cells of a map that some RoIs need. Which cells these are is known before the map is read."""

    map_: Tensor
    cells: Cells
    crops: tuple[Array, Array] | None  # of each row the image and the cell; None: all cells of the map

    @classmethod
    def of(cls, map_: Tensor, images: Array, window: Callable[[], tuple[Array, Array]], bins: int) -> Table:
        """For RoIs of the images [K], whose windows are the first and the last cell of each: [K, 2] and [K, 2].

        The whole map where it lies as a table in memory, or where to copy it moves less memory than to read each RoI's
        window. Memory is read in lines, of which the ends of a window's rows use a part only.
        """
        batch, _, height, width = map_.shape
        if not lies_in_rows(map_, bins):
            first, last = window()
            sides = last - first + 1
            lines = int((sides[:, 0] * (sides[:, 1] + LINE_BYTES // map_.element_size())).sum())
            if lines < batch * height * width:
                areas = sides.prod(axis=1)
                ends = areas.cumsum()
                start = ends - areas - first[:, 0] * sides[:, 1] - first[:, 1]
                cells = Cells(start, sides[:, 1], int(ends[-1]) * bins, (first, last), bins)
                return cls(map_, cells, (images.repeat(areas), window_cells(first, sides, width)))
        return cls(map_, whole_cells(images, batch, height, width, bins), None)

    def rows(self) -> Tensor:
        """Tensor[rows, C] of float32 or float64."""
        bins = self.cells.bins
        if self.crops is None:
            return whole_table(self.map_, bins)
        index = [torch.from_numpy(x).to(self.map_.device) for x in self.crops]
        rows = self.map_.flatten(2).transpose(1, 2)[index[0], index[1]].to(wide(self.map_))
        return rows if bins == 1 else rows.view(len(rows), -1, bins).transpose(1, 2).flatten(0, 1)


def window_cells(first: Array, sides: Array, width: int) -> Array:
    """The cells y·width + x of windows of [K, 2] `sides` that begin at `first`, one window after the other."""
    areas = sides.prod(axis=1)
    ends = areas.cumsum()
    number = np.arange(ends[-1])
    number -= (ends - areas).repeat(areas)  # of a cell in its window
    columns = sides[:, 1].repeat(areas)
    y = number // columns
    cells: Array = (first[:, 0] * width + first[:, 1]).repeat(areas) + number + y * (width - columns)
    return cells


def whole_cells(images: Array, batch: int, height: int, width: int, bins: int = 1) -> Cells:
    """The cells of `whole_table`, for RoIs of the images [K]."""
    start = images * (height * width)
    return Cells(start, np.full_like(start, width), batch * height * width * bins, None, bins)


def whole_table(map_: Tensor, bins: int = 1) -> Tensor:
    """Tensor[N·H·W·bins, C] of Tensor[N, C·bins, H, W]: a view where it lies so in memory, else a copy in scratch."""
    cells = cell_view(map_, bins)
    if cells.dtype != wide(map_) or not cells.is_contiguous():
        cells = scratch("maps", cells.shape, map_, wide(map_)).copy_(cells)
    return cells.view(-1, cells.shape[4])


def lies_in_rows(map_: Tensor, bins: int) -> bool:
    """Whether `whole_table` is a view."""
    return map_.dtype == wide(map_) and cell_view(map_, bins).is_contiguous()


def cell_view(map_: Tensor, bins: int) -> Tensor:
    """A view Tensor[N, H, W, bins, C] of Tensor[N, C·bins, H, W]."""
    if bins == 1:
        return map_.permute(0, 2, 3, 1).unsqueeze(3)
    batch, channels, height, width = map_.shape
    # A view of any memory format: only the channels are told apart.
    strides = map_.stride(0), bins * map_.stride(1), map_.stride(1), map_.stride(2), map_.stride(3)
    own = map_.as_strided((batch, channels // bins, bins, height, width), strides)
    return own.permute(0, 3, 4, 2, 1)


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which elements of `x` are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""Which cells, or which maxima that are already known, make up each bin: what pooling reads, in two ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from roi.bins import Bins, Integers

TABLE_VALUES = 2**25  # the table's memory is bounded, whatever the cost says


class Cover(NamedTuple):
    """For each bin the rows of a table whose maximum is the bin's: the pattern of a sparse matrix in CSR form."""

    starts: Integers  # [bins + 1]
    rows: Integers


class Reading(Protocol):
    """A table of a map, and how bins are covered by its rows."""

    def table(self, maps: Tensor) -> Tensor:
        """Tensor[R, C] of Tensor[N, H, W, C] `maps`."""

    def cover(self, bins: Bins) -> Cover: ...

    def rows_per_roi(self, bins: Bins) -> Integers:
        """[K]: how many rows the cover of each RoI has."""


def cheapest(bins: Bins, shape: torch.Size) -> Reading:
    """The faster of the two for maps of Tensor[N, H, W, C] `shape`.

    The costs are nanoseconds as they were measured on one CPU; only their proportions matter.
    """
    batch, height, width, channels = shape
    cells = Cells(height, width)
    rectangles = Rectangles.that_cover(bins, batch, height, width)
    values = rectangles.count * channels
    if values > TABLE_VALUES:
        return cells
    by_cells = int(cells.rows_per_roi(bins).sum()) * (16 + channels / 4)
    by_rectangles = rectangles.levels * 20_000 + values + int(rectangles.rows_per_roi(bins).sum()) * (6 + channels / 4)
    return cells if by_cells <= by_rectangles else rectangles


@dataclass(frozen=True)
class Cells:
    """Every bin by its own cells. The table is the map: row (n·H + y)·W + x."""

    height: int
    width: int

    def table(self, maps: Tensor) -> Tensor:
        return maps.reshape(-1, maps.shape[3])

    def rows_per_roi(self, bins: Bins) -> Integers:
        return bins.cells_read()

    def cover(self, bins: Bins) -> Cover:
        rows = bins.heights().repeat(bins.left.shape[1], axis=1).ravel()
        columns = bins.widths()[:, None, :].repeat(bins.top.shape[1], axis=1).ravel()
        first_row = (bins.image[:, None] * self.height + bins.top) * self.width
        first = (first_row[:, :, None] + bins.left[:, None, :]).ravel()
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(rows * columns, out=starts[1:])

        # One run of neighbouring cells for each row of each bin: cell less place in the list is the same along it.
        length = columns.repeat(rows)
        lead = np.arange(len(length))
        lead -= (rows.cumsum() - rows).repeat(rows)  # the row's number in its bin
        lead *= self.width - length
        lead += (first - starts[:-1]).repeat(rows)
        cells = lead.repeat(length)
        cells += np.arange(len(cells))
        return Cover(starts, cells)


@dataclass(frozen=True)
class Rectangles:
    """Every bin by four rectangles that overlap, whose sides are powers of two.

    The table holds the maxima of all such rectangles (Bender & Farach-Colton, The LCA Problem Revisited, 2000, section
    3, in two dimensions): row (i, j, n, y, x) is that of the 2^i × 2^j cells down and right from (y, x), as far as they
    lie on the map. A last row is 0, for empty bins.
    """

    rows: int  # powers of two: i < rows, j < columns
    columns: int
    batch: int
    height: int
    width: int

    @classmethod
    def that_cover(cls, bins: Bins, batch: int, height: int, width: int) -> Rectangles:
        tallest, widest = (int(sides.max(initial=1)) for sides in (bins.heights(), bins.widths()))
        return cls(tallest.bit_length(), widest.bit_length(), batch, height, width)

    @property
    def levels(self) -> int:
        return self.rows * self.columns

    @property
    def count(self) -> int:
        return self.levels * self.batch * self.height * self.width

    def table(self, maps: Tensor) -> Tensor:
        entries = maps.new_empty(self.count + 1, maps.shape[3])
        entries[-1] = 0
        table = entries[:-1].view(self.rows, self.columns, *maps.shape)
        table[0, 0] = maps
        for i in range(self.rows):
            if i > 0:
                double(table[i - 1, 0], table[i, 0], 1, 2 ** (i - 1))
            for j in range(1, self.columns):
                double(table[i, j - 1], table[i, j], 2, 2 ** (j - 1))
        return entries

    def rows_per_roi(self, bins: Bins) -> Integers:
        return np.full(len(bins.image), 4 * bins.top.shape[1] * bins.left.shape[1])

    def cover(self, bins: Bins) -> Cover:
        powers = np.array([max(n.bit_length() - 1, 0) for n in range(max(self.height, self.width) + 1)])
        i, j = powers[bins.heights()], powers[bins.widths()]
        # A row of the table, as a sum of what depends on the bin's row and what depends on its column.
        block = (i * (self.columns * self.batch) + bins.image[:, None]) * self.height
        down = np.stack([block + bins.top, block + bins.bottom - (1 << i)], axis=2) * self.width
        block = j * (self.batch * self.height * self.width)
        across = np.stack([block + bins.left, block + bins.right - (1 << j)], axis=2)
        across_twice = across[:, :, None].repeat(2, axis=2).reshape(len(across), 1, -1)
        rows = (np.tile(down.repeat(2, axis=2), bins.left.shape[1]) + across_twice).reshape(-1, 4)
        empty = bins.empty()
        if empty.any():
            rows[empty.ravel()] = self.count
        return Cover(np.arange(0, rows.size + 1, 4), rows.ravel())


def double(source: Tensor, target: Tensor, dim: int, step: int) -> None:
    """`target` = the maximum of `source` and of itself `step` cells on, along `dim`."""
    kept = max(source.shape[dim] - step, 0)
    torch.maximum(
        source.narrow(dim, 0, kept), source.narrow(dim, source.shape[dim] - kept, kept), out=target.narrow(dim, 0, kept)
    )
    rest = source.shape[dim] - kept
    target.narrow(dim, kept, rest).copy_(source.narrow(dim, kept, rest))

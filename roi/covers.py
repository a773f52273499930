"""Which cells, or which maxima that are already known, make up each bin: what pooling reads, in three ways."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roi.bins import Bins, Integers

TABLE_VALUES = 2**25  # the table's memory is bounded, whatever the cost says


class Cover(NamedTuple):
    """For each bin the rows of a table whose maximum is the bin's: the pattern of a sparse matrix in CSR form.

    Of one integer type, 32 bits where they do: much of the time goes into writing them.
    """

    starts: NDArray[Any] | None  # [bins + 1]; None where each bin has one row
    rows: NDArray[Any]


class Reading(Protocol):
    """A table of a map, and how bins are covered by its rows."""

    def table(self, maps: Tensor) -> Tensor:
        """Tensor[R, C] of Tensor[N, H, W, C] `maps`."""

    def cover(self, bins: Bins) -> Cover: ...

    def rows_per_roi(self, bins: Bins) -> Integers:
        """[K]: how many rows the cover of each RoI has."""

    def cost(self, bins: Bins, channels: int) -> float:
        """Nanoseconds of table, cover and maxima as they were measured on one CPU; only their proportions matter."""


def cheapest(bins: Bins, shape: torch.Size) -> Reading:
    """The fastest of the three for maps of Tensor[N, H, W, C] `shape`."""
    channels, cells = shape[3], Cells(*shape[:3])
    if cells.cost(bins, channels) < 250_000 + shape.numel():  # hardly more than the smallest table's
        return cells
    sizes = (*bins.largest(), *shape[:3])
    tables = Rectangles.of_every_size(*sizes), Rectangles.of_powers_of_two(*sizes)
    affordable = [table for table in tables if table.places * channels <= TABLE_VALUES]
    readings: list[Reading] = [cells, *affordable]
    return min(readings, key=lambda reading: reading.cost(bins, channels))


class Cells(NamedTuple):
    """Every bin by its own cells. The table is the map: row (n·H + y)·W + x."""

    batch: int
    height: int
    width: int

    def table(self, maps: Tensor) -> Tensor:
        return maps.reshape(-1, maps.shape[3])

    def rows_per_roi(self, bins: Bins) -> Integers:
        return bins.cells_read()

    def cost(self, bins: Bins, channels: int) -> float:
        reads = int(self.rows_per_roi(bins).sum())
        return 200_000 + 40 * bins.total + reads * (12 + channels / 6)

    def cover(self, bins: Bins) -> Cover:
        rows = bins.heights.repeat(bins.left.shape[1], axis=1).ravel()
        columns = bins.widths[:, None, :].repeat(bins.top.shape[1], axis=1).ravel()
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
        integer = smallest_integer(self.batch * self.height * self.width, int(starts[-1]))
        cells = lead.astype(integer).repeat(length)
        cells += np.arange(len(cells), dtype=integer)
        return Cover(starts.astype(integer), cells)


class Rectangles(NamedTuple):
    """Every bin by rectangles whose maxima the table holds.

    Row (i, j, n, y, x) of the table is that of the heights[i] × widths[j] cells down and right from (y, x), where those
    lie on the map; elsewhere it is undefined and never read. A last row is 0, for empty bins.

    With rectangles of every size a bin is one of them. With those whose sides are powers of two it is four that overlap
    (Bender & Farach-Colton, The LCA Problem Revisited, 2000, section 3, in two dimensions).
    """

    heights: Sequence[int]  # ascending from 1, each at most twice the one before
    widths: Sequence[int]
    per_side: int  # 1, or 2 that overlap
    batch: int
    height: int
    width: int

    @classmethod
    def of_every_size(cls, tallest: int, widest: int, batch: int, height: int, width: int) -> Rectangles:
        return cls(range(1, tallest + 1), range(1, widest + 1), 1, batch, height, width)

    @classmethod
    def of_powers_of_two(cls, tallest: int, widest: int, batch: int, height: int, width: int) -> Rectangles:
        heights, widths = ([2**i for i in range(largest.bit_length())] for largest in (tallest, widest))
        return cls(heights, widths, 2, batch, height, width)

    @property
    def places(self) -> int:
        """Rows of the table, without the last."""
        return len(self.heights) * len(self.widths) * self.batch * self.height * self.width

    def table(self, maps: Tensor) -> Tensor:
        entries = maps.new_empty(self.places + 1, maps.shape[3])
        entries[-1] = 0
        table = entries[:-1].view(len(self.heights), len(self.widths), *maps.shape)
        table[0, 0] = maps
        grow(table[:, 0], self.heights, 1)
        grow(table.transpose(0, 1), self.widths, 3)
        return entries

    def rows_per_roi(self, bins: Bins) -> Integers:
        return np.full(len(bins.image), self.per_side**2 * bins.top.shape[1] * bins.left.shape[1])

    def cost(self, bins: Bins, channels: int) -> float:
        operations = len(self.heights) + len(self.widths)
        reads = self.per_side**2 * bins.total
        return 150_000 + 30_000 * operations + 1.2 * self.places * channels + reads * (13 + channels / 5)

    def cover(self, bins: Bins) -> Cover:
        # A row of the table, as a sum of what depends on the bin's row and what depends on its column.
        i, tops = self.placed(self.heights, bins.top, bins.heights)
        j, lefts = self.placed(self.widths, bins.left, bins.widths)
        block = (i * (len(self.widths) * self.batch) + bins.image[:, None]) * self.height
        integer = smallest_integer(self.places, self.per_side**2 * bins.total)
        down = [((block + top) * self.width).astype(integer)[:, :, None] for top in tops]
        block = j * (self.batch * self.height * self.width)
        across = [(block + left).astype(integer)[:, None] for left in lefts]
        rows = np.empty((*i.shape, j.shape[1], self.per_side**2), integer)
        for n, (y, x) in enumerate(product(down, across)):
            np.add(y, x, out=rows[..., n])
        if not (bins.heights.all() and bins.widths.all()):
            rows[bins.empty()] = self.places
        starts = np.arange(0, rows.size + 1, self.per_side**2, dtype=integer) if self.per_side > 1 else None
        return Cover(starts, rows.ravel())

    def placed(self, lengths: Sequence[int], first: Integers, side: Integers) -> tuple[Integers, list[Integers]]:
        """Which of `lengths` the rectangles of each bin have, [K, bins], and where they begin, per_side times that."""
        which = (np.searchsorted(lengths, np.arange(2 * lengths[-1]), side="right") - 1)[side]
        if self.per_side == 1:
            return which, [first]
        return which, [first, first + side - np.asarray(lengths)[which]]


def smallest_integer(*largest: int) -> type[np.signedinteger[Any]]:
    """What holds all these numbers."""
    return np.int32 if max(largest) < 2**31 else np.int64


def grow(table: Tensor, lengths: Sequence[int], dim: int) -> None:
    """Put into table[i] the maxima of table[0] over lengths[i] neighbours along `dim`, where so many remain."""
    for i in range(1, len(lengths)):
        step = lengths[i] - lengths[i - 1]
        kept = table.shape[1 + dim] - lengths[i] + 1
        shorter = table[i - 1]
        target = table[i].narrow(dim, 0, kept)
        torch.maximum(shorter.narrow(dim, 0, kept), shorter.narrow(dim, step, kept), out=target)

"""The bins of a RoI where pooling is linear: cells of the map and their weights.

A cell's weight in a bin is the product of a weight of its row and one of its column. So each side of a RoI is computed
alone: a line of entries (row, weight) for each row of bins, and a line of (column, weight) for each column of bins. A
line has at most as many entries as the map has rows or columns, however far the RoI reaches beyond it.

It is NumPy on the host: the arrays are small, and a NumPy call costs less than a tensor operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from roi._problem import Pooling
from roi.torch_path.bins import MAX_CELL, bin_edges, roi_windows, rounded_up
from roi.torch_path.levels import Rows
from roi.torch_path.tables import Array

ALIKE = 2  # up to so many samples along a bin, RoIs of all sizes are computed in one group


class Entries(NamedTuple):
    """Of G RoIs: the cells that make up every line, and their weights."""

    rows: Array  # [G, pooled_height, E], integers
    row_weights: Array
    columns: Array  # [G, pooled_width, F], integers
    column_weights: Array
    empty: Array | None  # [G, pooled_height, pooled_width] of bool: bins without a cell; None where there is none


class BinWeights(Protocol):
    """The bins of K RoIs: of each, lines of rows and lines of columns."""

    @property
    def lines(self) -> tuple[int, int]:
        """Bins of a RoI along y and along x."""

    @property
    def sizes(self) -> Array:
        """[K, 2], integers: entries in a line of rows and in a line of columns. Few different pairs."""

    def numbers(self, rois: Rows, size: tuple[int, int]) -> int:
        """How many numbers the computation of the entries of one of those RoIs holds at once."""

    def entries(self, rois: Rows, size: tuple[int, int]) -> Entries:
        """The entries of some RoIs, none of which is larger than `size`."""

    def window(self) -> tuple[Array, Array]:
        """The first and the last (row, column) of the map that a RoI reaches, up to rounding: [K, 2] of int64 each.

        For a RoI off the map they are the nearest row and column on it.
        """


@dataclass(frozen=True)
class SampledBins:
    """RoIAlign's bins (He et al., Mask R-CNN, 2017, section 3): means of bilinearly interpolated samples.

    A sample at y gives row c the weight 1 - |y - c|, or 0 where that is negative. Samples of a bin that are at most a
    cell apart share rows, and are added first.

    Attributes:
        begin, length, grid: [K, lines]: where a line's bin begins and how long it is, in cells, and how many samples it
            has.
        first: [K, lines]: the first sample of the bin that can lie on the map.
        visited: [K]: how many samples from there on can lie on the map, in any line of a RoI.
        limits: [lines]: rows or columns of the map.
        adaptive: whether bins of different RoIs have different numbers of samples.
    """

    lines: tuple[int, int]
    sizes: Array
    begin: Array
    length: Array
    grid: Array
    first: Array
    visited: Array
    limits: Array
    adaptive: bool

    def numbers(self, rois: Rows, size: tuple[int, int]) -> int:
        return len(self.limits) * int(self.visited[rois].max()) * (max(size) + 2)

    def entries(self, rois: Rows, size: tuple[int, int]) -> Entries:
        begin, length, grid = self.begin[rois, :, None], self.length[rois, :, None], self.grid[rois, :, None]
        samples = int(self.visited[rois].max())
        runs = 1 if self.adaptive or max(size) <= samples + 1 else samples  # of samples that are taken together
        last = self.limits[:, None] - 1
        i = self.first[rois, :, None] + np.arange(samples, dtype=begin.dtype)
        y = begin + (i + 0.5) * length / np.maximum(grid, 1)
        valid = (y >= -1) & (y <= self.limits[:, None]) & (i < grid)
        y = np.minimum(np.maximum(y, 0), last)
        weight, empty = 1 / np.maximum(grid, 1)[..., None, None], None
        if not valid.all():
            # A sample off the map has no weight. It reads a cell that others read too: any other might hold NaN.
            y = np.where(valid, y, np.where(valid, y, 0).max(axis=2, keepdims=True))
            weight = weight * valid.reshape(*valid.shape[:2], runs, -1, 1)
            empty = outer_or(~valid.any(axis=2), self.lines[0])

        y = y.reshape(*y.shape[:2], runs, -1, 1)
        cells = np.floor(y.min(axis=3)) + np.arange(max(size) // runs, dtype=y.dtype)
        hats = np.maximum(1 - np.abs(y - cells[..., None, :]), 0)
        weights = (hats * weight).sum(axis=3) if samples > runs else (hats * weight)[:, :, :, 0]
        cells = np.minimum(cells, np.minimum(np.floor(y.max(axis=3)) + 1, last[:, None]))
        flat = (*y.shape[:2], -1)
        return by_sides(cells.reshape(flat), weights.reshape(flat), empty, self.lines[0], size)

    def window(self) -> tuple[Array, Array]:
        ends = np.clip(np.stack([self.begin, self.begin + self.length]), 0, self.limits - 1)
        starts = [0, self.lines[0]]
        low = np.minimum.reduceat(ends.min(axis=0), starts, axis=1)
        high = np.maximum.reduceat(ends.max(axis=0), starts, axis=1)
        return low.astype(np.int64), np.minimum(high + 1, self.limits[[0, -1]] - 1).astype(np.int64)


def sampled_bins(boxes: Array, pooling: Pooling, scale: float, height: int, width: int) -> SampledBins:
    """RoIAlign's bins of [K, 5] `boxes`, whose rows are finite, on a map of height × width cells at that scale."""
    pooled_height, pooled_width, sampling_ratio = pooling.pooled_height, pooling.pooled_width, pooling.sampling_ratio
    axis, place, bins, limits = line_constants(pooled_height, pooled_width, height, width, boxes.dtype)
    with np.errstate(over="ignore"):  # far boxes may become infinite, and saturate
        corners = np.minimum(np.maximum(boxes[:, 1:] * boxes.dtype.type(scale), -MAX_CELL), MAX_CELL)
    corners = corners.reshape(-1, 2, 2)[:, :, ::-1]  # [K, ends, (y, x)]
    if pooling.aligned:
        corners = corners - 0.5
    begin, length = corners[:, 0], corners[:, 1] - corners[:, 0]
    if not pooling.aligned:
        length = np.maximum(length, 1)
    length = length / bins
    grid = np.full_like(length, sampling_ratio) if sampling_ratio > 0 else np.maximum(np.ceil(length), 0)
    close = (np.abs(length) <= grid).all(axis=1) if sampling_ratio > ALIKE else None
    begin, length, grid = begin[:, axis] + place * length[:, axis], length[:, axis], grid[:, axis]
    if sampling_ratio > 0:
        sizes = np.full((len(boxes), 2), 2 * sampling_ratio)
        if close is not None:
            sizes[close] = np.minimum(sampling_ratio + 1, [height, width])
        first, visited = np.zeros_like(begin), np.full(len(boxes), sampling_ratio)
    else:
        first, sides = visited_samples(begin, length, grid, limits, pooled_height)
        sizes = np.minimum(rounded_up(sides) + 1, [height, width])
        visited = sides.max(axis=1)
    lines = pooled_height, pooled_width
    return SampledBins(lines, sizes, begin, length, grid, first, visited, limits, sampling_ratio <= 0)


def visited_samples(begin: Array, length: Array, grid: Array, limits: Array, pooled_height: int) -> tuple[Array, Array]:
    """Of adaptive sampling, whose samples are in order: the first of each line that can lie on the map, [K, lines],
    and how many of a line's can, at most, of each side: [K, 2], at least 1. A few that cannot may be among them.
    """
    # Where a bin has several samples, they are half a cell to a cell apart.
    step = np.maximum(length / np.maximum(grid, 1), 0.25)
    with np.errstate(over="ignore", invalid="ignore"):  # of far boxes, whose samples all lie off the map
        low, high = (-1 - begin) / step, (limits - begin) / step
        slack = 1.5 + 8 * np.finfo(step.dtype).eps * (
            np.abs(low) + np.abs(high)
        )  # beyond the error of a sample's place
        first = np.clip(np.floor(low - slack), 0, grid)
        count = np.clip(np.ceil(high + slack), 0, grid) - first
    sides = np.stack([count[:, :pooled_height].max(axis=1), count[:, pooled_height:].max(axis=1)], axis=1)
    return first, np.maximum(sides, 1).astype(np.int64)


@dataclass(frozen=True)
class CellBins:
    """Bins that are means of whole cells: low … high - 1 of every line, [K, lines] of integers."""

    lines: tuple[int, int]
    low: Array
    high: Array

    @property
    def sizes(self) -> Array:
        count = np.maximum(self.high - self.low, 1)
        return rounded_up(np.maximum.reduceat(count, [0, self.lines[0]], axis=1))

    def numbers(self, rois: Rows, size: tuple[int, int]) -> int:
        return int(self.low.shape[1]) * max(size)

    def entries(self, rois: Rows, size: tuple[int, int]) -> Entries:
        low, high = self.low[rois, :, None], self.high[rois, :, None]
        cells = low + np.arange(max(size))
        weights = (cells < high) / np.maximum(high - low, 1)
        off_map = (high <= low)[:, :, 0]
        cells = np.maximum(np.minimum(cells, high - 1), 0)
        empty = outer_or(off_map, self.lines[0]) if off_map.any() else None
        return by_sides(cells, weights, empty, self.lines[0], size)

    def window(self) -> tuple[Array, Array]:
        starts = [0, self.lines[0]]
        first = np.minimum.reduceat(self.low, starts, axis=1)
        last = np.maximum.reduceat(self.high, starts, axis=1) - 1
        return np.minimum(first, np.maximum(last, 0)), np.maximum(last, 0)


def cell_bins(boxes: Array, pooling: Pooling, scale: float, height: int, width: int) -> CellBins:
    """Bins of whole cells. A RoI ends before the cell of its second corner, the map before its last row and column."""
    _, y, x, h, w = roi_windows(boxes, scale).T
    rows = bin_edges(y, np.maximum(h - 1, 1), pooling.pooled_height, height - 1)
    columns = bin_edges(x, np.maximum(w - 1, 1), pooling.pooled_width, width - 1)
    low, high = (np.concatenate(edges, axis=1) for edges in zip(rows, columns, strict=True))
    return CellBins((pooling.pooled_height, pooling.pooled_width), low, high)


def by_sides(cells: Array, weights: Array, empty: Array | None, pooled_height: int, size: tuple[int, int]) -> Entries:
    """Entries from arrays [G, lines, entries] that hold the rows first and then the columns."""
    rows, columns = np.s_[:, :pooled_height, : size[0]], np.s_[:, pooled_height:, : size[1]]
    return Entries(cells[rows], weights[rows], cells[columns], weights[columns], empty)


def outer_or(lines: Any, pooled_height: int) -> Array:
    """[G, pooled_height, pooled_width] from [G, lines], both bool: whether it holds for a bin's row or its column."""
    either: Array = lines[:, :pooled_height, None] | lines[:, None, pooled_height:]
    return either


@lru_cache(maxsize=256)
def line_constants(
    pooled_height: int, pooled_width: int, height: int, width: int, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array, Array]:
    """Of each line its axis (0: y) and its place in it; the bins of each axis; of each line the map's side."""
    axis = np.array([0] * pooled_height + [1] * pooled_width)
    place = np.array([*range(pooled_height), *range(pooled_width)], dtype=dtype)
    bins, sides = np.array([[pooled_height, pooled_width], [height, width]], dtype=dtype)
    return axis, place, bins, sides[axis]

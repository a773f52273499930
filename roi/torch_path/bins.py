"""The geometry of RoI pooling: windows of cells and their bins, in integers.

A window is a RoI on the map, in cells, not clipped to it. Bin p of P over a side [start, start + size) is
floor(p·size/P) … ceil((p+1)·size/P) from its start, then clipped to the map.

In NumPy: the arrays are small, and its calls cost a fraction of PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from roi._problem import Pooling

MAX_CELL = 2**30  # coordinates saturate here, so that bins are exact in 32-bit integers everywhere

Integers = NDArray[np.int64]


def round_half_away(x: NDArray[Any]) -> NDArray[Any]:
    """C's `round`, of finite numbers; `np.round` rounds halves to even."""
    whole: NDArray[Any] = np.trunc(x)
    rest = x - whole
    rest += rest  # the double of a half or more has a whole part
    whole += np.trunc(rest, out=rest)
    return whole


def roi_windows(rois: NDArray[Any], spatial_scale: float) -> Integers:
    """[K, 5] of (image, y, x, height, width) for `rois`, [K, 5] of (batch index, x1, y1, x2, y2) that are finite.

    Coordinates are scaled and rounded in the dtype of `rois`. Both ends of a RoI are inclusive, and it has at least one
    cell.
    """
    with np.errstate(over="ignore"):  # far boxes may become infinite, and saturate
        scaled = rois[:, 1:] * rois.dtype.type(spatial_scale)
    cells = round_half_away(np.minimum(np.maximum(scaled, -MAX_CELL), MAX_CELL))
    windows = np.empty((len(rois), 5), np.int64)
    windows[:, 0] = rois[:, 0]
    first, size = windows[:, 1:3], windows[:, 3:]
    first[:] = cells[:, 1::-1]
    size[:] = cells[:, 3:1:-1]
    size -= first
    size += 1
    np.maximum(size, 1, out=size)
    return windows


def bin_edges(start: Integers, size: Integers, bins: int, limit: int) -> tuple[Integers, Integers]:
    """First cell and end of every bin of the sides [start, start + size) on the map [0, limit): [K, bins] each.

    The end is not beyond the first cell where a bin lies off the map.
    """
    edges = np.empty((2, len(start), bins), np.int64)
    np.multiply(size[:, None], np.arange(bins), out=edges[0])
    np.add(edges[0], size[:, None] + (bins - 1), out=edges[1])
    edges //= bins
    edges += start[:, None]
    np.minimum(np.maximum(edges, 0, out=edges), limit, out=edges)  # np.clip takes several times as long to call
    return edges[0], edges[1]


class Bins(NamedTuple):
    """The cells of the bins of K windows. A bin has none where its height or width is 0."""

    image: Integers  # [K]
    top: Integers  # [K, pooled_height]
    heights: Integers
    left: Integers  # [K, pooled_width]
    widths: Integers

    @classmethod
    def of(cls, windows: Integers, pooling: Pooling, height: int, width: int) -> Bins:
        image, y, x, h, w = windows.T
        top, bottom = bin_edges(y, h, pooling.pooled_height, height)
        left, right = bin_edges(x, w, pooling.pooled_width, width)
        return cls(image, top, np.maximum(bottom - top, 0), left, np.maximum(right - left, 0))

    @property
    def pooled_size(self) -> tuple[int, int]:
        return self.top.shape[1], self.left.shape[1]

    def narrow(self, rois: Integers | slice) -> Bins:
        """Those of some RoIs."""
        return Bins(*(side[rois] for side in self))

    def window(self) -> tuple[Integers, Integers]:
        """The first and the last cell (y, x) of each RoI on the map, [K, 2] each; of one off the map any."""
        first = np.stack([self.top[:, 0], self.left[:, 0]], axis=1)
        end = np.stack([(self.top + self.heights).max(axis=1), (self.left + self.widths).max(axis=1)], axis=1)
        last = np.maximum(end - 1, 0)
        return np.minimum(first, last), last

    def cells_read(self) -> Integers:
        """[K]: how many cells the bins of each RoI have together."""
        cells: Integers = self.heights.sum(axis=1) * self.widths.sum(axis=1)
        return cells

    def empty(self) -> NDArray[np.bool_]:
        """[K, pooled_height, pooled_width]: which bins lie off the map."""
        empty: NDArray[np.bool_] = (self.heights == 0)[:, :, None] | (self.widths == 0)[:, None, :]
        return empty


FEW = np.array([1, *(m * 2**k for k in range(40) for m in (2, 3))])  # 1, 2, 3, 4, 6, 8, 12, 16, …


def rounded_up(count: NDArray[Any]) -> Integers:
    """Every count replaced by one of few: by at most half as much again."""
    few: Integers = FEW[np.searchsorted(FEW, count)]
    return few

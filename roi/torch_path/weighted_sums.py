"""Pooling as a sparse linear map from cells to bins, and its adjoint: weighted sums of rows, by `embedding_bag`.

Pooling sums over a table that has a row of channels for each cell; its adjoint over one that has a row for each bin,
with the lookups sorted by cell. So every element is a sum in a fixed order, whatever the number of threads.

Lookups are worked out in NumPy, on one thread, and before the features are touched: on a busy machine every change
between serial and parallel work waits for a core. So the features are read by a few large parallel calls in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from roi.torch_path.levels import Rows, put, taken
from roi.torch_path.memory import scratch
from roi.torch_path.tables import Array, Cells, cell_view, wide
from roi.torch_path.weights import BinWeights, Entries

# Bounds of the memory that is worked on at once.
LOOKUPS_AT_ONCE = 2**20
LOOKUPS_PER_STEP = 2**18  # of NumPy's, whose arrays are several of that size
VALUES_AT_ONCE = 2**21
LOOKUPS_PER_GROUP = 2**15  # starting another group of RoIs takes as long as summing so many


class Lookups(NamedTuple):
    """The weighted rows that the bins of some RoIs sum."""

    rois: Rows
    rows: Array  # [bins, lookups of each] of the table
    weights: Array  # [bins, lookups of each]
    empty: Array | None  # [bins] of bool: bins that are 0 whatever their lookups are; None where there is none

    def cut(self, start: int, end: int, size: int) -> Lookups:
        """Those of some bins, of `size` for each RoI."""
        end = min(end, len(self.rows))
        if end - start == len(self.rows):
            return self
        rois = taken(self.rois, slice(start // size, end // size))
        empty = None if self.empty is None else self.empty[start:end]
        return Lookups(rois, self.rows[start:end], self.weights[start:end], empty)


class Sums(NamedTuple):
    """Lookups whose sums are worth a parallel call, and where these go. Those of bin i end at offsets[i + 1]."""

    places: Rows
    rows: Tensor
    weights: Tensor
    offsets: Tensor
    empty: Tensor | None  # bins that are 0 whatever their lookups are; None where there is none

    @classmethod
    def of(cls, parts: list[Lookups], places: Rows) -> Sums:
        rows = np.concatenate([part.rows.ravel() for part in parts])
        each = np.concatenate([np.full(len(part.rows), part.rows.shape[1]) for part in parts])
        offsets = np.zeros(len(each) + 1, rows.dtype)
        np.cumsum(each, out=offsets[1:])
        empty = None
        if any(part.empty is not None for part in parts):
            flags = [np.zeros(len(part.rows), bool) if part.empty is None else part.empty for part in parts]
            empty = torch.from_numpy(np.flatnonzero(np.concatenate(flags)))
        rois = parts[0].rois if len(parts) == 1 else np.concatenate([indices(part.rois) for part in parts])
        weights = np.concatenate([part.weights.ravel() for part in parts])
        tensors = torch.from_numpy(rows), torch.from_numpy(weights), torch.from_numpy(offsets)
        return cls(taken(places, rois), *tensors, empty)

    def values(self, table: Tensor) -> Tensor:
        """Tensor[bins, C] of Tensor[rows, C]."""
        rows, offsets = self.rows.to(table.device), self.offsets.to(table.device)
        sums = weighted_bags(table, rows, self.weights.to(table.device, table.dtype), offsets)
        return sums if self.empty is None else sums.index_fill_(0, self.empty.to(table.device), 0)


def sums(cells: Cells, bins: BinWeights, places: Rows, channels: int) -> Iterator[Sums]:
    """The sums that fill the output of the RoIs at `places`, which has so many channels."""
    size = bins.lines[0] * bins.lines[1]
    most = max(1, VALUES_AT_ONCE // (size * max(channels, 1)))
    waiting: list[Lookups] = []
    count = number = 0
    for found in lookups(cells, bins, slice(0, len(bins.sizes))):
        for start in range(0, len(found.rows), most * size):
            part = found.cut(start, start + most * size, size)
            own = len(part.rows) // size
            if waiting and (count + own > most or number + part.rows.size > LOOKUPS_AT_ONCE):
                yield Sums.of(waiting, places)
                waiting, count, number = [], 0, 0
            waiting.append(part)
            count, number = count + own, number + part.rows.size
    yield Sums.of(waiting, places)


def pool(table: Tensor, sums_: Iterator[Sums] | list[Sums], output: Tensor) -> None:
    """Fills rows of `output`, Tensor[K, C, h, w], with sums of the rows of Tensor[rows, C] `table`."""
    for part in sums_:
        put(output, part.places, part.values(table))


class Sorted(NamedTuple):
    """Lookups in the order of their cells: those of row i of the map's table are from offsets[i] to offsets[i + 1]."""

    bins: Tensor
    weights: Tensor
    offsets: Tensor


def by_cell(cells: Cells, bins: BinWeights, places: Rows) -> Iterator[Sorted]:
    """The gradient of a whole map from the bins of the RoIs at `places`, in parts of bounded memory."""
    size = bins.lines[0] * bins.lines[1]
    for part in parts_of(size * bins.sizes.prod(axis=1), LOOKUPS_AT_ONCE):
        found_of: tuple[list[Array], ...] = ([], [], [])
        for found in lookups(cells, bins, part):
            own = indices(places)[found.rois]
            bin_ = (own[:, None] * size + np.arange(size)).reshape(-1, 1)
            bin_ = np.broadcast_to(bin_.astype(np.int32 if bin_[-1, 0] < 2**31 else np.int64), found.rows.shape)
            if found.empty is None:
                kept = found.rows, found.weights, bin_
            else:  # no gradient from there, not even NaN
                kept = found.rows[~found.empty], found.weights[~found.empty], bin_[~found.empty]
            for all_, x in zip(found_of, kept, strict=True):
                all_.append(x.ravel())
        rows, weights, sources = (x[0] if len(x) == 1 else np.concatenate(x) for x in found_of)
        order = stable_order(rows)
        offsets = np.zeros(cells.rows + 1, sources.dtype)
        np.cumsum(np.bincount(rows, minlength=cells.rows), out=offsets[1:])
        yield Sorted(*(torch.from_numpy(x) for x in (sources[order], weights[order], offsets)))


def indices(rois: Rows) -> Array:
    return np.arange(rois.start, rois.stop) if isinstance(rois, slice) else rois


def stable_order(keys: Array) -> Array:
    """argsort of integers from 0 on, equal ones in their order: by 16 bits after 16 bits, each in linear time."""
    order = (keys & 0xFFFF).astype(np.uint16).argsort(kind="stable")
    for bits in range(16, int(keys.max(initial=0)).bit_length(), 16):
        order = order[((keys >> bits) & 0xFFFF).astype(np.uint16)[order].argsort(kind="stable")]
    return order


def spread(terms: Tensor, parts: Iterator[Sorted] | list[Sorted], gradient: Tensor, bins: int) -> None:
    """Fills `gradient`, a map: each cell gets a weighted sum of rows of Tensor[K·h·w, C] `terms`."""
    for number, part in enumerate(parts):
        for target, found in summed(terms, part, gradient, bins):
            if number == 0:
                target.zero_() if found is None else target.copy_(found)
            elif found is not None:
                target.add_(found)


def summed(terms: Tensor, by: Sorted, gradient: Tensor, bins: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The cells of a map in parts of bounded memory: a view of each part, and its sums, or None if they are 0."""
    view = cell_view(gradient, bins)
    images, height, width, _, channels = view.shape
    per_line = width * bins
    lines = max(1, VALUES_AT_ONCE // (per_line * channels))
    several = max(1, lines // height)  # images, where they are small
    bounds = by.offsets[::per_line].tolist()
    sources, weights = by.bins.to(terms.device), by.weights.to(terms.device, terms.dtype)
    offsets = by.offsets.to(terms.device)
    for image in range(0, images, several):
        end = min(image + several, images)
        for y in range(0, height, lines):
            bottom = min(y + lines, height)
            target = view[image:end, y:bottom]
            first, last = image * height + y, (end - 1) * height + bottom
            start, stop = bounds[first], bounds[last]
            if start == stop:
                yield target, None
                continue
            part = offsets[first * per_line : last * per_line + 1] - start
            found = weighted_bags(terms, sources[start:stop], weights[start:stop], part)
            yield target, found.view(target.shape)


def weighted_bags(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Tensor[bags, C] of Tensor[R, C] `table`: bag i is the weighted sum of the rows from offsets[i] to offsets[i + 1].

    `embedding_bag` without the checks of torch.nn.functional, which take longer than a small sum.
    """
    mode_sum, include_last_offset = 0, True
    found: Tensor = torch.embedding_bag(table, rows, offsets, False, mode_sum, False, weights, include_last_offset)[0]
    return found


def gradient_rows(grad: Tensor) -> Tensor:
    """Tensor[K·h·w, C] of Tensor[K, C, h, w]: a view where it lies so in memory, else a copy in scratch."""
    rows = grad.permute(0, 2, 3, 1)
    if rows.dtype != wide(grad) or not rows.is_contiguous():
        rows = scratch("gradient", rows.shape, grad, wide(grad)).copy_(rows)
    return rows.view(-1, rows.shape[3])


def lookups(cells: Cells, bins: BinWeights, part: slice) -> Iterator[Lookups]:
    """Those of the RoIs of a slice, in parts of bounded memory."""
    size = bins.lines[0] * bins.lines[1]
    for entries_size, rois in groups(bins, part):
        rows, columns = entries_size
        step = max(1, LOOKUPS_PER_STEP // max(size * rows * columns, bins.numbers(rois, entries_size)))
        for some in split(rois, step):
            yield combined(cells, some, bins.entries(some, entries_size))


def combined(cells: Cells, rois: Rows, entries: Entries) -> Lookups:
    """Every row of a bin with every column."""
    rows, columns = entries.rows, entries.columns
    if cells.window is not None:
        first, last = (side[rois].T[:, :, None, None] for side in cells.window)
        rows, columns = np.clip(rows, first[0], last[0]), np.clip(columns, first[1], last[1])
    rows = rows.astype(np.int64) * cells.stride[rois, None, None] + cells.start[rois, None, None]
    if cells.bins > 1:
        height, width = rows.shape[1], columns.shape[1]
        rows = rows * cells.bins + np.arange(0, height * width, width)[:, None]
        columns = columns * cells.bins + np.arange(width)[:, None]
    index = np.int32 if cells.rows < 2**31 else np.int64
    # Rows and columns are repeated to all pairs of entries first, so that the inner loop of the addition is long.
    count, (e, f) = len(rows), (rows.shape[2], columns.shape[2])

    def of_row(x: Array) -> Array:
        return x.repeat(f, axis=2)[:, :, None]

    def of_column(x: Array) -> Array:
        return np.concatenate([x] * e, axis=2)[:, None]

    number = of_row(rows.astype(index)) + of_column(columns.astype(index))
    weight = of_row(entries.row_weights) * of_column(entries.column_weights)
    size = count * rows.shape[1] * columns.shape[1]
    empty = None if entries.empty is None else entries.empty.reshape(-1)
    return Lookups(rois, number.reshape(size, e * f), weight.reshape(size, e * f), empty)


def groups(bins: BinWeights, part: slice) -> list[tuple[tuple[int, int], Rows]]:
    """The RoIs of a slice in groups, as (largest size of entries, RoIs). Of a few groupings, the one of least work."""
    sizes = bins.sizes[part]
    if (sizes == sizes[0]).all():
        return [((int(sizes[0, 0]), int(sizes[0, 1])), part)]
    octave = np.frexp(sizes)[1].astype(np.int64)
    ways = [grouped(key[:, 0] * 2**31 + key[:, 1], sizes) for key in (sizes, octave, octave // 2)]
    ways.append([(sizes.max(axis=0), np.arange(len(sizes)))])
    size = bins.lines[0] * bins.lines[1]
    way = min(ways, key=lambda way: sum(LOOKUPS_PER_GROUP + size * len(rois) * most.prod() for most, rois in way))
    return [((int(rows), int(columns)), rois + part.start) for (rows, columns), rois in way]


def grouped(key: Array, sizes: Array) -> list[tuple[Array, Array]]:
    """RoIs of the same key together: the largest of their `sizes`, [2], and the RoIs, in order."""
    order = key.argsort(kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
    return [(sizes[rois].max(axis=0), rois) for rois in groups]


def parts_of(cost: Array, limit: int) -> Iterator[slice]:
    """RoIs one after the other, as many at once as cost about `limit` together, or one that costs more."""
    part = cost.cumsum() // limit
    ends = [*(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
    for start, stop in zip([0, *ends], ends, strict=False):
        yield slice(start, stop)


def split(rois: Rows, step: int) -> Iterator[Rows]:
    if isinstance(rois, slice):
        for start in range(rois.start, rois.stop, step):
            yield slice(start, min(start + step, rois.stop))
    else:
        for start in range(0, len(rois), step):
            yield rois[start : start + step]

"""Pooling as a sparse linear map from cells to bins, and its adjoint. Both are sums of weighted rows: `embedding_bag`.

Pooling sums over a table that has a row of channels for each cell; its adjoint over one that has a row for each bin,
with the lookups sorted by cell. So every element is a sum in a fixed order, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roi._problem import memory_format
from roi.torch_path.levels import Rows
from roi.torch_path.memory import scratch
from roi.torch_path.tables import Array, Cells, cell_view, wide
from roi.torch_path.weights import BinWeights, Entries

# Bounds of the memory that is worked on at once. What is read again soon should still be in a cache.
LOOKUPS_AT_ONCE = 2**20
VALUES_AT_ONCE = 2**21
LOOKUPS_PER_GROUP = 2**15  # that are summed up in the time that it takes to begin with another group of RoIs


class Lookups(NamedTuple):
    """What the bins of some RoIs sum up."""

    cells: Tensor  # [bins, lookups of each]
    weights: Tensor  # [bins, lookups of each]
    empty: Tensor | None  # [bins] of bool: those to be 0 whatever their lookups are


def pool(table: Tensor, cells: Cells, bins: BinWeights, output: Tensor, places: Rows) -> None:
    """Fills rows of `output`, Tensor[·, C, h, w], with sums of the rows of Tensor[rows, C] `table`; C > 0.

    Args:
        places: of the K RoIs in `output`.
    """
    channels, size = output.shape[1], output.shape[2] * output.shape[3]
    target = output.permute(0, 2, 3, 1)
    step = max(1, VALUES_AT_ONCE // (size * channels))
    for entries_size, rois in groups(bins, size):
        for some in split(rois, at_once(bins, rois, entries_size, size)):
            looked_up = lookups(cells, some, bins.entries(some, entries_size), table)
            for part, those in zip(split(some, step), split_bins(looked_up, step * size), strict=True):
                sums = bag_sums(table, those).view(-1, *target.shape[1:])
                place = taken(places, part)
                if isinstance(place, slice):
                    target[place].copy_(sums)
                else:
                    target[torch.from_numpy(place).to(target.device)] = sums.to(target.dtype)


def bag_sums(table: Tensor, looked_up: Lookups) -> Tensor:
    """Tensor[bins, C] of Tensor[rows, C]."""
    sums = F.embedding_bag(looked_up.cells, table, mode="sum", per_sample_weights=looked_up.weights)
    return sums if looked_up.empty is None else sums.index_fill_(0, looked_up.empty.nonzero().flatten(), 0)


def gradient_rows(grad: Tensor) -> Tensor:
    """Tensor[K·h·w, C] of Tensor[K, C, h, w]: a view where it lies so in memory, else a copy in scratch."""
    rows = grad.permute(0, 2, 3, 1)
    if rows.dtype != wide(grad) or not rows.is_contiguous():
        rows = scratch("gradient", rows.shape, grad, wide(grad)).copy_(rows)
    return rows.view(-1, rows.shape[3])


def spread(terms: Tensor, cells: Cells, bins: BinWeights, gradient: Tensor, places: Rows) -> None:
    """Fills `gradient`, a map, with the sum over its bins of every cell: Tensor[K·h·w, C] `terms`, weighted.

    Args:
        cells: those of the whole map.
        places: of the RoIs among those of `terms`.
    """
    size = bins.lines[0] * bins.lines[1]
    for number, part in enumerate(parts_of(size * bins.sizes.prod(axis=1), LOOKUPS_AT_ONCE)):
        sorted_ = by_cell(terms, cells, bins, part, places)
        for target, sums in summed(terms, sorted_, gradient, cells.bins):
            if sums is None:
                if number == 0:
                    target.zero_()
            elif number == 0:
                target.copy_(sums)
            else:
                target.add_(sums)


class Sorted(NamedTuple):
    """Lookups in the order of their cells: those of cell i are from offsets[i] to offsets[i + 1]."""

    sources: Tensor
    weights: Tensor
    offsets: Tensor


def by_cell(terms: Tensor, cells: Cells, bins: BinWeights, part: slice, places: Rows) -> Sorted:
    """What the cells get from the RoIs of a slice."""
    cell, weight, source = [], [], []
    size = bins.lines[0] * bins.lines[1]
    for entries_size, rois in groups(bins, size, part):
        for some in split(rois, at_once(bins, rois, entries_size, size)):
            found = lookups(cells, some, bins.entries(some, entries_size), terms)
            own = np.arange(places.start, places.stop)[some] if isinstance(places, slice) else places[some]
            bin_ = (own[:, None] * size + np.arange(size)).astype(np.int32 if len(terms) < 2**31 else np.int64)
            sources = torch.from_numpy(bin_).to(terms.device).view(-1, 1).expand_as(found.cells)
            if found.empty is None:
                kept = (found.cells, found.weights, sources)
            else:  # no gradient from there, not even NaN
                kept = tuple(x[~found.empty] for x in (found.cells, found.weights, sources))
            for list_, x in zip((cell, weight, source), kept, strict=True):
                list_.append(x.flatten())
    all_cells, weights, sources = (x[0] if len(x) == 1 else torch.cat(x) for x in (cell, weight, source))
    order = all_cells.argsort(stable=True)
    offsets = sources.new_zeros(cells.rows + 1)
    torch.cumsum(torch.bincount(all_cells, minlength=cells.rows), 0, out=offsets[1:])
    return Sorted(sources.index_select(0, order), weights.index_select(0, order), offsets)


def summed(terms: Tensor, by: Sorted, gradient: Tensor, bins: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The cells of a map in parts that memory is found for again: the part's view, its sums, None if they are 0."""
    view = cell_view(gradient, bins)
    images, height, width, _, channels = view.shape
    per_line = width * bins
    lines = max(1, VALUES_AT_ONCE // (per_line * channels))
    several = max(1, lines // height)  # images that are small
    lines = min(lines, height)
    bounds = by.offsets[:: per_line].tolist()
    for image in range(0, images, several):
        end = min(image + several, images)
        for y in range(0, height, lines):
            bottom = min(y + lines, height)
            target = view[image:end, y:bottom]
            first = image * height + y
            last = (end - 1) * height + bottom
            start, stop = bounds[first], bounds[last]
            if start == stop:
                yield target, None
                continue
            offsets = by.offsets[first * per_line : last * per_line + 1] - start
            sums = F.embedding_bag(
                by.sources[start:stop],
                terms,
                offsets,
                mode="sum",
                per_sample_weights=by.weights[start:stop],
                include_last_offset=True,
            )
            yield target, sums.view(target.shape)


def lookups(cells: Cells, rois: Rows, entries: Entries, table: Tensor) -> Lookups:
    """Those of some RoIs, on the device of `table`, their weights in its dtype."""
    rows, columns = entries.rows, entries.columns
    if cells.window is not None:
        first, last = (side[rois].T[:, :, None, None] for side in cells.window)
        rows, columns = np.clip(rows, first[0], last[0]), np.clip(columns, first[1], last[1])
    index = np.int32 if cells.rows < 2**31 else np.int64
    rows = rows.astype(np.int64) * cells.stride[rois, None, None] + cells.start[rois, None, None]
    if cells.bins > 1:
        height, width = rows.shape[1], columns.shape[1]
        rows = rows * cells.bins + np.arange(0, height * width, width)[:, None]
        columns = columns * cells.bins + np.arange(width)[:, None]

    def moved(x: Array) -> Tensor:
        return torch.from_numpy(x).to(table.device)

    number = outer(torch.add, moved(rows.astype(index)), moved(columns.astype(index)))
    factors = moved(entries.row_weights).to(table.dtype), moved(entries.column_weights).to(table.dtype)
    empty = None if entries.empty is None else moved(entries.empty.reshape(-1))
    return Lookups(number, outer(torch.mul, *factors), empty)


def outer(combine: Callable[[Tensor, Tensor], Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Every row entry with every column entry, bin by bin: Tensor[G·h·w, E·F] of Tensor[G, h, E] and Tensor[G, w, F].

    Both are brought to E·F first: the inner loop of the broadcast is then that long.
    """
    (count, height, e), (_, width, f) = rows.shape, columns.shape
    rows = rows[..., None].expand(-1, -1, -1, f).reshape(count, height, 1, e * f)
    columns = columns[:, :, None].expand(-1, -1, e, -1).reshape(count, 1, width, e * f)
    return combine(rows, columns).reshape(-1, e * f)


def groups(bins: BinWeights, size: int, part: slice | None = None) -> list[tuple[tuple[int, int], Rows]]:
    """The RoIs of a slice by the size of their entries: (size, RoIs). Of a few ways to do it, the one of least work.

    Args:
        size: bins of a RoI.
    """
    part = part or slice(0, len(bins.sizes))
    sizes = bins.sizes[part]
    if (sizes == sizes[0]).all():
        return [((int(sizes[0, 0]), int(sizes[0, 1])), part)]
    octave = np.frexp(sizes)[1].astype(np.int64)
    ways = [grouped(key[:, 0] * 2**31 + key[:, 1], sizes) for key in (sizes, octave, octave // 2)]
    ways.append([(sizes.max(axis=0), np.arange(len(sizes)))])
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


def at_once(bins: BinWeights, rois: Rows, entries_size: tuple[int, int], size: int) -> int:
    """How many of some RoIs, of one group, to work out the lookups of together."""
    rows, columns = entries_size
    return max(1, LOOKUPS_AT_ONCE // max(size * rows * columns, bins.numbers(rois, entries_size)))


def taken(rois: Rows, some: Rows) -> Rows:
    """Those of some RoIs that are at `some` places among them."""
    if isinstance(rois, slice):
        return slice(rois.start + some.start, rois.start + some.stop) if isinstance(some, slice) else rois.start + some
    return rois[some]


def split(rois: Rows, step: int) -> Iterator[Rows]:
    if isinstance(rois, slice):
        for start in range(rois.start, rois.stop, step):
            yield slice(start, min(start + step, rois.stop))
    else:
        for start in range(0, len(rois), step):
            yield rois[start : start + step]


def split_bins(looked_up: Lookups, step: int) -> Iterator[Lookups]:
    for start in range(0, len(looked_up.cells), step):
        some = slice(start, start + step)
        empty = None if looked_up.empty is None else looked_up.empty[some]
        yield Lookups(looked_up.cells[some], looked_up.weights[some], empty)

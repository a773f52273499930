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

from roi.bin_weights import Array, BinWeights, Entries, Rows
from roi.layout import memory_format

LOOKUPS_AT_ONCE = 2**20
VALUES_PER_LOOKUP = 16  # channels that take as much memory as a lookup does, with its temporaries
VALUES_AT_ONCE = VALUES_PER_LOOKUP * LOOKUPS_AT_ONCE
VALUES_PER_THREAD = 2**21  # of a chunk that is copied, or transposed, to its place in the output
LOOKUPS_PER_GROUP = 2**15  # that are summed up in the time that it takes to begin with another group of RoIs


class Grid(NamedTuple):
    """Where a table has the cells of K RoIs: cell (y, x) of RoI k is its row start[k] + y·stride[k] + x.

    Or, where each of the bins has cells of its own, bin b has there the row (start[k] + y·stride[k] + x)·bins + b.
    """

    start: Array  # [K] of int64
    stride: Array  # [K] of int64
    rows: int
    window: tuple[Array, Array] | None = None  # [K, 2] each: the first and the last (y, x) that are there; None: all
    bins: int = 1


class Lookups(NamedTuple):
    """What the bins of some RoIs sum up."""

    cells: Tensor  # [bins, lookups of each]
    weights: Tensor  # [bins, lookups of each]
    empty: Tensor | None  # [bins] of bool: those to be 0 whatever their lookups are


def pool(table: Tensor, grid: Grid, bins: BinWeights, output: Tensor, places: Rows) -> None:
    """Fills `output`, Tensor[·, C, h, w], with sums of the rows of Tensor[rows, C] `table`; C > 0.

    Args:
        places: of the K RoIs in `output`.
    """
    channels, size = output.shape[1], output.shape[2] * output.shape[3]
    channels_last = memory_format(output) is torch.channels_last
    target = output.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else output.flatten(2)
    values = min(torch.get_num_threads() * VALUES_PER_THREAD, VALUES_AT_ONCE)
    step = max(1, values // (size * channels))
    for entries_size, rois in groups(bins, slice(0, len(grid.start)), size):
        for some in split(rois, at_once(bins, rois, entries_size, size)):
            looked_up = lookups(grid, some, bins.entries(some, entries_size), table)
            for part, few in zip(split(some, step), split_bins(looked_up, step * size), strict=True):
                sums = bag_sums(table, few).view(-1, size, channels)
                sums = sums if channels_last else sums.transpose(1, 2)
                place = taken(places, part)
                if isinstance(place, slice):
                    target[place].copy_(sums)
                else:
                    target[torch.from_numpy(place).to(target.device)] = sums.to(target.dtype)


def pool_at_once(table: Tensor, grid: Grid, bins: BinWeights, height: int, width: int) -> Tensor | None:
    """As `pool`, a new Tensor[K, C, height, width] in channels_last memory; None where that takes several steps."""
    count, channels, size = len(grid.start), table.shape[1], height * width
    (entries_size, rois), *others = groups(bins, slice(0, count), size)
    if others or count > at_once(bins, rois, entries_size, size) or count * size * channels > VALUES_AT_ONCE:
        return None
    sums = bag_sums(table, lookups(grid, rois, bins.entries(rois, entries_size), table))
    return sums.view(count, height, width, channels).permute(0, 3, 1, 2)


def bag_sums(table: Tensor, looked_up: Lookups) -> Tensor:
    """Tensor[bins, C] of Tensor[rows, C]."""
    sums = F.embedding_bag(looked_up.cells, table, mode="sum", per_sample_weights=looked_up.weights)
    return sums if looked_up.empty is None else sums.index_fill_(0, looked_up.empty.nonzero().flatten(), 0)


def pool_adjoint(grad: Tensor, grid: Grid, bins: BinWeights, dtype: torch.dtype) -> Tensor:
    """Every cell's sum over its bins of their gradients, Tensor[K, C, h, w], weighted: Tensor[rows, C] of `dtype`."""
    channels, size = grad.shape[1], grad.shape[2] * grad.shape[3]
    cost = size * (bins.sizes.prod(axis=1) + channels // VALUES_PER_LOOKUP)
    total: Tensor | None = None
    for part in parts_of(cost, max(LOOKUPS_AT_ONCE, VALUES_PER_LOOKUP * grid.rows)):
        terms = grad[part].permute(0, 2, 3, 1).to(dtype).contiguous().view(-1, channels)
        sums = part_adjoint(terms, grid, part, bins, size)
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total


def part_adjoint(terms: Tensor, grid: Grid, part: slice, bins: BinWeights, size: int) -> Tensor:
    """`pool_adjoint` for the RoIs of a slice, whose gradients are Tensor[bins, C] `terms`."""
    cells, weights, sources = [], [], []
    own = torch.arange(len(terms), dtype=torch.int32, device=terms.device).view(-1, size)
    for entries_size, rois in groups(bins, part, size):
        for some in split(rois, at_once(bins, rois, entries_size, size)):
            cell, weight, empty = lookups(grid, some, bins.entries(some, entries_size), terms)
            if isinstance(some, slice):
                source = own[some.start - part.start : some.stop - part.start]
            else:
                source = own[torch.from_numpy(some - part.start).to(own.device)]
            source = source.reshape(-1, 1).expand_as(cell)
            if empty is not None:  # no gradient from there, not even NaN
                cell, weight, source = cell[~empty], weight[~empty], source[~empty]
            cells.append(cell.flatten())
            weights.append(weight.flatten())
            sources.append(source.flatten())
    cell, weight, source = (x[0] if len(x) == 1 else torch.cat(x) for x in (cells, weights, sources))
    order = cell.argsort(stable=True)
    offsets = source.new_zeros(grid.rows + 1)
    torch.cumsum(torch.bincount(cell, minlength=grid.rows), 0, out=offsets[1:])
    return F.embedding_bag(
        source.index_select(0, order),
        terms,
        offsets,
        mode="sum",
        per_sample_weights=weight.index_select(0, order),
        include_last_offset=True,
    )


def lookups(grid: Grid, rois: Rows, entries: Entries, table: Tensor) -> Lookups:
    """Those of some RoIs, on the device of `table`, their weights in its dtype."""
    rows, columns = entries.rows, entries.columns
    if grid.window is not None:
        first, last = (side[rois].T[:, :, None, None] for side in grid.window)
        rows, columns = np.clip(rows, first[0], last[0]), np.clip(columns, first[1], last[1])
    index = np.int32 if grid.rows < 2**31 else np.int64
    rows = rows.astype(np.int64) * grid.stride[rois, None, None] + grid.start[rois, None, None]
    if grid.bins > 1:
        height, width = rows.shape[1], columns.shape[1]
        rows = rows * grid.bins + np.arange(0, height * width, width)[:, None]
        columns = columns * grid.bins + np.arange(width)[:, None]

    def moved(x: Array) -> Tensor:
        return torch.from_numpy(x).to(table.device)

    cells = outer(torch.add, moved(rows.astype(index)), moved(columns.astype(index)))
    factors = moved(entries.row_weights).to(table.dtype), moved(entries.column_weights).to(table.dtype)
    empty = None if entries.empty is None else moved(entries.empty.reshape(-1))
    return Lookups(cells, outer(torch.mul, *factors), empty)


def outer(combine: Callable[[Tensor, Tensor], Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Every row entry with every column entry, bin by bin: Tensor[G·h·w, E·F] of Tensor[G, h, E] and Tensor[G, w, F].

    Both are brought to E·F first: the inner loop of the broadcast is then that long.
    """
    (count, height, e), (_, width, f) = rows.shape, columns.shape
    rows = rows[..., None].expand(-1, -1, -1, f).reshape(count, height, 1, e * f)
    columns = columns[:, :, None].expand(-1, -1, e, -1).reshape(count, 1, width, e * f)
    return combine(rows, columns).reshape(-1, e * f)


def groups(bins: BinWeights, part: slice, size: int) -> list[tuple[tuple[int, int], Rows]]:
    """The RoIs of a slice by the size of their entries: (size, RoIs). Of a few ways to do it, the one of least work.

    Args:
        size: bins of a RoI.
    """
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

"""RoI max pooling on the CPU as one product of a sparse matrix and the map.

The matrix has a row for each bin and a one for each of the bin's cells. Times the map, with a row for each cell, and
with the maximum in place of the sum, it is the pooled map. PyTorch's kernel for that is vectorised over channels,
parallel over bins, reads the map where it lies and gives 0 for a row without entries, which is what an empty bin is.

Positions come the same way, from keys that sort like the features and then by position.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from roi.torch_path.bins import Bins, Integers
from roi.torch_path.levels import Rows
from roi.torch_path.memory import scratch
from roi.torch_path.tables import whole_table

READS_AT_ONCE = 2**21  # entries of a matrix
VALUES_AT_ONCE = 2**21  # of a part of the output
KEYS_AT_ONCE = 2**18  # eight bytes each, which stay in cache

# PyTorch says once in a process that its CSR tensors are in beta: now, to nobody, and not in the middle of a call.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), device="cpu")

# A key of 63 bits is that of a positive, normal float64.
POSITION_BITS = 31
POSITION = 2**POSITION_BITS - 1
OFFSET = 0x7F800001 + 2**22  # minus infinity, the lowest, comes to 2^22: above the subnormal numbers


def serves(map_: Tensor, bins: Bins) -> bool:
    """Whether `maxima` is right for the map, and reads less than a crop for each RoI."""
    return pays(map_, bins) and not has_negative_zero(map_)


def serves_argmax(map_: Tensor, bins: Bins) -> bool:
    """Whether `argmaxima` is right for the map, and reads less than a crop for each RoI."""
    fits = map_.dtype != torch.float64 and len(map_) * map_.shape[2] * map_.shape[3] <= POSITION
    return fits and pays(map_, bins) and not bool(map_.amax().isnan())


def pays(map_: Tensor, bins: Bins) -> bool:
    return map_.device.type == "cpu" and bins.cells_read().sum() >= len(map_) * map_.shape[2] * map_.shape[3]


def has_negative_zero(map_: Tensor) -> bool:
    """Whether there is a -0, which the maximum of a product does not tell from 0.

    As an integer it is the least of all.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[map_.element_size()]
    return int(map_.view(integers).amin()) == torch.iinfo(integers).min


def maxima(map_: Tensor, bins: Bins, output: Tensor, places: Rows) -> None:
    """Fills the rows `places` of `output`, Tensor[·, C, h, w], with the maximum of each bin; 0 if it is empty."""
    height, width = map_.shape[2:]
    table = whole_table(map_)
    for some, rows in multiplied(table, bins, height, width, VALUES_AT_ONCE):
        put_rows(output, places, some, rows)


def argmaxima(map_: Tensor, bins: Bins, output: Tensor, argmax: Tensor, places: Rows) -> None:
    """As `maxima`, and fills `argmax` with the cell y·W + x of the first maximum; -1 where the bin is empty."""
    height, width = map_.shape[2:]
    table = whole_table(map_)
    for some, keys in multiplied(sort_keys(table), bins, height, width, KEYS_AT_ONCE):
        rows = keys.view(torch.int64)  # the lower half of a key is the distance of the table's row from its end
        torch.sub(len(table), rows.bitwise_and_(POSITION), out=rows)
        part = bins.narrow(some)
        empty = torch.from_numpy(np.flatnonzero(part.empty()))
        values = table.gather(0, rows.index_fill_(0, empty, 0)).index_fill_(0, empty, 0)
        first = torch.from_numpy(part.image * (height * width)).repeat_interleave(len(rows) // len(part.image))
        cells = rows.sub_(first.view(-1, 1)).index_fill_(0, empty, -1)
        put_rows(output, places, some, values)
        put_rows(argmax, places, some, cells)


def put_rows(output: Tensor, places: Rows, some: slice, rows: Tensor) -> None:
    """Tensor[bins, C] of some of the RoIs as rows of Tensor[K, C, h, w]."""
    target = output.permute(0, 2, 3, 1)
    values = rows.view(-1, *target.shape[1:])
    if isinstance(places, slice):
        target[places.start + some.start : places.start + some.stop].copy_(values)
    else:
        target[torch.from_numpy(places[some])] = values.to(target.dtype)


def sort_keys(table: Tensor) -> Tensor:
    """Tensor[rows, C] of float64 whose maximum over some rows tells where the maximum of `table` is.

    As integers: above POSITION_BITS the value's order, below them the distance of the row from the end, so that of
    equal values the first has the greatest key.
    """
    keys = scratch("keys", table.shape, table, torch.int64)
    step = max(1, KEYS_AT_ONCE // max(1, table.shape[1]))
    distance = torch.arange(len(table), 0, -1).view(-1, 1)
    for start in range(0, len(table), step):
        bits = (table[start : start + step] + 0.0).view(torch.int32)  # adding 0 makes -0 equal to it
        order = bits >> 31
        order.bitwise_and_(POSITION).bitwise_xor_(bits)  # as floats sort, but from minus infinity up
        part = keys[start : start + step].copy_(order)
        part.add_(OFFSET).bitwise_left_shift_(POSITION_BITS).add_(distance[start : start + step])
    return keys.view(torch.float64)


def multiplied(
    table: Tensor, bins: Bins, height: int, width: int, values_at_once: int
) -> Iterator[tuple[slice, Tensor]]:
    """The maxima of Tensor[N·H·W, C] `table` in `bins`, in parts of bounded memory: RoIs, and Tensor[bins, C]."""
    reads = bins.cells_read().cumsum()
    most = max(1, values_at_once // (bins.top.shape[1] * bins.left.shape[1] * table.shape[1]))
    start, done = 0, 0
    while start < len(reads):
        stop = min(max(start + 1, int(reads.searchsorted(done + READS_AT_ONCE))), start + most, len(reads))
        starts, rows = (torch.from_numpy(x) for x in pattern(bins.narrow(slice(start, stop)), height, width, len(table)))
        size = (len(starts) - 1, len(table))
        matrix = torch.sparse_csr_tensor(starts, rows, table.new_ones(len(rows)), size, check_invariants=False)
        yield slice(start, stop), torch.sparse.mm(matrix, table, "amax")
        start, done = stop, int(reads[stop - 1])


def pattern(bins: Bins, height: int, width: int, cells: int) -> tuple[Integers, Integers]:
    """Of each bin the table's rows that are its cells, as a sparse matrix in CSR form: where each bin begins, and rows."""
    rows = bins.heights.repeat(bins.left.shape[1], axis=1).ravel()
    columns = bins.widths[:, None, :].repeat(bins.top.shape[1], axis=1).ravel()
    first_row = (bins.image[:, None] * height + bins.top) * width
    first = (first_row[:, :, None] + bins.left[:, None, :]).ravel()
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows * columns, out=starts[1:])
    # One run of neighbouring cells for each row of each bin: cell less place in the list is the same along it.
    length = columns.repeat(rows)
    lead = np.arange(len(length))
    lead -= (rows.cumsum() - rows).repeat(rows)  # the row's number in its bin
    lead *= width - length
    lead += (first - starts[:-1]).repeat(rows)
    integer = np.int32 if max(cells, int(starts[-1])) < 2**31 else np.int64  # much of the time is spent writing them
    numbers = lead.astype(integer).repeat(length)
    numbers += np.arange(len(numbers), dtype=integer)
    return starts.astype(integer), numbers

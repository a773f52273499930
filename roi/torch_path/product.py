"""RoI max pooling on the CPU as one product of a sparse matrix and the map.

The matrix has a row for each bin and a one for each of the bin's cells. Times the map, with a row for each cell, and
with the maximum in place of the sum, it is the pooled map. PyTorch's kernel for that is vectorised over channels,
parallel over bins, reads the map where it lies and gives 0 for a row without entries, which is what an empty bin is.
For its own gradient it also tells which entry of the matrix each maximum came from.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from roi.torch_path.bins import Bins
from roi.torch_path.levels import Rows, put, taken
from roi.torch_path.tables import whole_table

READS_AT_ONCE = 2**21  # entries of a matrix
VALUES_AT_ONCE = 2**21  # of a part of the output

# PyTorch says once in a process that its CSR tensors are in beta: now, to nobody, and not in the middle of a call.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), device="cpu")

# What torch.sparse.mm(…, "amax") calls. None in a PyTorch without it: then there are no argmaxima from here.
_multiply = getattr(torch.ops.aten, "_sparse_mm_reduce_impl", None)


def serves(map_: Tensor, bins: Bins) -> bool:
    """Whether `maxima` reads less than a crop for each RoI, and is right for the map.

    Without the entries' numbers the product does not tell -0 from 0. As an integer, -0 is the least of all.
    """
    if not reads_less(map_, bins):
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[map_.element_size()]
    return int(map_.view(integers).amin()) != torch.iinfo(integers).min


def serves_argmax(map_: Tensor, bins: Bins) -> bool:
    """Whether `argmaxima` reads less than a crop for each RoI, and is right for the map.

    Where all of a bin is minus infinity, the product does not tell which entry it came from; NaN would hide that.
    """
    if _multiply is None or map_.is_inference() or not reads_less(map_, bins):
        return False
    return bool(map_.amin() > -torch.inf)


def reads_less(map_: Tensor, bins: Bins) -> bool:
    """Whether the bins read more cells than the map has, which is what it takes to have the map as a table."""
    return map_.device.type == "cpu" and int(bins.cells_read().sum()) >= len(map_) * map_.shape[2] * map_.shape[3]


def maxima(map_: Tensor, bins: Bins, output: Tensor, places: Rows) -> None:
    """Fills the rows `places` of `output`, Tensor[·, C, h, w], with the maximum of each bin; 0 if it is empty."""
    table = whole_table(map_)
    for matrix in matrices(table, bins, *map_.shape[2:]):
        put(output, taken(places, matrix.rois), torch.sparse.mm(matrix.ones, table, "amax"))


def argmaxima(map_: Tensor, bins: Bins, output: Tensor, argmax: Tensor, places: Rows) -> None:
    """As `maxima`, and fills `argmax` with the cell y·W + x of the first maximum; -1 where the bin is empty."""
    # The entries' numbers come where a gradient is wanted.
    table = whole_table(map_).detach().requires_grad_()
    for matrix in matrices(table, bins, *map_.shape[2:]):
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            values, entries = _multiply(matrix.ones, table, "amax")
        put(output, taken(places, matrix.rois), values)
        # Of an empty bin the number is that of all entries.
        cells = torch.cat([matrix.cells, matrix.cells.new_tensor([-1])])
        put(argmax, taken(places, matrix.rois), cells.index_select(0, entries.view(-1)))


class Matrix(NamedTuple):
    """For the bins of some RoIs."""

    rois: slice
    ones: Tensor  # [bins, cells of all images], sparse
    cells: Tensor  # of each entry the cell y·W + x of its image


def matrices(table: Tensor, bins: Bins, height: int, width: int) -> Iterator[Matrix]:
    """In parts of bounded memory, for Tensor[N·H·W, C] `table`."""
    reads = bins.cells_read().cumsum()
    most = max(1, VALUES_AT_ONCE // (bins.top.shape[1] * bins.left.shape[1] * table.shape[1]))
    start, done = 0, 0
    while start < len(reads):
        stop = min(max(start + 1, int(reads.searchsorted(done + READS_AT_ONCE))), start + most, len(reads))
        starts, rows, cells = pattern(bins.narrow(slice(start, stop)), height, width, len(table))
        size = (len(starts) - 1, len(table))
        ones = torch.ones(len(rows), dtype=table.dtype)
        csr = torch.sparse_csr_tensor(starts, rows, ones, size, check_invariants=False)
        yield Matrix(slice(start, stop), csr, cells)
        start, done = stop, int(reads[stop - 1])


def pattern(bins: Bins, height: int, width: int, rows_of_table: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse matrix in CSR form: where each bin's entries begin, the table's row of each, its cell of the image."""
    rows = bins.heights.repeat(bins.left.shape[1], axis=1).ravel()
    columns = bins.widths[:, None, :].repeat(bins.top.shape[1], axis=1).ravel()
    first = (bins.top * width)[:, :, None] + bins.left[:, None, :]
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows * columns, out=starts[1:])
    # One run of neighbouring cells for each row of each bin: cell less place in the list is the same along it.
    length = columns.repeat(rows)
    lead = np.arange(len(length))
    lead -= (rows.cumsum() - rows).repeat(rows)  # the row's number in its bin
    lead *= width - length
    lead += (first.ravel() - starts[:-1]).repeat(rows)
    integer = np.int32 if max(rows_of_table, int(starts[-1])) < 2**31 else np.int64  # 32 bits are written in less time
    cells = lead.astype(integer).repeat(length)
    cells += np.arange(len(cells), dtype=integer)
    image = (bins.image * (height * width)).astype(integer)
    numbers = cells + image.repeat(bins.cells_read())
    return torch.from_numpy(starts.astype(integer)), torch.from_numpy(numbers), torch.from_numpy(cells)

"""RoI max pooling on the CPU as one product of a sparse matrix and the map.

The matrix has a row for each bin and a one for each of the bin's cells. Times the map, with a row for each cell, and
with the maximum in place of the sum, it is the pooled map. PyTorch's kernel for that is vectorised over channels,
parallel over bins, reads the map where it lies and gives 0 for a row without entries, which is what an empty bin is.

Positions come the same way, from keys that sort like the features and then by position.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from roi.torch_path.bins import Bins
from roi.torch_path.levels import Rows, put, taken
from roi.torch_path.memory import scratch
from roi.torch_path.tables import lies_in_rows, whole_table

READS_AT_ONCE = 2**21  # entries of a matrix
VALUES_AT_ONCE = 2**21  # of a part of the output

# PyTorch warns once in a process that CSR tensors are in beta. It is made to do so here, where nobody sees it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), device="cpu")

KEYS_AT_ONCE = 2**23  # of the images that are pooled together; eight bytes each
KEYS_IN_CACHE = 2**17

# A key of 63 bits is that of a positive, normal float64: the value's order, and the distance of the cell from the end.
POSITION_BITS = 31
POSITION = 2**POSITION_BITS - 1
OFFSET = 0x7F800001 + 2**22  # minus infinity, the lowest, comes to 2^22: above the subnormal numbers
LOWER_HALF = 0 if sys.byteorder == "little" else 1


# A cell of a crop is read, written and read again with the places, where the sizes of bins are rounded up by a half in
# both directions on average: eight accesses. The whole map is read for its sign of zero, and where it does not lie as a
# table it is read and written once more.
CROP_ACCESSES = 8
TABLE_ACCESSES, COPY_ACCESSES = 1, 3


def serves(map_: Tensor, bins: Bins) -> bool:
    """Whether `maxima` is right for the map, and accesses less memory than crops of each RoI.

    The product does not tell -0 from 0. As an integer, -0 is the least of all.
    """
    if map_.device.type != "cpu":
        return False
    accesses = TABLE_ACCESSES if lies_in_rows(map_, 1) else COPY_ACCESSES
    if CROP_ACCESSES * cells_read(bins) < accesses * cells_of(map_):
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[map_.element_size()]
    return int(map_.view(integers).amin()) != torch.iinfo(integers).min


def serves_argmax(map_: Tensor, bins: Bins) -> bool:
    """Whether `argmaxima` is right for the map, and reads less memory than crops of each RoI. No key stands for NaN."""
    fits = map_.dtype != torch.float64 and map_.shape[2] * map_.shape[3] <= POSITION
    # Keys are twice as large as values, and are written before they are read.
    return fits and cells_read(bins) >= 2 * cells_of(map_) and serves(map_, bins) and not bool(map_.amax().isnan())


def cells_read(bins: Bins) -> int:
    return int(bins.cells_read().sum())


def cells_of(map_: Tensor) -> int:
    return len(map_) * map_.shape[2] * map_.shape[3]


def maxima(map_: Tensor, bins: Bins, output: Tensor, places: Rows) -> None:
    """Fills the rows `places` of `output`, Tensor[·, C, h, w], with the maximum of each bin; 0 if it is empty."""
    table = whole_table(map_)
    for part, matrix in list(matrices(bins, map_.shape, table.dtype)):
        put(output, taken(places, part), torch.sparse.mm(matrix, table, "amax"))


def argmaxima(map_: Tensor, bins: Bins, argmax: Tensor, places: Rows) -> None:
    """Fills the rows `places` of `argmax` with the cell y·W + x of the first maximum; -1 where a bin is empty."""
    height, width = map_.shape[2:]
    step = max(1, KEYS_AT_ONCE // map_[0].numel())
    for first in range(0, len(map_), step):
        images = map_[first : first + step]
        own = np.flatnonzero((bins.image >= first) & (bins.image < first + step))
        if not len(own):
            continue
        some = bins.narrow(own)
        some = some._replace(image=some.image - first)
        keys = sort_keys(whole_table(images), height * width)
        for part, matrix in list(matrices(some, images.shape, keys.dtype)):
            found = torch.sparse.mm(matrix, keys, "amax").view(torch.int32)[:, LOWER_HALF::2].contiguous()
            cells = torch.sub(height * width, found.bitwise_and_(POSITION), out=found)
            empty = np.flatnonzero(some.narrow(part).empty())
            put(argmax, taken(places, own[part]), cells.index_fill_(0, torch.from_numpy(empty), -1))


def sort_keys(table: Tensor, cells: int) -> Tensor:
    """Tensor[rows, C] of float64 whose maximum over some rows of an image tells where that of `table` is.

    As integers: above POSITION_BITS the value's order, below them the distance of the cell from the image's end, so
    that of equal values the first has the greatest key.
    """
    keys = scratch("keys", table.shape, table, torch.int64)
    distance = torch.arange(cells, 0, -1).view(-1, 1)
    step = max(1, KEYS_IN_CACHE // max(1, table.shape[1]))
    for image in range(0, len(table), cells):
        for start in range(image, image + cells, step):
            some = slice(start, min(start + step, image + cells))
            bits = (table[some] + 0.0).view(torch.int32)  # adding 0 makes -0 equal to it
            order = bits >> 31
            order.bitwise_and_(POSITION).bitwise_xor_(bits)  # as floats sort, but from minus infinity up
            part = keys[some].copy_(order)
            part.add_(OFFSET).bitwise_left_shift_(POSITION_BITS).add_(distance[start - image : some.stop - image])
    return keys.view(torch.float64)


def matrices(bins: Bins, shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The bins of some RoIs, and a sparse Tensor[bins, cells of all images] of ones; in parts of bounded memory.

    Args:
        shape: of the maps, (N, C, H, W).
    """
    images, channels, height, width = shape
    reads = bins.cells_read().cumsum()
    most = max(1, VALUES_AT_ONCE // (bins.top.shape[1] * bins.left.shape[1] * channels))
    start, done = 0, 0
    while start < len(reads):
        stop = min(max(start + 1, int(reads.searchsorted(done + READS_AT_ONCE))), start + most, len(reads))
        starts, rows = pattern(bins.narrow(slice(start, stop)), height, width, images)
        size = (len(starts) - 1, images * height * width)
        ones = torch.ones(1, dtype=dtype).expand(len(rows)).contiguous()
        yield slice(start, stop), torch.sparse_csr_tensor(starts, rows, ones, size, check_invariants=False)
        start, done = stop, int(reads[stop - 1])


def pattern(bins: Bins, height: int, width: int, images: int) -> tuple[Tensor, Tensor]:
    """A sparse matrix in CSR form: where each bin's entries begin, and of each the row (n·H + y)·W + x of the table."""
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
    most = max(images * height * width, int(starts[-1]))
    integer = np.int32 if most < 2**31 else np.int64  # 32 bits are written in less time
    numbers = lead.astype(integer).repeat(length)
    numbers += np.arange(len(numbers), dtype=integer)
    return torch.from_numpy(starts.astype(integer)), torch.from_numpy(numbers)

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

from roi.bins import Bins, Integers
from roi.covers import Cover, cheapest
from roi.layout import empty_pooled, memory_format

READS_AT_ONCE = 2**21  # entries of a matrix
VALUES_AT_ONCE = 2**24  # of a part of the output
KEYS_AT_ONCE = 2**18  # eight bytes each, which stay in cache

# PyTorch says once in a process that its CSR tensors are in beta: now, to nobody, and not in the middle of a call.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), device="cpu")

# A key of 63 bits is that of a positive, normal float64.
POSITION_BITS = 31
POSITION = 2**POSITION_BITS - 1
OFFSET = 0x7F800001 + 2**22  # minus infinity, the lowest, comes to 2^22: above the subnormal numbers
NAN = 0x7F800001 + OFFSET  # after infinity, and below float64's


def serves(input: Tensor, with_argmax: bool) -> bool:
    """Whether `roi_pool` can do it."""
    if input.device.type != "cpu":
        return False
    return fits_keys(input) or not (with_argmax or has_negative_zero(input))


def fits_keys(input: Tensor) -> bool:
    return input.dtype != torch.float64 and input.shape[2] * input.shape[3] <= POSITION


def has_negative_zero(input: Tensor) -> bool:
    """Whether the least of the bits, as integers, are those of -0, the least of all."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[input.element_size()]
    return int(input.view(integers).amin()) == torch.iinfo(integers).min


def roi_pool(input: Tensor, bins: Bins, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """RoI max pooling: the output, and the argmax or Tensor[0], as `torch_pool.roi_pool` says.

    `input` is a Tensor[N, C, H, W] that it `serves`, not empty.
    """
    none = input.new_empty(0, dtype=torch.int32)
    if has_negative_zero(input):  # which the maximum of a product does not tell from 0
        argmax = roi_argmaxima(input, bins)
        return values_at(argmax, input, bins.image), argmax if with_argmax else none
    return roi_maxima(input, bins), roi_argmaxima(input, bins) if with_argmax else none


def roi_maxima(input: Tensor, bins: Bins) -> Tensor:
    """The maximum of each bin: NaN where the bin has one, 0 if it is empty; of zeros of unlike sign, either.

    Tensor[K, C, pooled_height, pooled_width] in the memory format of `input`.
    """
    pooled_height, pooled_width = bins.pooled_size
    for some, rows in pooled(input.permute(0, 2, 3, 1), bins, VALUES_AT_ONCE):
        part = rows.view(-1, pooled_height, pooled_width, rows.shape[1]).permute(0, 3, 1, 2)
        part = part.contiguous(memory_format=memory_format(input))  # far faster than a copy from one format to another
        if len(part) == len(bins.image):
            return part
        if some.start == 0:
            output = empty_pooled(input, len(bins.image), pooled_height, pooled_width)
        output[some] = part
    return output


def roi_argmaxima(input: Tensor, bins: Bins) -> Tensor:
    """Where each bin has its maximum: the cell y·W + x of the first, of the last NaN where there is one; -1 if empty.

    Tensor[K, C, pooled_height, pooled_width] of int32 in channels_last memory.
    """
    channels, height, width = input.shape[1:]
    has_nan = bool(input.amax().isnan())
    argmax = torch.empty(len(bins.image), *bins.pooled_size, channels, dtype=torch.int32)
    for some, rows in pooled(sort_keys(input.permute(0, 2, 3, 1), has_nan), bins, KEYS_AT_ONCE):
        cells = argmax[some]
        keys = rows.view(torch.int64).view(cells.shape)
        cells.copy_(keys).bitwise_and_(POSITION)  # of a key the lower half
        if has_nan:
            cells.copy_(torch.where(keys >> POSITION_BITS == NAN, cells - 1, height * width - cells))
        else:
            torch.sub(height * width, cells, out=cells)
    argmax.flatten(0, 2).index_fill_(0, torch.from_numpy(np.flatnonzero(bins.empty())), -1)
    return argmax.permute(0, 3, 1, 2)


def values_at(argmax: Tensor, input: Tensor, image: Integers) -> Tensor:
    """The values of `input` at the cells `argmax`, 0 at -1, in the memory format of `input`."""
    _, channels, height, width = input.shape
    cells = argmax.permute(0, 2, 3, 1).to(torch.int64)
    rows = cells.clamp(min=0) + torch.from_numpy(image * (height * width)).view(-1, 1, 1, 1)
    maps = input.permute(0, 2, 3, 1).reshape(-1, channels)
    values = maps.gather(0, rows.flatten(0, 2)).view(cells.shape).masked_fill_(cells < 0, 0)
    return values.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(input))


def sort_keys(maps: Tensor, has_nan: bool) -> Tensor:
    """Tensor[N, H, W, C] of float64 whose maximum over some cells tells where the maximum of `maps` is.

    As integers: above POSITION_BITS the value's order, below them the distance of the cell y·W + x from the end, so
    that of equal values the first has the greatest key. NaN comes last, and of several the last.
    """
    bits = (maps.float() + 0.0).view(torch.int32)  # adding 0 makes -0 equal to it
    order = bits >> 31
    order.bitwise_and_(POSITION).bitwise_xor_(bits)  # as floats sort, but from minus infinity up
    keys = order.to(torch.int64)
    keys.add_(OFFSET).bitwise_left_shift_(POSITION_BITS)
    cells = torch.arange(maps.shape[1] * maps.shape[2]).view(*maps.shape[1:3], 1)
    keys.add_(cells.numel() - cells)
    if has_nan:
        keys.copy_(torch.where(maps.isnan(), (NAN << POSITION_BITS) + 1 + cells, keys))
    return keys.view(torch.float64)


def pooled(maps: Tensor, bins: Bins, values_at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """The maxima of Tensor[N, H, W, C] `maps` in `bins`, in parts of bounded memory: RoIs, and Tensor[bins, C]."""
    reading = cheapest(bins, maps.shape)
    table = reading.table(maps).contiguous()
    reads = reading.rows_per_roi(bins).cumsum()
    most = max(1, values_at_once // (bins.top.shape[1] * bins.left.shape[1] * max(1, maps.shape[3])))
    start, done = 0, 0
    while start < len(reads):
        stop = min(max(start + 1, int(reads.searchsorted(done + READS_AT_ONCE))), start + most, len(reads))
        yield slice(start, stop), maxima(table, reading.cover(bins.narrow(start, stop)))
        start, done = stop, int(reads[stop - 1])


def maxima(table: Tensor, cover: Cover) -> Tensor:
    """Tensor[bins, C]: of every bin the maximum of its rows of `table`, Tensor[R, C]; 0 for a bin without rows."""
    rows = torch.from_numpy(cover.rows)
    if cover.starts is None:
        return table.index_select(0, rows)
    starts = torch.from_numpy(cover.starts)
    size = (len(starts) - 1, len(table))
    matrix = torch.sparse_csr_tensor(starts, rows, table.new_ones(len(rows)), size, check_invariants=False)
    result: Tensor = torch.sparse.mm(matrix, table, "amax")
    return result

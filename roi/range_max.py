"""Maxima over many rectangles of one map by a sparse table: RoI max pooling where channels are few.

The table holds the maxima of all rectangles of 2^i × 2^j cells; any rectangle is covered by four of them that overlap
(Bender & Farach-Colton, The LCA Problem Revisited, 2000, section 3, in two dimensions). Every step is one tensor
operation over all RoIs at once, where a call for each RoI would cost more than its arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roi.bins import bin_edges

MIN_WINDOWS = 16  # fewer are pooled before the costs are reckoned
TABLE_LIMIT = 2**27  # values: the table's memory is bounded, whatever the cost says


def table_is_cheaper(input: Tensor, windows: Tensor, pooled_height: int, pooled_width: int) -> bool:
    """Whether `roi_maxima` is the faster way, and gives the same bits as pooling window after window.

    The costs are nanoseconds as they were measured on one CPU; only their proportions matter. Much of the table's is
    the allocation of memory that is used once.
    """
    _, channels, height, width = input.shape
    if len(windows) < MIN_WINDOWS:
        return False
    bins = len(windows) * pooled_height * pooled_width
    rows, columns = table_sizes(windows, pooled_height, pooled_width, height, width)
    values = rows * columns * input.numel()
    sizes = len(torch.unique(windows[:, 3] * (2 * width) + windows[:, 4]))
    cells = int((windows[:, 3].clamp(max=height) * windows[:, 4].clamp(max=width)).sum())
    table = 300_000 + 4 * values + bins * (60 + 20 * channels)
    pooling = 400_000 + sizes * 30_000 + cells * (30 + channels) + bins * 0.5 * channels
    if table > pooling or values > TABLE_LIMIT:
        return False
    # `maximum` of two zeros of unlike sign may be either, and pooling gives the first.
    return not bool(((input == 0) & input.signbit()).any())


def table_sizes(windows: Tensor, pooled_height: int, pooled_width: int, height: int, width: int) -> tuple[int, int]:
    """How many powers of two the largest bin's rows and columns need: (rows, columns)."""
    tallest = min(int(windows[:, 3].max()) // pooled_height + 2, height)
    widest = min(int(windows[:, 4].max()) // pooled_width + 2, width)
    return tallest.bit_length(), widest.bit_length()


def sparse_table(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maxima of all rectangles whose sides are powers of two.

    Tensor[rows, columns, N, H, W, C] of Tensor[N, H, W, C] `maps`: at [i, j, n, y, x] the maximum of the
    2^i × 2^j cells down and right from (y, x), as far as they lie on the map.
    """
    table = maps.new_empty((rows, columns, *maps.shape))
    table[0, 0] = maps
    for i in range(rows):
        if i > 0:
            double(table[i - 1, 0], table[i, 0], 1, 2 ** (i - 1))
        for j in range(1, columns):
            double(table[i, j - 1], table[i, j], 2, 2 ** (j - 1))
    return table


def double(source: Tensor, target: Tensor, dim: int, step: int) -> None:
    """`target` = the maximum of `source` and of itself `step` cells on, along `dim`."""
    kept = max(source.shape[dim] - step, 0)
    torch.maximum(
        source.narrow(dim, 0, kept), source.narrow(dim, source.shape[dim] - kept, kept), out=target.narrow(dim, 0, kept)
    )
    rest = source.shape[dim] - kept
    target.narrow(dim, kept, rest).copy_(source.narrow(dim, kept, rest))


def roi_maxima(input: Tensor, windows: Tensor, pooled_height: int, pooled_width: int) -> Tensor:
    """The maximum of every bin.

    Args:
        input: Tensor[N, C, H, W].
        windows: Tensor[K, 5] of int64 (image, y, x, height, width) in cells, not clipped to the map.
        pooled_height, pooled_width: bins.

    Returns:
        Tensor[K, C, pooled_height, pooled_width], NaN where a bin has a NaN; of a bin off the map, any cell's value.
    """
    _, channels, height, width = input.shape
    maps = input.permute(0, 2, 3, 1)
    image, y, x, h, w = windows.unbind(1)
    top, bottom = bin_edges(y, h, pooled_height, height)
    left, right = bin_edges(x, w, pooled_width, width)
    table = sparse_table(maps, *table_sizes(windows, pooled_height, pooled_width, height, width))
    powers = torch.tensor([max(n.bit_length() - 1, 0) for n in range(max(height, width) + 1)], device=input.device)
    i, j = powers[(bottom - top).clamp(min=0)], powers[(right - left).clamp(min=0)]
    rows = [first.clamp(0, height - 1) for first in (top, bottom - (1 << i))]
    columns = [first.clamp(0, width - 1) for first in (left, right - (1 << j))]

    # Entry (i, j, n, y, x) of the table, as a sum of what depends on the bin's row and what depends on its column.
    entries = table.view(-1, channels)
    row_starts = [((i * (table.shape[1] * len(maps)) + image[:, None]) * height + row) * width for row in rows]
    column_starts = [j * (len(maps) * height * width) + column for column in columns]
    covers = [
        entries.index_select(0, (start[:, :, None] + column[:, None, :]).flatten())
        for start in row_starts
        for column in column_starts
    ]
    maxima = torch.maximum(torch.maximum(covers[0], covers[1]), torch.maximum(covers[2], covers[3]))
    return maxima.view(len(windows), pooled_height, pooled_width, channels).permute(0, 3, 1, 2)

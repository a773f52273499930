"""The geometry of RoI pooling: windows of cells and their bins, in integers.

A window is a RoI on the map, in cells, not clipped to it. Bin p of P over a side [start, start + size) is
floor(p·size/P) … ceil((p+1)·size/P) from its start, then clipped to the map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_CELL = 2**30  # coordinates saturate here, so that bins are exact in 32-bit integers everywhere


def round_half_away(x: Tensor) -> Tensor:
    """C's `round`; `torch.round` rounds halves to even."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0)


def roi_windows(rois: Tensor, spatial_scale: float) -> Tensor:
    """Tensor[K, 5] of int64 (image, y, x, height, width) for Tensor[K, 5] `rois`, whose rows must be finite.

    Both ends of a RoI are inclusive, and it has at least one cell.
    """
    cells = round_half_away(rois[:, 1:] * spatial_scale).clamp(-MAX_CELL, MAX_CELL).to(torch.int64)
    x1, y1, x2, y2 = cells.unbind(1)
    height, width = (y2 - y1 + 1).clamp(min=1), (x2 - x1 + 1).clamp(min=1)
    return torch.stack([rois[:, 0].to(torch.int64), y1, x1, height, width], dim=1)


def bin_edges(start: Tensor, size: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """First cell and end of every bin of the sides [start, start + size) on the map [0, limit): Tensor[K, bins] each.

    The end is not beyond the first cell where a bin lies off the map.
    """
    p = torch.arange(bins, device=start.device)
    low = start[:, None] + p * size[:, None] // bins
    high = start[:, None] - (-(p + 1) * size[:, None] // bins)
    return low.clamp(0, limit), high.clamp(0, limit)


def empty_bins(windows: Tensor, pooled_height: int, pooled_width: int, height: int, width: int) -> Tensor:
    """Tensor[K, pooled_height, pooled_width] of bool: which bins of Tensor[K, 5] `windows` lie off the map."""
    top, bottom = bin_edges(windows[:, 1], windows[:, 3], pooled_height, height)
    left, right = bin_edges(windows[:, 2], windows[:, 4], pooled_width, width)
    return (bottom <= top)[:, :, None] | (right <= left)[:, None, :]


class Side(NamedTuple):
    """One side of a window in a form that adaptive pooling can take."""

    cells: list[int]  # of the map
    bins: slice  # of the output, that adaptive pooling makes of the cells; the others lie off the map


def clipped_side(start: int, size: int, bins: int, limit: int) -> Side:
    """The bins of a side [start, start + size) that meet the map [0, limit), where some do.

    They are brought to one length by repeating each one's last cell, which changes neither its maximum nor where that
    is found. So the number of cells is bounded by the map's, however far the side reaches beyond it.
    """
    edges = [(start + p * size // bins, start - (-(p + 1) * size // bins)) for p in range(bins)]
    on_map = [p for p, (low, high) in enumerate(edges) if high > 0 and low < limit]
    clipped = [range(max(edges[p][0], 0), min(edges[p][1], limit)) for p in on_map]
    longest = max(map(len, clipped))
    return Side(
        [bin[min(i, len(bin) - 1)] for bin in clipped for i in range(longest)], slice(on_map[0], on_map[-1] + 1)
    )

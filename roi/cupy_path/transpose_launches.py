"""From one memory format to the other: launches of transpose.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from roi.cupy_path import launch

SIDE, LINES = 32, 8  # of a block's square, and lines of it that are moved at a time
TYPES = {**launch.FEATURES, **launch.INDICES}


def to_channels_last(x: Tensor) -> Tensor:
    """A copy of contiguous Tensor[N, C, H, W] in channels_last memory."""
    copy = torch.empty_like(x, memory_format=torch.channels_last)
    transpose(x, copy, x.shape[1], x.shape[2] * x.shape[3])
    return copy


def to_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of Tensor[N, C, H, W] in channels_last memory, rounded to `dtype`."""
    copy = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    transpose(x, copy, x.shape[2] * x.shape[3], x.shape[1])
    return copy


def transpose(source: Tensor, target: Tensor, rows: int, columns: int) -> None:
    """Writes (N, rows, columns) as (N, columns, rows)."""
    squares = source.shape[0] * launch.ceil_divide(rows, SIDE) * launch.ceil_divide(columns, SIDE)
    if squares == 0:
        return
    expression = f"roi::transpose<{TYPES[source.dtype]}, {TYPES[target.dtype]}>"
    grid = launch.LaunchGrid((squares, 1), (SIDE, LINES), SIDE * (SIDE + 1) * source.element_size())
    arguments = (source.data_ptr(), target.data_ptr(), *launch.int32(rows, columns))
    launch.run("transpose", expression, grid, arguments, source.device)

"""The two records that describe a call of any operator: what is asked for, and of which maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVEL_EPSILON = 1e-6  # added to a box's level, that one of exactly a level's size is not put below it by rounding


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` is that and not contiguous too (as with one channel); contiguous otherwise."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def level_range(scales: Sequence[float]) -> tuple[int, int]:
    """The levels of the first and of the last map: -log2 of their scales, in float32 and without the fraction."""
    first, last = (int(-np.log2(np.float32(scale))) for scale in (scales[0], scales[-1]))
    return first, last


class Pooling(NamedTuple):
    """What is asked for. One map is a pyramid of one level.

    Attributes:
        scales: of each level, cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up. For RoIAlign.
        aligned: whether a cell's value is that at its centre, and not at its corner. For RoIAlign.
        canonical_scale, canonical_level: a box of that size, in its units, belongs to that level (Lin et al., Feature
            Pyramid Networks, 2017, equation 1). With one level they mean nothing.
        position_sensitive: whether each bin has channels of its own (Dai et al., R-FCN, 2016, equation 1).
    """

    scales: tuple[float, ...]
    pooled_height: int
    pooled_width: int
    sampling_ratio: int = -1
    aligned: bool = False
    canonical_scale: float = 224
    canonical_level: float = 4
    position_sensitive: bool = False

    @property
    def bins(self) -> int:
        return self.pooled_height * self.pooled_width

    def output_channels(self, channels: int) -> int:
        """Channels of the output, of maps that have so many."""
        return channels // self.bins if self.position_sensitive else channels


class Maps(NamedTuple):
    """Shape and memory format of the maps of a pyramid: Tensor[batch, channels, heights[l], widths[l]] each."""

    batch: int
    channels: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    channels_last: bool

    @classmethod
    def of(cls, features: Sequence[Tensor]) -> Maps:
        """Of the maps themselves; the first one's memory format stands for all."""
        batch, channels, *_ = features[0].shape
        heights, widths = tuple(x.shape[2] for x in features), tuple(x.shape[3] for x in features)
        return cls(batch, channels, heights, widths, memory_format(features[0]) is torch.channels_last)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each level."""
        return list(zip(self.heights, self.widths, strict=True))

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        return [(self.batch, self.channels, *size) for size in self.sizes]

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

"""RoIAlign and the position-sensitive operators, whose bins are weighted sums: dense weights of rows times columns."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.bins import bin_slice, to_cell
from tests.reference.levels import ONE_LEVEL, Array, is_valid, level_of


def bilinear_weights(
    low: np.floating, high: np.floating, scale: float, bins: int, cells: int, sampling_ratio: int, aligned: bool
) -> Array:
    """RoIAlign along one axis: (bins, cells), the mean weights of a bin's samples, which are taken one by one.

    Where samples are is computed in the coordinates' dtype.
    """
    number = low.dtype.type
    offset = number(0.5 if aligned else 0)
    with np.errstate(over="ignore"):
        start, end = (np.clip(x * number(scale), -(2**30), 2**30).astype(number) - offset for x in (low, high))
    length = (end - start if aligned else max(end - start, number(1))) / number(bins)
    grid = sampling_ratio if sampling_ratio > 0 else max(int(np.ceil(length)), 0)
    weights = np.zeros((bins, cells))
    for p in range(bins):

        def position(i: int, p: int = p) -> np.floating:
            return (start + number(p) * length) + (number(i) + number(0.5)) * length / number(grid)

        samples = range(grid)
        if sampling_ratio <= 0:  # such samples are in order: leave out those off the map, which may be billions
            first = bisect.bisect_left(samples, True, key=lambda i: bool(position(i) >= -1))
            samples = range(first, bisect.bisect_left(samples, True, key=lambda i: bool(position(i) > cells)))
        for i in samples:
            if -1 <= position(i) <= cells:
                y = min(max(float(position(i)), 0.0), cells - 1.0)
                cell = int(y)
                weights[p, cell] += 1 - (y - cell)
                if cell + 1 < cells:
                    weights[p, cell + 1] += y - cell
    return weights / max(grid, 1)


def average_weights(low: np.floating, high: np.floating, scale: float, bins: int, cells: int) -> Array:
    """PSRoIPool along one axis: (bins, cells). The box has not its last cell, nor has the map."""
    first, end = to_cell(low, scale), to_cell(high, scale)
    weights = np.zeros((bins, cells))
    for p in range(bins):
        covered = bin_slice(first, max(end - first, 1), p, bins, cells - 1)
        weights[p, covered] = 1 / max(covered.stop - covered.start, 1)
    return weights


class WeightedPool:
    """An operator by the weights of its two axes: slow, in float64, and its gradient is the transpose of it.

    Args:
        weights: (low, high, scale, bins, cells) -> (bins, cells), of one axis of a box.
        bins: of the output, (height, width).
        position_sensitive: whether channel c of bin b is made of channel c * PH * PW + b.
    """

    def __init__(self, weights: Callable[..., Array], bins: tuple[int, int], position_sensitive: bool) -> None:
        self.weights, self.bins, self.position_sensitive = weights, bins, position_sensitive
        self.channels_per_output = bins[0] * bins[1] if position_sensitive else 1

    def axes(self, box: Array, scale: float, height: int, width: int) -> tuple[Array, Array]:
        rows = self.weights(box[2], box[4], scale, self.bins[0], height)
        return rows, self.weights(box[1], box[3], scale, self.bins[1], width)

    def forward(
        self,
        maps: Sequence[Array],
        rois: Array,
        scales: Sequence[float],
        canonical: tuple[float, float] = ONE_LEVEL,
    ) -> Array:
        """(K, C', PH, PW) for maps (N, C, H, W) of each level and rois (K, 5)."""
        images, channels = maps[0].shape[:2]
        output = np.zeros((len(rois), channels // self.channels_per_output, *self.bins))
        for k, box in enumerate(rois):
            if not is_valid(box, images):
                output[k] = np.nan
            elif (level := level_of(box, scales, canonical)) is not None:
                image = maps[level][int(box[0])]
                rows, columns = self.axes(box, scales[level], *image.shape[1:])
                if self.position_sensitive:
                    image = image.reshape(-1, *self.bins, *image.shape[1:])
                    output[k] = np.einsum("py,qx,cpqyx->cpq", rows, columns, image)
                else:
                    output[k] = np.einsum("py,qx,cyx->cpq", rows, columns, image)
        return output

    def backward(
        self,
        grad: Array,
        maps: Sequence[Array],
        rois: Array,
        scales: Sequence[float],
        canonical: tuple[float, float] = ONE_LEVEL,
    ) -> list[Array]:
        """Gradient of each map, of which only the shape matters, for that of the output (K, C', PH, PW)."""
        gradients = [np.zeros(map_.shape) for map_ in maps]
        for k, box in enumerate(rois):
            if not is_valid(box, len(maps[0])) or (level := level_of(box, scales, canonical)) is None:
                continue
            image = gradients[level][int(box[0])]
            rows, columns = self.axes(box, scales[level], *image.shape[1:])
            if self.position_sensitive:
                image += np.einsum("py,qx,cpq->cpqyx", rows, columns, grad[k]).reshape(image.shape)
            else:
                image += np.einsum("py,qx,cpq->cyx", rows, columns, grad[k])
        return gradients


def roi_align(bins: tuple[int, int], sampling_ratio: int, aligned: bool) -> WeightedPool:
    weights = functools.partial(bilinear_weights, sampling_ratio=sampling_ratio, aligned=aligned)
    return WeightedPool(weights, bins, position_sensitive=False)


def ps_roi_align(bins: tuple[int, int], sampling_ratio: int) -> WeightedPool:
    weights = functools.partial(bilinear_weights, sampling_ratio=sampling_ratio, aligned=True)
    return WeightedPool(weights, bins, position_sensitive=True)


def ps_roi_pool(bins: tuple[int, int]) -> WeightedPool:
    return WeightedPool(average_weights, bins, position_sensitive=True)

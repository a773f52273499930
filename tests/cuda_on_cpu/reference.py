"""The operators written down once more, slowly: Python integers, exact fractions, dense matrices, one bin at a time."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FARTHEST_CELL = 2**30


def to_cell(coordinate: np.floating, scale: float) -> int:
    """Scaled in the coordinate's dtype, rounded half away from zero, saturated."""
    with np.errstate(over="ignore"):
        scaled = coordinate * coordinate.dtype.type(scale)
    if np.isinf(scaled):
        return FARTHEST_CELL if scaled > 0 else -FARTHEST_CELL
    magnitude = int(abs(Fraction(float(scaled))) + Fraction(1, 2))
    return min(magnitude, FARTHEST_CELL) * (-1 if scaled < 0 else 1)


def bin_slice(start: int, size: int, i: int, bins: int, cells: int) -> slice:
    begin = start + i * size // bins
    end = start - (-(i + 1) * size // bins)
    return slice(min(max(begin, 0), cells), min(max(end, 0), cells))


def roi_pool(
    features: npt.NDArray[np.floating],
    rois: npt.NDArray[np.floating],
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]:
    """Output and argmax, (K, C, PH, PW) both, for features (N, C, H, W) and rois (K, 5)."""
    images, channels, height, width = features.shape
    output = np.zeros((len(rois), channels, pooled_height, pooled_width), dtype=features.dtype)
    argmax = np.full(output.shape, -1, dtype=np.int64)
    for k, box in enumerate(rois):
        if not np.isfinite(box).all() or not 0 <= box[0] < images:
            output[k] = np.nan
            continue
        x1, y1, x2, y2 = (to_cell(coordinate, spatial_scale) for coordinate in box[1:])
        for i in range(pooled_height):
            rows = bin_slice(y1, max(y2 - y1 + 1, 1), i, pooled_height, height)
            for j in range(pooled_width):
                columns = bin_slice(x1, max(x2 - x1 + 1, 1), j, pooled_width, width)
                window = features[int(box[0]), :, rows, columns]
                if window.size == 0:
                    continue
                cells = window.reshape(channels, -1)
                nan = np.isnan(cells)
                # NumPy's argmax is the first maximum or NaN; of several NaN it is to be the last.
                last_nan = cells.shape[1] - 1 - nan[:, ::-1].argmax(axis=1)
                best = np.where(nan.any(axis=1), last_nan, cells.argmax(axis=1))
                y, x = np.unravel_index(best, window.shape[1:])
                argmax[k, :, i, j] = (y + rows.start) * width + x + columns.start
                output[k, :, i, j] = cells[np.arange(channels), best]
    return output, argmax


def roi_pool_backward(
    grad: npt.NDArray[np.floating],
    rois: npt.NDArray[np.floating],
    argmax: npt.NDArray[np.int64],
    shape: tuple[int, int, int, int],
) -> npt.NDArray[np.floating]:
    """Gradient of the input, summed in grad's dtype in the order of the boxes and, within one, of the bins."""
    images, channels, height, width = shape
    grad_input = np.zeros((images, channels, height * width), dtype=grad.dtype)
    k, c, _, _ = index = np.nonzero(argmax >= 0)
    np.add.at(grad_input, (rois[k, 0].astype(np.int64), c, argmax[index]), grad[index])
    return grad_input.reshape(shape)


# --- Operators whose bins are weighted sums, of rows times columns


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
        position_sensitive: whether channel c of bin b is made of channel c * PH * PW + b.
    """

    def __init__(self, weights: Callable[..., Array], bins: tuple[int, int], position_sensitive: bool) -> None:
        self.weights, self.bins, self.position_sensitive = weights, bins, position_sensitive
        self.channels_per_output = bins[0] * bins[1] if position_sensitive else 1

    def axes(self, box: Array, scale: float, height: int, width: int) -> tuple[Array, Array]:
        rows = self.weights(box[2], box[4], scale, self.bins[0], height)
        return rows, self.weights(box[1], box[3], scale, self.bins[1], width)

    def forward(self, maps: list[Array], rois: Array, scales: list[float], canonical: tuple[float, float]) -> Array:
        """(K, C', PH, PW) for maps (N, C, H, W) of each level."""
        images, channels = maps[0].shape[:2]
        output = np.full((len(rois), channels // self.channels_per_output, *self.bins), np.nan)
        for k, box in enumerate(rois):
            if is_valid(box, images):
                features, scale = _of_box(maps, box, scales, canonical)
                image = features[int(box[0])]
                rows, columns = self.axes(box, scale, *image.shape[1:])
                if self.position_sensitive:
                    image = image.reshape(-1, *self.bins, *image.shape[1:])
                    output[k] = np.einsum("py,qx,cpqyx->cpq", rows, columns, image)
                else:
                    output[k] = np.einsum("py,qx,cyx->cpq", rows, columns, image)
        return output

    def backward(
        self,
        grad: Array,
        rois: Array,
        scales: list[float],
        canonical: tuple[float, float],
        shapes: list[tuple[int, int, int, int]],
    ) -> list[Array]:
        """Gradients of maps of such shapes, for that of the output (K, C', PH, PW)."""
        maps = [np.zeros(shape) for shape in shapes]
        for k, box in enumerate(rois):
            if is_valid(box, shapes[0][0]):
                target, scale = _of_box(maps, box, scales, canonical)
                image = target[int(box[0])]
                rows, columns = self.axes(box, scale, *image.shape[1:])
                if self.position_sensitive:
                    image += np.einsum("py,qx,cpq->cpqyx", rows, columns, grad[k]).reshape(image.shape)
                else:
                    image += np.einsum("py,qx,cpq->cyx", rows, columns, grad[k])
        return maps


def roi_align(bins: tuple[int, int], sampling_ratio: int, aligned: bool) -> WeightedPool:
    weights = functools.partial(bilinear_weights, sampling_ratio=sampling_ratio, aligned=aligned)
    return WeightedPool(weights, bins, position_sensitive=False)


def ps_roi_align(bins: tuple[int, int], sampling_ratio: int) -> WeightedPool:
    weights = functools.partial(bilinear_weights, sampling_ratio=sampling_ratio, aligned=True)
    return WeightedPool(weights, bins, position_sensitive=True)


def ps_roi_pool(bins: tuple[int, int]) -> WeightedPool:
    return WeightedPool(average_weights, bins, position_sensitive=True)


def is_valid(box: Array, images: int) -> bool:
    return bool(np.isfinite(box).all() and 0 <= box[0] < images)


def level_of(box: Array, scales: list[float], canonical: tuple[float, float]) -> int:
    """Lin et al., Feature Pyramid Networks (2017), equation 1, in the box's dtype, as an index into `scales`."""
    number = box.dtype.type
    with np.errstate(all="ignore"):
        side = np.sqrt((box[3] - box[1]) * (box[4] - box[2]))
        level = np.floor(number(canonical[1]) + np.log2(side / number(canonical[0])) + number(1e-6))
    above = level + np.log2(scales[0])
    return 0 if not above > 0 else int(min(above, len(scales) - 1))


def _of_box(maps: list[Array], box: Array, scales: list[float], canonical: tuple[float, float]) -> tuple[Array, float]:
    level = level_of(box, scales, canonical) if len(maps) > 1 else 0
    return maps[level], scales[level]

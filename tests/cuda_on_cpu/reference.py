"""RoI max pooling written down once more, slowly: Python integers, exact fractions, one bin at a time."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

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
                if window[0].size == 0:
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

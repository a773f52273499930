"""RoI max pooling of one map and of a pyramid: one bin at a time, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.reference.bins import bin_slice, to_cell
from tests.reference.levels import ONE_LEVEL, Array, is_valid, level_of


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
        if not is_valid(box, images):
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
    shape: tuple[int, ...],
) -> npt.NDArray[np.floating]:
    """Gradient of the input, summed in grad's dtype in the order of the boxes and, within one, of the bins."""
    images, channels, height, width = shape
    grad_input = np.zeros((images, channels, height * width), dtype=grad.dtype)
    k, c, _, _ = index = np.nonzero(argmax >= 0)
    np.add.at(grad_input, (rois[k, 0].astype(np.int64), c, argmax[index]), grad[index])
    return grad_input.reshape(shape)


class MaxPool:
    """Max pooling of each box on its level of a pyramid.

    Args:
        bins: of the output, (height, width).
    """

    def __init__(self, bins: tuple[int, int]) -> None:
        self.bins = bins

    def with_argmax(
        self,
        maps: Sequence[Array],
        rois: Array,
        scales: Sequence[float],
        canonical: tuple[float, float] = ONE_LEVEL,
    ) -> tuple[Array, Array]:
        """Output and argmax, (K, C, PH, PW) both, for maps (N, C, H, W) of each level and rois (K, 5)."""
        output = np.zeros((len(rois), maps[0].shape[1], *self.bins), dtype=maps[0].dtype)
        argmax = np.full(output.shape, -1, dtype=np.int64)
        for k, box in enumerate(rois):
            level = level_of(box, scales, canonical) if is_valid(box, len(maps[0])) else 0
            if level is not None:
                pooled = roi_pool(maps[level], box[None], scales[level], *self.bins)
                output[k : k + 1], argmax[k : k + 1] = pooled
        return output, argmax

    def forward(
        self,
        maps: Sequence[Array],
        rois: Array,
        scales: Sequence[float],
        canonical: tuple[float, float] = ONE_LEVEL,
    ) -> Array:
        """The output alone."""
        return self.with_argmax(maps, rois, scales, canonical)[0]

    def backward(
        self,
        grad: Array,
        maps: Sequence[Array],
        rois: Array,
        scales: Sequence[float],
        canonical: tuple[float, float] = ONE_LEVEL,
    ) -> list[Array]:
        """Gradient of each map, for that of the output; in grad's dtype, summed in the order of the boxes and bins."""
        _, argmax = self.with_argmax(maps, rois, scales, canonical)
        levels = np.array([-1 if (level := level_of(box, scales, canonical)) is None else level for box in rois])
        gradients = []
        for level, map_ in enumerate(maps):
            mine = levels == level
            gradients.append(roi_pool_backward(grad[mine], rois[mine], argmax[mine], map_.shape))
        return gradients

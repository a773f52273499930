"""RoIAlign and position-sensitive pooling written down once more, slowly: one sample at a time, in float64."""

from __future__ import annotations

import math

from torch import Tensor


def interpolated(map_: Tensor, y: float, x: float) -> Tensor:
    """Tensor[C] of Tensor[C, H, W] at (y, x): 0 more than a cell beyond the outermost cells' centres."""
    height, width = map_.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return map_.new_zeros(len(map_))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = map_[:, top, left] * (1 - (x - left)) + map_[:, top, right] * (x - left)
    lower = map_[:, bottom, left] * (1 - (x - left)) + map_[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def roi_align(
    input: Tensor,
    rois: Tensor,
    pooled: tuple[int, int],
    scale: float,
    ratio: int,
    aligned: bool,
    position_sensitive: bool = False,
) -> Tensor:
    """Of Tensor[N, C, H, W] and valid Tensor[K, 5], both float64."""
    height, width = pooled
    channels = input.shape[1] // (height * width) if position_sensitive else input.shape[1]
    output = input.new_zeros(len(rois), channels, height, width)
    for k, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0.0) for c in corners)
        roi_height, roi_width = y2 - y1, x2 - x1
        if not aligned:
            roi_height, roi_width = max(roi_height, 1.0), max(roi_width, 1.0)
        rows = ratio if ratio > 0 else math.ceil(roi_height / height)
        columns = ratio if ratio > 0 else math.ceil(roi_width / width)
        for p in range(height):
            for q in range(width):
                own = slice(p * width + q, None, height * width) if position_sensitive else slice(None)
                for i in range(rows):
                    for j in range(columns):
                        y = y1 + p * (roi_height / height) + (i + 0.5) * (roi_height / height) / rows
                        x = x1 + q * (roi_width / width) + (j + 0.5) * (roi_width / width) / columns
                        output[k, :, p, q] += interpolated(input[int(image), own], y, x)
        output[k] /= max(rows * columns, 1)
    return output


def ps_roi_pool(input: Tensor, rois: Tensor, pooled: tuple[int, int], scale: float) -> Tensor:
    """Of Tensor[N, C·height·width, H, W] and valid Tensor[K, 5], both float64."""
    height, width = pooled
    output = input.new_zeros(len(rois), input.shape[1] // (height * width), height, width)
    for k, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (int(math.copysign(math.floor(abs(c * scale) + 0.5), c)) for c in corners)
        h, w = max(y2 - y1, 1), max(x2 - x1, 1)
        for p in range(height):
            for q in range(width):
                rows = [
                    y for y in range(y1 + p * h // height, y1 - (-(p + 1) * h // height)) if 0 <= y < input.shape[2] - 1
                ]
                columns = [
                    x for x in range(x1 + q * w // width, x1 - (-(q + 1) * w // width)) if 0 <= x < input.shape[3] - 1
                ]
                own = input[int(image), p * width + q :: height * width]
                if rows and columns:
                    output[k, :, p, q] = own[:, rows][:, :, columns].mean(dim=(1, 2))
    return output

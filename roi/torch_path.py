"""The pure-torch implementations of the RoI operators."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roi import adaptive_max, sparse_max
from roi.bins import Bins, roi_windows
from roi.boxes import valid_rows
from roi.layout import argmax_format, empty_argmax, empty_pooled, memory_format

VALUES_AT_ONCE = 2**21  # of the gradient


def roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling (Girshick, Fast R-CNN, 2015, section 2.1).

    Args:
        input: Tensor[N, C, H, W], any floating-point dtype.
        rois: Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64. From a device they are read back.
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.
        with_argmax: whether to keep what the gradient needs.

    Returns:
        output: Tensor[K, C, pooled_height, pooled_width]; a row that is not finite or off the batch is NaN.
        argmax: the same shape, integer: the cell y·W + x of the first maximum (of the last NaN where there is
            one), -1 for an empty bin; Tensor[0] where it was not asked for.
    """
    boxes = rois.detach().cpu().numpy()
    valid = valid_rows(boxes, input.shape[0])
    if not valid.all():
        boxes = np.where(valid[:, None], boxes, 0)
    windows = roi_windows(boxes, spatial_scale)
    if input.numel() == 0 or len(rois) == 0:  # with no image, no row is valid
        output = empty_pooled(input, len(rois), pooled_height, pooled_width).fill_(torch.nan)
        return output, empty_argmax(input, output, with_argmax, argmax_format(input)).fill_(-1)
    bins = Bins.of(windows, pooled_height, pooled_width, *input.shape[2:])
    if sparse_max.serves(input, with_argmax) and not few(bins, input):
        output, argmax = sparse_max.roi_pool(input, bins, with_argmax)
    else:
        output, argmax = adaptive_max.roi_pool(input, windows, pooled_height, pooled_width, with_argmax)
    if not valid.all():
        rejected = torch.from_numpy(~valid).to(output.device)
        output[rejected] = torch.nan
        if with_argmax:
            argmax[rejected] = -1
    return output, argmax


def few(bins: Bins, input: Tensor) -> bool:
    """Whether a contiguous map is more work to convert to channels_last than its few RoIs are to pool as it lies.

    The costs are nanoseconds as they were measured on one CPU; only their proportions matter.
    """
    if memory_format(input) is torch.channels_last or 40_000 * len(bins.image) > 2 * input.numel():
        return False
    per_channel = int(bins.cells_read().sum()) + 3 * bins.empty().size
    return 40_000 * len(bins.image) + per_channel * input.shape[1] < 2 * input.numel()


def roi_pool_backward(
    grad: Tensor, rois: Tensor, argmax: Tensor, spatial_scale: float, batch: int, channels: int, height: int, width: int
) -> Tensor:
    """Gradient of `roi_pool` with respect to its input: each bin's gradient is added at the bin's argmax.

    Half precision is accumulated in float32.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width].
        rois, spatial_scale: those of the forward pass.
        argmax: as `roi_pool` gave it.
        batch, channels, height, width: shape of the forward pass's input.

    Returns:
        Tensor[N, C, H, W] of the dtype of `grad`, in the memory format of `argmax`.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(batch * (1 + height * width), channels, dtype=wide, device=grad.device)
    if not total.numel():  # no image: no row was valid
        return total.to(grad.dtype).view(batch, channels, height, width)
    step = max(VALUES_AT_ONCE, total.numel()) // max(grad[:1].numel(), 1) + 1
    grad = grad.contiguous(memory_format=torch.channels_last)
    for start in range(0, len(rois) if grad.numel() else 0, step):
        some = slice(start, start + step)
        index, terms = cell_rows(argmax[some], rois[some], batch, height * width), as_rows(grad[some].to(wide))
        if grad.device.type == "cpu":
            # To the gradient of max pooling the images are one tall map and the RoIs one tall output. On the CPU it
            # adds whatever indices it is given, one after the other, at twice the speed of `scatter_add_`.
            total += as_rows(torch.ops.aten.adaptive_max_pool2d_backward(tall(terms), tall(total), tall(index)))
        else:
            total.scatter_add_(0, index, terms)
    cells = total.view(batch, 1 + height * width, channels)[:, 1:].to(grad.dtype)
    maps = cells.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return maps.contiguous(memory_format=memory_format(argmax))


def roi_pool_gather(features: Tensor, rois: Tensor, argmax: Tensor) -> Tensor:
    """The values of `features`, Tensor[N, C, H, W], at `argmax`, and 0 where there is none: the pooling of a tangent.

    It is the adjoint of `roi_pool_backward`, and so its gradient. Built of differentiable operators.
    """
    batch, channels, height, width = features.shape
    if batch == 0 or channels == 0:
        return features.new_zeros(argmax.shape)
    maps = F.pad(features.flatten(2).transpose(1, 2), (0, 0, 1, 0))  # a row of zeros before each image's cells
    values = maps.reshape(-1, channels).gather(0, cell_rows(argmax, rois, batch, height * width))
    count, _, pooled_height, pooled_width = argmax.shape
    return values.view(count, pooled_height, pooled_width, channels).permute(0, 3, 1, 2)


def cell_rows(argmax: Tensor, rois: Tensor, batch: int, cells: int) -> Tensor:
    """The cells `argmax` as rows of a tensor that has for each image a row for "none" (-1), then one for each cell.

    Tensor[K·pooled_height·pooled_width, C] of int64.
    """
    image = rois[:, 0].nan_to_num().clamp(0, batch - 1).to(torch.int64)  # rejected boxes have no argmax
    first = (image * (1 + cells) + 1).repeat_interleave(argmax.shape[2] * argmax.shape[3])
    return as_rows(argmax).to(torch.int64).add_(first[:, None])


def tall(rows: Tensor) -> Tensor:
    """Tensor[1, C, R, 1] in channels_last memory of Tensor[R, C] `rows`."""
    return rows.view(1, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)


def as_rows(x: Tensor) -> Tensor:
    """Tensor[N·H·W, C] of Tensor[N, C, H, W]: no copy where that is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


# The other operators, a file for each family. Last, for the pyramid's max pooling is made of the above.
from roi.torch_align import (  # noqa: E402, F401
    multiscale_roi_align,
    multiscale_roi_align_backward,
    roi_align,
    roi_align_backward,
)
from roi.torch_multiscale_pool import multiscale_roi_pool, multiscale_roi_pool_backward  # noqa: E402, F401
from roi.torch_position_sensitive import (  # noqa: E402, F401
    ps_roi_align,
    ps_roi_align_backward,
    ps_roi_pool,
    ps_roi_pool_backward,
)

"""RoI max pooling and its gradient: the pure-torch implementation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from roi import adaptive_max, sparse_max
from roi.bins import Bins, Integers, roi_windows
from roi.boxes import valid_rows
from roi.layout import argmax_format, empty_argmax, empty_gradient, empty_pooled, format_of, memory_format

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
    all_valid = valid.all()
    if not all_valid:
        boxes = np.where(valid[:, None], boxes, 0)
    if input.numel() == 0 or len(rois) == 0:  # with no image, no row is valid
        output = empty_pooled(input, len(rois), pooled_height, pooled_width).fill_(torch.nan)
        return output, empty_argmax(input, output, with_argmax, argmax_format(input)).fill_(-1)
    windows = roi_windows(boxes, spatial_scale)
    if few(windows, input, with_argmax) or not sparse_max.serves(input, with_argmax):
        output, argmax = adaptive_max.roi_pool(input, windows, pooled_height, pooled_width, with_argmax)
    else:
        bins = Bins.of(windows, pooled_height, pooled_width, *input.shape[2:])
        output, argmax = sparse_max.roi_pool(input, bins, with_argmax)
    if not all_valid:
        rejected = torch.from_numpy(~valid).to(output.device)
        output[rejected] = torch.nan
        if with_argmax:
            argmax[rejected] = -1
    return output, argmax


def few(windows: Integers, input: Tensor, with_argmax: bool) -> bool:
    """Whether it is less work to pool RoI by RoI than to prepare the whole map for all of them.

    The costs are nanoseconds as they were measured on one CPU; only their proportions matter.
    """
    channels, height, width = input.shape[1:]
    at_once: float
    if with_argmax:
        one_by_one, at_once = len(windows) * (60_000 + 600 * channels), 700_000 + 9 * input.numel()
    else:
        one_by_one, at_once = len(windows) * (30_000 + 250 * channels), 320_000 + 0.3 * input.numel()
    if one_by_one < at_once or memory_format(input) is torch.channels_last:
        return one_by_one < at_once
    # Cells of contiguous maps are copied to channels_last: at once all, one by one at most those.
    copied = min(adaptive_max.cells_cropped(windows, height, width), len(input) * height * width) * channels
    return one_by_one + 1.5 * copied < at_once + 1.5 * input.numel()


def roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of `roi_pool` with respect to its input: each bin's gradient is added at the bin's argmax.

    Half precision is accumulated in float32.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width].
        rois, spatial_scale: those of the forward pass.
        argmax: as `roi_pool` gave it.
        batch, channels, height, width: shape of the forward pass's input.
        channels_last: the memory format of the result; otherwise it is contiguous.

    Returns:
        Tensor[N, C, H, W] of the dtype of `grad`.
    """
    shape = (batch, channels, height, width)
    if grad.numel() * batch == 0:  # with no image, no row was valid
        return empty_gradient(grad, shape, channels_last).zero_()
    if grad.device.type == "cpu" and not channels_last and 5 * argmax[:, 0].numel() < batch * height * width:
        total = summed_planes(grad, rois, argmax, shape)
    else:
        total = summed_rows(grad, rois, argmax, shape)
    return total.to(grad.dtype).contiguous(memory_format=format_of(channels_last))


def summed_planes(grad: Tensor, rois: Tensor, argmax: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The gradient channel by channel: contiguous. For CPU tensors.

    To the gradient of max pooling the RoIs of an image are one tall output. On the CPU it adds whatever indices it is
    given, one after the other, at twice the speed of `scatter_add_`.
    """
    image = images_of(rois, shape[0])
    grad = grad.masked_fill(argmax[:, :1] < 0, 0)  # all channels alike; to be added to any cell
    maps = torch.empty(shape, dtype=wide(grad))
    for n, map_ in enumerate(maps):
        own = (image == n).nonzero().flatten()
        if not len(own):
            map_.zero_()
            continue
        terms = grad[own].transpose(0, 1).to(map_.dtype).reshape(len(map_), -1, 1)
        places = argmax[own].transpose(0, 1).reshape(terms.shape).to(torch.int64).clamp_(min=0)
        torch.ops.aten.adaptive_max_pool2d_backward.grad_input(terms, map_, places, grad_input=map_)
    return maps


def summed_rows(grad: Tensor, rois: Tensor, argmax: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The gradient cell by cell: in channels_last memory."""
    batch, channels, height, width = shape
    grad = grad.contiguous(memory_format=torch.channels_last)
    cells = batch * height * width
    total = grad.new_empty((cells + 1, channels), dtype=wide(grad))  # with a row for what empty bins get
    step = max(VALUES_AT_ONCE, total.numel()) // grad[:1].numel() + 1
    for start in range(0, len(rois), step):
        some = slice(start, start + step)
        index = cell_rows(argmax[some], rois[some], batch, height * width, cells)
        terms = as_rows(grad[some].to(total.dtype))
        if grad.device.type == "cpu":  # as in summed_planes, with all images one tall map
            part = as_rows(torch.ops.aten.adaptive_max_pool2d_backward(tall(terms), tall(total), tall(index)))
            total = part if start == 0 else total.add_(part)
        else:
            total = (total.zero_() if start == 0 else total).scatter_add_(0, index, terms)
    return total[:cells].view(batch, height, width, channels).permute(0, 3, 1, 2)


def roi_pool_gather(features: Tensor, rois: Tensor, argmax: Tensor) -> Tensor:
    """The values of `features`, Tensor[N, C, H, W], at `argmax`, and 0 where there is none: the pooling of a tangent.

    It is the adjoint of `roi_pool_backward`, and so its gradient. Built of differentiable operators.
    """
    batch, channels, height, width = features.shape
    if batch == 0 or channels == 0:
        return features.new_zeros(argmax.shape)
    values = as_rows(features).gather(0, cell_rows(argmax, rois, batch, height * width, 0))
    count, _, pooled_height, pooled_width = argmax.shape
    return values.view(count, pooled_height, pooled_width, channels).permute(0, 3, 1, 2).masked_fill(argmax < 0, 0)


def cell_rows(argmax: Tensor, rois: Tensor, batch: int, cells: int, row_of_empty: int) -> Tensor:
    """The cells `argmax` as rows of all images' cells, Tensor[K·pooled_height·pooled_width, C] of int64.

    An empty bin (-1) gets `row_of_empty`.
    """
    empty = argmax[:, :1] < 0  # all channels alike
    first = torch.where(empty, row_of_empty + 1, images_of(rois, batch).mul_(cells).view(-1, 1, 1, 1))
    return as_rows(argmax) + as_rows(first)


def images_of(rois: Tensor, batch: int) -> Tensor:
    """Tensor[K] of int64: each RoI's image; any for a rejected row, which has no argmax."""
    return rois[:, 0].nan_to_num().clamp(0, batch - 1).to(torch.int64)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def tall(rows: Tensor) -> Tensor:
    """Tensor[1, C, R, 1] in channels_last memory of Tensor[R, C] `rows`."""
    return rows.view(1, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)


def as_rows(x: Tensor) -> Tensor:
    """Tensor[N·H·W, C] of Tensor[N, C, H, W]: no copy where that is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])

"""RoI max pooling (Girshick, Fast R-CNN, 2015, section 2.1) by `adaptive_max_pool2d`, and its gradient.

On the CPU `product` does the same faster where the bins read more cells than the map has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roi._outputs import empty_argmax, empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.torch_path import product
from roi.torch_path.bins import Bins, Integers, roi_windows, rounded_up
from roi.torch_path.levels import OnLevel, Rows, assign, put, taken
from roi.torch_path.memory import in_large_pages, scratch
from roi.torch_path.tables import Table, whole_table, wide
from roi.torch_path.threads import enough_threads

CROP_VALUES = 2**20  # that are pooled at once
PLANE_VALUES = 2**21  # of the gradient that are summed at once


def max_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """Tensor[K, C, pooled_height, pooled_width]: the maximum of each bin, NaN where it has one, 0 where it is empty."""
    shape = Maps.of(maps)
    output = in_large_pages(empty_pooled(maps[0], len(rois), shape, pooling))
    if output.numel() == 0:
        return output
    assigned = assign(rois, shape.batch, pooling)
    with enough_threads(output, output.numel()):
        for own in assigned.levels:
            map_, bins = maps[own.level], bins_of(own, pooling, shape)
            if product.serves(map_, bins):
                product.maxima(map_, bins, output, own.places)
            else:
                for part in pooled(map_, bins):
                    put(output, taken(own.places, part.rois), part.values())
    assigned.fill_rest(output)
    return output


def max_pool_with_argmax(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """`max_pool`, and where each maximum is: the cell y·W + x, of the RoI's level, of the first one in the bin.

    Of NaN the last; -1 where the bin is empty. An integer tensor of the output's shape.
    """
    shape = Maps.of(maps)
    output = in_large_pages(empty_pooled(maps[0], len(rois), shape, pooling))
    argmax = in_large_pages(empty_argmax(output, len(rois), shape, pooling))
    if output.numel() == 0:
        return output, argmax
    assigned = assign(rois, shape.batch, pooling)
    with enough_threads(output, output.numel()):
        for own in assigned.levels:
            map_, bins = maps[own.level], bins_of(own, pooling, shape)
            if product.serves_argmax(map_, bins):
                product.maxima(map_, bins, output, own.places)
                product.argmaxima(map_, bins, argmax, own.places)
            else:
                for part in pooled(map_, bins):
                    places = taken(own.places, part.rois)
                    put(output, places, part.values())
                    put(argmax, places, part.cells())
    assigned.fill_rest(output)
    for rows in (assigned.on_none, assigned.invalid):
        if len(rows):
            argmax[torch.from_numpy(rows).to(argmax.device)] = -1
    return output, argmax


def bins_of(own: OnLevel, pooling: Pooling, shape: Maps) -> Bins:
    windows = roi_windows(own.boxes, pooling.scales[own.level])
    return Bins.of(windows, pooling, *shape.sizes[own.level])


class Pooled(NamedTuple):
    """The result of `adaptive_max_pool2d` for some RoIs."""

    rois: Integers  # their places
    maximum: Tensor  # [k, C, pooled_height, pooled_width]
    place: Tensor  # of the same shape: in the crop
    crops: Tensor  # [k, cells of a crop]: cells of the map
    empty: Tensor | None  # [k, pooled_height, pooled_width, 1] of bool: bins off the map; None where there is none

    def values(self) -> Tensor:
        """Tensor[k, pooled_height, pooled_width, C]."""
        maximum = self.maximum.permute(0, 2, 3, 1)
        return maximum if self.empty is None else maximum.masked_fill(self.empty, 0)

    def cells(self) -> Tensor:
        """Where the values are, -1 where a bin is empty."""
        place = self.place.permute(0, 2, 3, 1)
        cells = self.crops.gather(1, place.flatten(1)).view(place.shape)
        return cells if self.empty is None else cells.masked_fill(self.empty, -1)


def pooled(map_: Tensor, bins: Bins) -> Iterator[Pooled]:
    """RoIs whose bins have about the same size are pooled together: their crops are a batch.

    A crop has each bin's rows and columns one after the other, the last one again where a bin has fewer than the
    largest. So `adaptive_max_pool2d` finds bins of one size in it, and the bins may overlap, or leave the map. Sizes
    are rounded up to 1, 2, 3, 4, 6, 8, 12, …: there are at most (2·log2(H) + 2)·(2·log2(W) + 2) groups of RoIs.
    """
    channels, height, width = map_.shape[1:]
    size = bins.pooled_size
    table = Table.of(map_, bins.image, bins.window, 1)
    rows, first, stride = table.rows(), table.cells.start, table.cells.stride
    heights, widths = rounded_up(bins.heights.max(axis=1)), rounded_up(bins.widths.max(axis=1))
    for tallest, widest in sorted(set(zip(heights.tolist(), widths.tolist(), strict=True))):
        alike = np.flatnonzero((heights == tallest) & (widths == widest))
        step = max(1, CROP_VALUES // (size[0] * tallest * size[1] * widest * max(channels, 1)))
        for start in range(0, len(alike), step):
            rois = alike[start : start + step]
            y = crop_side(bins.top[rois], bins.heights[rois], tallest, height)
            x = crop_side(bins.left[rois], bins.widths[rois], widest, width)
            cells = torch.from_numpy(y[:, :, None] * width + x[:, None, :])
            row = (first[rois, None] + y * stride[rois, None])[:, :, None] + x[:, None, :]
            crops = rows.index_select(0, torch.from_numpy(row.reshape(-1)).to(rows.device))
            crops = crops.view(*row.shape, channels).permute(0, 3, 1, 2)
            maximum, index = F.adaptive_max_pool2d(crops, size, return_indices=True)
            empty = bins.narrow(rois).empty()
            off_map = torch.from_numpy(empty[..., None]).to(map_.device) if empty.any() else None
            yield Pooled(rois, maximum, index, cells.flatten(1).to(rows.device), off_map)


def crop_side(first: Integers, sizes: Integers, longest: int, limit: int) -> Integers:
    """[K, bins·longest]: the rows, or columns, of bins that begin at `first` and have `sizes`, [K, bins] each."""
    last = np.maximum(first + sizes - 1, first)
    cells: Integers = np.minimum(first[..., None] + np.arange(longest), last[..., None])
    return np.minimum(cells, limit - 1, out=cells).reshape(len(first), -1)


def max_gather(maps: Sequence[Tensor], rois: Tensor, argmax: Tensor, pooling: Pooling) -> Tensor:
    """The values of the maps at the argmax, 0 where there is none: the derivative of max pooling, applied to `maps`."""
    shape = Maps.of(maps)
    output = empty_pooled(maps[0], len(rois), shape, pooling).zero_()
    if output.numel() == 0:
        return output
    for own in assign(rois, shape.batch, pooling).levels:
        cells = at(argmax.permute(0, 2, 3, 1), own.places)
        height, width = shape.sizes[own.level]
        index = cells.clamp(min=0) + first_cells(own, height * width).to(rois.device)
        table = whole_table(maps[own.level])
        values = table.gather(0, index.flatten(0, 2)).view(cells.shape).masked_fill(cells < 0, 0)
        put(output, own.places, values)
    return output


def max_gather_adjoint(grad: Tensor, rois: Tensor, argmax: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """The gradient of max pooling: each bin's gradient is added at the bin's argmax, channel by channel.

    Half precision is summed in float32.
    """
    gradients = [in_large_pages(gradient) for gradient in empty_gradients(grad, maps)]
    if maps.batch * grad.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    levels = {own.level: own for own in assign(rois, maps.batch, pooling).levels}
    with enough_threads(grad, grad.numel() + sum(gradient.numel() for gradient in gradients)):
        terms, cells = (by_channel(x, use) for x, use in ((grad, "gradient"), (argmax, "argmax")))
        for level, gradient in enumerate(gradients):
            if level in levels:
                add_at(terms, cells, levels[level], gradient)
            else:
                gradient.zero_()
    return gradients


def by_channel(x: Tensor, use: str) -> Tensor:
    """Tensor[C, K, h, w] of Tensor[K, C, h, w]: a view, or a copy in scratch where the channels lie side by side."""
    if x.stride(1) != 1 or x.shape[1] == 1:
        return x.transpose(0, 1)
    count, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    planes = scratch(use, (channels, len(rows)), x, x.dtype).copy_(rows.t())
    return planes.view(channels, count, height, width)


def add_at(terms: Tensor, argmax: Tensor, own: OnLevel, gradient: Tensor) -> None:
    """Fills `gradient`, Tensor[N, C, H, W], with the `terms` at its cells `argmax`, Tensor[C, K, h, w] each."""
    images, channels, height, width = gradient.shape
    # Before the cells of each image there is one that takes the gradients of empty bins.
    planes = scratch("maps", (channels, images, height * width + 1), gradient, wide(gradient))
    first = first_cells(own, height * width + 1)[:, 0].add_(1).to(gradient.device)
    bins = len(first) * terms.shape[2] * terms.shape[3]
    step = max(1, PLANE_VALUES // max(bins, planes[0].numel()))
    indices = scratch("index", (step, bins), gradient, torch.int64)
    values = scratch("values", (step, bins), gradient, planes.dtype)
    for channel in range(0, channels, step):
        some = slice(channel, channel + step)
        total = planes[some].flatten(1)
        shape = (len(total), len(first), *terms.shape[2:])
        index = torch.add(at(argmax[some], own.places, dim=1), first, out=indices[: len(total)].view(shape))
        value = values[: len(total)].view(shape).copy_(at(terms[some], own.places, dim=1))
        add_to(total, index.flatten(1), value.flatten(1))
    gradient.copy_(planes[:, :, 1:].view(channels, images, height, width).transpose(0, 1))


def add_to(planes: Tensor, index: Tensor, values: Tensor) -> None:
    """Fills Tensor[C, cells] with the sums of the values, Tensor[C, K], that have each cell's index."""
    if planes.device.type == "cpu":
        # The gradient of max pooling adds whatever indices it is given, and does so on all threads.
        tall = (x[None, ..., None] for x in (values, planes, index))
        torch.ops.aten.adaptive_max_pool2d_backward.grad_input(*tall, grad_input=planes[None, ..., None])
    else:
        planes.zero_().scatter_add_(1, index, values)


def first_cells(own: OnLevel, cells: int) -> Tensor:
    """Tensor[K, 1, 1, 1] of int64: where the cells of each RoI's image begin, of images that have so many."""
    return torch.from_numpy(own.boxes[:, 0].astype(np.int64) * cells).view(-1, 1, 1, 1)


def at(x: Tensor, places: Rows, dim: int = 0) -> Tensor:
    if isinstance(places, slice):
        return x.narrow(dim, places.start, places.stop - places.start)
    return x.index_select(dim, torch.from_numpy(places).to(x.device))

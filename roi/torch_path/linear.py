"""RoIAlign (He et al., Mask R-CNN, 2017, section 3) and position-sensitive average pooling (Dai et al., R-FCN, 2016).

Both are sums of weighted cells: linear in the maps. Half precision is summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from roi._outputs import empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.torch_path.levels import OnLevel, assign
from roi.torch_path.memory import in_large_pages
from roi.torch_path.tables import Array, Cells, cropped, lies_in_rows, whole_cells, whole_table
from roi.torch_path.weighted_sums import gradient_rows, pool, spread
from roi.torch_path.weights import BinWeights, cell_bins, sampled_bins

# (boxes of one level, pooling, scale, height, width) -> what their bins are made of
BinsOf = Callable[[Array, Pooling, float, int, int], BinWeights]


def align(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """RoIAlign: the mean of a bin's bilinearly interpolated samples. Tensor[K, C, pooled_height, pooled_width]."""
    return weighted_pool(maps, rois, pooling, sampled_bins)


def align_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """Gradients of `align` with respect to the maps, of Tensor[K, C, pooled_height, pooled_width] `grad`."""
    return weighted_adjoint(grad, rois, pooling, maps, sampled_bins)


def average_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    """The mean of a bin's cells. Tensor[K, C, pooled_height, pooled_width]."""
    return weighted_pool(maps, rois, pooling, cell_bins)


def average_pool_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps) -> list[Tensor]:
    """Gradients of `average_pool` with respect to the maps, of Tensor[K, C, pooled_height, pooled_width] `grad`."""
    return weighted_adjoint(grad, rois, pooling, maps, cell_bins)


def weighted_pool(maps: Sequence[Tensor], rois: Tensor, pooling: Pooling, bins_of: BinsOf) -> Tensor:
    shape = Maps.of(maps)
    output = in_large_pages(empty_pooled(maps[0], len(rois), shape, pooling))
    if output.numel() == 0:
        return output
    assigned = assign(rois, shape.batch, pooling)
    for own in assigned.levels:
        bins = bins_of(own.boxes, pooling, pooling.scales[own.level], *shape.sizes[own.level])
        table, cells = table_of(maps[own.level], own, bins, pooling)
        pool(table, cells, bins, output, own.places)
    assigned.fill_rest(output)
    return output


def table_of(map_: Tensor, own: OnLevel, bins: BinWeights, pooling: Pooling) -> tuple[Tensor, Cells]:
    """The cells of one map that its RoIs need, as rows."""
    images = own.boxes[:, 0].astype("int64")
    each = pooling.bins if pooling.position_sensitive else 1
    if not lies_in_rows(map_, each):
        crops = cropped(map_, images, bins.window(), each)
        if crops is not None:
            return crops
    return whole_table(map_, each), whole_cells(images, len(map_), *map_.shape[2:], each)


def weighted_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps, bins_of: BinsOf) -> list[Tensor]:
    gradients = [in_large_pages(gradient) for gradient in empty_gradients(grad, maps)]
    if maps.batch * grad.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    terms = gradient_rows(grad)
    levels = {own.level: own for own in assign(rois, maps.batch, pooling).levels}
    for level, gradient in enumerate(gradients):
        if level not in levels:
            gradient.zero_()
            continue
        own, size = levels[level], maps.sizes[level]
        bins = bins_of(own.boxes, pooling, pooling.scales[level], *size)
        each = pooling.bins if pooling.position_sensitive else 1
        cells = whole_cells(own.boxes[:, 0].astype("int64"), maps.batch, *size, each)
        spread(terms, cells, bins, gradient, own.places)
    return gradients

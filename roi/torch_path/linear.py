"""RoIAlign (He et al., Mask R-CNN, 2017, section 3) and position-sensitive average pooling (Dai et al., R-FCN, 2016).

Both are sums of weighted cells: linear in the maps. Half precision is summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from roi._outputs import empty_gradients, empty_pooled
from roi._problem import Maps, Pooling
from roi.torch_path.levels import OnLevel, assign
from roi.torch_path.memory import in_large_pages
from roi.torch_path.tables import Array, Table, whole_cells
from roi.torch_path.threads import enough_threads
from roi.torch_path.weighted_sums import by_cell, gradient_rows, pool, spread, sums
from roi.torch_path.weights import BinWeights, cell_bins, sampled_bins

# (boxes of one level, pooling, scale, height, width) -> their bins
BinsOf = Callable[[Array, Pooling, float, int, int], BinWeights]
T = TypeVar("T")

LOOKUPS_AHEAD = 2**23  # up to so many are all computed before the features are read


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
    bins = [bins_of(own.boxes, pooling, pooling.scales[own.level], *shape.sizes[own.level]) for own in assigned.levels]
    few = lookups_of(bins) <= LOOKUPS_AHEAD
    work = []
    for own, of in zip(assigned.levels, bins, strict=True):
        table = Table.of(maps[own.level], images_of(own), of.window, own_channels(pooling))
        work.append((table, ahead(sums(table.cells, of, own.places, output.shape[1]), few)))
    with enough_threads(output, output.numel()):
        for table, parts in work:
            pool(table.rows(), parts, output)
    assigned.fill_rest(output)
    return output


def weighted_adjoint(grad: Tensor, rois: Tensor, pooling: Pooling, maps: Maps, bins_of: BinsOf) -> list[Tensor]:
    gradients = [in_large_pages(gradient) for gradient in empty_gradients(grad, maps)]
    if maps.batch * grad.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    levels = assign(rois, maps.batch, pooling).levels
    bins = [bins_of(own.boxes, pooling, pooling.scales[own.level], *maps.sizes[own.level]) for own in levels]
    few = lookups_of(bins) <= LOOKUPS_AHEAD
    work = {}
    for own, of in zip(levels, bins, strict=True):
        cells = whole_cells(images_of(own), maps.batch, *maps.sizes[own.level], own_channels(pooling))
        work[own.level] = ahead(by_cell(cells, of, own.places), few)
    with enough_threads(grad, grad.numel() + sum(gradient.numel() for gradient in gradients)):
        terms = gradient_rows(grad)
        for level, gradient in enumerate(gradients):
            if level in work:
                spread(terms, work[level], gradient, own_channels(pooling))
            else:
                gradient.zero_()
    return gradients


def images_of(own: OnLevel) -> Array:
    return own.boxes[:, 0].astype("int64")


def own_channels(pooling: Pooling) -> int:
    """How many bins have channels of their own: a table's rows for each cell."""
    return pooling.bins if pooling.position_sensitive else 1


def lookups_of(bins: Sequence[BinWeights]) -> int:
    return sum(int(of.sizes.prod(axis=1).sum()) * of.lines[0] * of.lines[1] for of in bins)


def ahead(parts: Iterator[T], few: bool) -> Iterator[T] | list[T]:
    """All parts now where they are few; else one after the other, to save memory."""
    return list(parts) if few else parts

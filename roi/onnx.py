"""The RoI operators as ONNX: what `torch.onnx.export` puts in their places. Needs onnxscript; `import roi` does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from roi._operators import MULTISCALE_ROI_ALIGN, MULTISCALE_ROI_POOL, ROI_ALIGN, ROI_POOL, Family
from roi._problem import LEVEL_EPSILON, Pooling, level_range
from roi.torch_path.bins import MAX_CELL

try:
    from onnxscript import ir, opset18
except ImportError as error:
    raise ImportError("ONNX export needs onnxscript: pip install onnx onnxscript") from error

# Records operators by name: the file has the opset that torch.onnx.export is asked for. Python's constants are taken
# too, which its annotations do not say; where no other operand tells a constant's dtype, `constant` does.
op: Any = opset18
Value = Any  # a tensor of the graph that is being recorded


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The operators of this package in ONNX's: for `torch.onnx.export(…, dynamo=True, custom_translation_table=…)`.

    `roi_align` and `multiscale_roi_align` become RoiAlign, `roi_pool` and `multiscale_roi_pool` MaxRoiPool, the poolers
    one for each level, on the rows that belong to it. All others are standard operators of opset 18 or later. Batch,
    heights, widths and the number of boxes may be open, and then be 0 or 1. The position-sensitive operators
    have no counterpart: exporting them raises torch's error that no ONNX function was found for them.

    Results are those of the operators here, except that

    - boxes are not checked. onnxruntime refuses batch indices off the batch and, in RoiAlign, numbers that are not
      finite; with adaptive sampling it also takes all samples of a RoI that lie off the map, in time and memory.
    - a sample off the map is 0 times the first cell of the map, which matters where that is not finite.
    - a bin of max pooling that holds -inf alone may give the lowest finite number.
    - of boxes whose size is within 1e-6 of where two levels meet, some may go to the other one.
    - onnxruntime has no MaxRoiPool for float64 features on the CPU.

    Returns:
        From operator to the function that records it; to be merged with translations of one's own.
    """
    return {
        ROI_ALIGN.forward: translation(ROI_ALIGN.family, aligned_rows),
        ROI_POOL.pool: translation(ROI_POOL.gather.family, pooled_rows),
        MULTISCALE_ROI_ALIGN.forward: translation(MULTISCALE_ROI_ALIGN.family, aligned_rows),
        MULTISCALE_ROI_POOL.pool: translation(MULTISCALE_ROI_POOL.gather.family, pooled_rows),
    }


# (map, boxes, the boxes' dtype, pooling, scale): rows that are gathered do not know their dtype as they are recorded.
Rows = Callable[[Value, Value, ir.DataType, Pooling, float], Value]


def translation(family: Family, pooled: Rows) -> Callable[..., Value]:
    """What records an operator whose output is that of `pooled` for the rows of each level, with its scale."""

    def record(input: Any, rois: Value, *options: Any) -> Value:
        pooling = family.pooling(options[:-1])
        maps = family.maps(input)
        if len(maps) == 1:
            return pooled(maps[0], rois, rois.dtype, pooling, pooling.scales[0])
        places, on_none = places_by_level(rois, pooling)
        parts = [
            pooled(map_, op.Gather(rois, own, axis=0), rois.dtype, pooling, scale)
            for map_, own, scale in zip(maps, places, pooling.scales, strict=True)
        ]
        if on_none is not None:
            # Pooled from any map, then blanked.
            some = pooled(maps[0], op.Gather(rois, on_none, axis=0), rois.dtype, pooling, pooling.scales[0])
            parts.append(op.Sub(some, some))
            places.append(on_none)
        return in_order(parts, places)

    return record


def constant(value: Any, dtype: ir.DataType) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(value, dtype.numpy())))


def columns(rows: Value, first: int, end: int) -> Value:
    return op.Slice(rows, [first], [end], [1])


def aligned_rows(input: Value, rois: Value, rois_dtype: ir.DataType, pooling: Pooling, scale: float) -> Value:
    """RoIAlign of one map."""
    # ONNX has one dtype for features and boxes.
    dtype = ir.DataType.DOUBLE if ir.DataType.DOUBLE in (input.dtype, rois_dtype) else ir.DataType.FLOAT
    boxes = op.Cast(columns(rois, 1, 5), to=dtype)
    if pooling.aligned and pooling.sampling_ratio <= 0:
        # A reversed RoI has no samples; by RoiAlign's formula their number would be negative.
        first = columns(boxes, 0, 2)
        boxes = op.Concat(first, op.Max(first, columns(boxes, 2, 4)), axis=1)
    pooled = op.RoiAlign(
        op.Cast(input, to=dtype),
        boxes,
        op.Cast(op.Gather(rois, 0, axis=1), to=ir.DataType.INT64),
        coordinate_transformation_mode="half_pixel" if pooling.aligned else "output_half_pixel",
        mode="avg",
        output_height=pooling.pooled_height,
        output_width=pooling.pooled_width,
        sampling_ratio=max(pooling.sampling_ratio, 0),
        spatial_scale=scale,
    )
    return op.CastLike(pooled, input)


def pooled_rows(input: Value, rois: Value, rois_dtype: ir.DataType, pooling: Pooling, scale: float) -> Value:
    """RoI max pooling of one map: MaxRoiPool with a RoI of whole cells, on the map or next to it, for each bin.

    On a RoI with several bins it computes them in float32, so that some are a cell too large.
    """
    dtype = ir.DataType.DOUBLE if input.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    maps = op.Cast(input, to=dtype)
    cells = op.Cast(bins_as_rois(input, rois, rois_dtype, pooling, scale), to=dtype)
    pooled = with_nan(max_of_cells(maps, cells), maps, cells, dtype)
    bins = constant([pooling.pooled_height, pooling.pooled_width], ir.DataType.INT64)
    shape = op.Concat(op.Shape(rois, start=0, end=1), bins, op.Shape(input, start=1, end=2), axis=0)
    rows = op.Transpose(op.Reshape(pooled, shape, allowzero=1), perm=[0, 3, 1, 2])
    return op.CastLike(rows, input)


def max_of_cells(maps: Value, rois: Value) -> Value:
    """[B, C, 1, 1] of [B, 5] of (image, x1, y1, x2, y2) in cells, both ends inclusive; 0 off the map."""
    return op.MaxRoiPool(maps, rois, pooled_shape=[1, 1], spatial_scale=1.0)


def with_nan(pooled: Value, maps: Value, rois: Value, dtype: ir.DataType) -> Value:
    """`max_of_cells`, with NaN where a cell is NaN. MaxRoiPool itself ignores NaN."""
    nan = op.Cast(op.IsNaN(maps), to=dtype)
    anywhere = max_of_cells(op.ReduceMax(nan, [1], keepdims=1), rois)  # of few channels, as there hardly ever is one
    rows = op.Squeeze(op.NonZero(op.Reshape(anywhere, [-1])), [0])
    found = op.Cast(max_of_cells(nan, op.Gather(rois, rows, axis=0)), to=ir.DataType.BOOL)
    values = op.Where(found, constant(math.nan, dtype), op.Gather(pooled, rows, axis=0))
    return op.ScatterND(pooled, op.Unsqueeze(rows, [1]), values)


def bins_as_rois(input: Value, rois: Value, rois_dtype: ir.DataType, pooling: Pooling, scale: float) -> Value:
    """[K·height·width, 5] of int64: what `roi.torch_path.bins` says of the bins, as `max_of_cells` takes it."""
    integer = ir.DataType.INT64
    height, width = pooling.pooled_height, pooling.pooled_width
    scaled = op.Mul(columns(rois, 1, 5), constant(scale, rois_dtype))
    farthest = constant(MAX_CELL, rois_dtype)
    cells = op.Cast(op.Clip(round_half_away(scaled, rois_dtype), op.Neg(farthest), farthest), to=integer)
    x1, y1, x2, y2 = (columns(cells, i, i + 1) for i in range(4))
    top, bottom = bin_ends(y1, y2, height, op.Shape(input, start=2, end=3))
    left, right = bin_ends(x1, x2, width, op.Shape(input, start=3, end=4))
    image = op.Cast(columns(rois, 0, 1), to=integer)
    shape = op.Concat(op.Shape(rois, start=0, end=1), constant([height, width, 1], integer), axis=0)
    numbers = [
        op.Expand(op.Unsqueeze(side, axes), shape)
        for side, axes in ((image, [1, 2]), (left, [1, 3]), (top, [2, 3]), (right, [1, 3]), (bottom, [2, 3]))
    ]
    return op.Reshape(op.Concat(*numbers, axis=3), [-1, 5])


def round_half_away(x: Value, dtype: ir.DataType) -> Value:
    size = op.Abs(x)
    whole = op.Floor(size)
    up = op.GreaterOrEqual(op.Sub(size, whole), constant(0.5, dtype))
    return op.Mul(op.Sign(x), op.Add(whole, op.Cast(up, to=dtype)))


def bin_ends(first: Value, last: Value, bins: int, limit: Value) -> tuple[Value, Value]:
    """First and last cell of every bin on a side of the map, [K, bins], from those of the RoI, [K, 1].

    Those of a bin that lies off the map are both -1 or both `limit`.
    """
    size = op.Max(op.Add(op.Sub(last, first), 1), 1)
    place = constant(range(bins), ir.DataType.INT64)
    begin = op.Add(first, op.Div(op.Mul(size, place), bins))
    # ceil((p + 1)·size / bins) - 1
    end = op.Add(first, op.Div(op.Sub(op.Mul(size, op.Add(place, 1)), 1), bins))
    return op.Min(op.Max(begin, -1), limit), op.Min(op.Max(end, -1), limit)


def places_by_level(rois: Value, pooling: Pooling) -> tuple[list[Value], Value | None]:
    """Of each level the indices of its rows of `rois`, as `roi.torch_path.levels.map_levels` assigns them.

    And those of the rows that are on no level, where there can be such.
    """
    x1, y1, x2, y2 = (columns(rois, i, i + 1) for i in range(1, 5))
    size = op.Sqrt(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)))  # a negative area gives NaN, which reaches no level
    # ONNX has no log2: floor(canonical_level + log2(size / canonical_scale) + EPSILON) >= k as a bound of the size.
    finest, coarsest = level_range(pooling.scales)
    steps = max(0, coarsest - finest)
    bounds = [finest + step - pooling.canonical_level - LEVEL_EPSILON for step in range(1, steps + 1)]
    count = len(pooling.scales)
    smallest = constant([pooling.canonical_scale * 2**bound for bound in bounds] or [math.inf], rois.dtype)
    reached = op.Cast(op.GreaterOrEqual(size, smallest), to=ir.DataType.INT64)
    level = op.ReduceSum(reached, [1], keepdims=0)
    places = [op.Squeeze(op.NonZero(op.Equal(level, index)), [0]) for index in range(count)]
    none = op.Squeeze(op.NonZero(op.GreaterOrEqual(level, count)), [0]) if steps >= count else None
    return places, none


def in_order(parts: Sequence[Value], places: Sequence[Value]) -> Value:
    """The rows of all parts, each in its place."""
    place = op.Concat(*places, axis=0)
    row = op.Range(0, op.Squeeze(op.Shape(place)), 1)
    return op.Gather(op.Concat(*parts, axis=0), op.ScatterElements(place, place, row), axis=0)

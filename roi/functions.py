"""The operators as functions, with torchvision's names, argument order and box formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from roi._arguments import (
    check_canonical,
    check_flag,
    check_input,
    check_pyramid,
    output_pair,
    sampling_count,
    scaled,
)
from roi._backend import check_backend
from roi._boxes import Boxes, as_rois
from roi._operators import (
    MULTISCALE_ROI_ALIGN,
    MULTISCALE_ROI_POOL,
    PS_ROI_ALIGN,
    PS_ROI_POOL,
    ROI_ALIGN,
    ROI_POOL,
)

P = ParamSpec("P")


def overridable(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let tensor-like arguments take the call over, torch.fx's proxies among them: a traced call is one node."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if has_torch_function(relevant := tuple(tensors_of(args, kwargs))):
            result: Tensor = handle_torch_function(call, relevant, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


@overridable
def roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """The maximum of the features in each bin of each RoI. In place of `torchvision.ops.roi_pool`.

    RoI max pooling: Girshick, Fast R-CNN (2015), section 2.1. A box's corners, times `spatial_scale` and rounded half
    away from zero, are the first and the last cell of its RoI (at least one cell). Bin p of P covers its cells
    floor(p·h/P) … ceil((p+1)·h/P), by integer arithmetic, and of them those that lie on the map. A bin with none is 0
    and takes no gradient; NaN in a bin gives NaN.

    torchvision computes the bins in the dtype of the features, so that at a few sizes one of them is a row or a column
    too large and may leave the RoI (7 bins over 57, 114 or 121 cells in float32); and it passes over NaN.

    Args:
        input: Tensor[N, C, H, W], floating point. Its memory format is that of the output.
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or for each of the N images a Tensor[Ki, 4] of
            (x1, y1, x2, y2); or NumPy arrays of that form. Of any floating-point or integer dtype, whatever that of
            `input`. Coordinates of float64 and of integers of 32 bits or more are rounded in float64, all others in
            float32.
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes: 1/16 for boxes in pixels and a map of stride 16. Or
            a pair of them, in height and in width.
        backend: "torch", "cupy", "torchvision", or "auto": what `set_default_backend` says, else torch for CPU tensors,
            and for CUDA tensors the first that runs of CuPy, torchvision and torch.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of `input`; differentiable in `input` (reverse
        and forward mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch index
        outside [0, N) comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" or "torchvision" where it cannot run; the message says why.
    """
    check_input(input)
    rois, scale = scaled(as_rois(boxes, input), spatial_scale)
    sides = output_pair(output_size)
    return ROI_POOL([input], rois, scale, *sides, check_backend(backend))


@overridable
def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of bilinearly interpolated samples in each bin of each RoI. In place of `torchvision.ops.roi_align`.

    A RoI is a box times `spatial_scale`, unrounded, in cells of the map; `aligned` moves it by half a cell up and left,
    and otherwise it is at least one cell long and wide. Bins divide it evenly, and samples a bin. A sample that lies
    more than a cell beyond the outermost cells is 0; nearer ones are extrapolated.

    torchvision computes in the dtype of the features; here coordinates are never in half precision, and sums of half
    precision are made in float32.

    Args:
        input: Tensor[N, C, H, W], floating point. Contiguous and channels_last features are each read as they lie; the
            latter is faster.
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or for each of the N images a Tensor[Ki, 4] of
            (x1, y1, x2, y2); or NumPy arrays of that form. Of any floating-point or integer dtype, whatever that of
            `input`. Coordinates are computed in float64 for boxes of float64 and of integers of 32 bits or more, in
            float32 for all others.
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes: 1/16 for boxes in pixels and a map of stride 16. Or
            a pair of them, in height and in width.
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up.
        aligned: whether cells have their values at their centres (detectron2's ROIAlignV2), as pixels have.
        backend: "torch", "cupy", "torchvision", or "auto": what `set_default_backend` says, else torch for CPU tensors,
            and for CUDA tensors the first that runs of CuPy, torchvision and torch.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of `input`; differentiable in `input` (reverse
        and forward mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch index
        outside [0, N) comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" or "torchvision" where it cannot run; the message says why.
    """
    check_input(input)
    rois, scale = scaled(as_rois(boxes, input), spatial_scale)
    sides = output_pair(output_size)
    sampling = sampling_count(sampling_ratio), check_flag(aligned, "aligned")
    return ROI_ALIGN([input], rois, scale, *sides, *sampling, check_backend(backend))


@overridable
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    backend: str = "auto",
) -> Tensor:
    """`roi_align` of each box on the level of a pyramid that its size belongs to.

    The level is k = floor(canonical_level + log2(sqrt(w·h) / canonical_scale)), equation 1 of Lin et al., Feature
    Pyramid Networks (2017), clamped to -log2 of the first and of the last scale; the first map is that of the smallest
    k, the next that of k + 1, and so on. A box without an area, or with a negative one, belongs to the first level
    (torchvision's pooler gives zeros for a negative area). Where scales do not double, a box may belong to a level
    beyond the last map: its output is 0, as torchvision's.

    Args:
        features: Tensor[N, C, Hl, Wl] of each level, finest first, alike in everything but height and width. Where
            their memory formats differ, the first one's is used.
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or for each of the N images a Tensor[Ki, 4] of
            (x1, y1, x2, y2); or NumPy arrays of that form. Of any floating-point or integer dtype, whatever that of
            `features`.
        output_size: bins, an int or (height, width).
        spatial_scales: of each level, cells of the map per unit of the boxes: 1/4, 1/8, … for an FPN's P2, P3, ….
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up.
        aligned: whether cells have their values at their centres.
        canonical_scale: size in units of the boxes, the root of the area, of a box that belongs to `canonical_level`.
        canonical_level: k of that size.
        backend: "torch", "cupy", "torchvision", or "auto": what `set_default_backend` says, else torch for CPU tensors,
            and for CUDA tensors the first that runs of CuPy, torchvision and torch.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of the first level; differentiable in `features`
        (reverse and forward mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch
        index outside [0, N) comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" or "torchvision" where it cannot run; the message says why.
    """
    maps, scales = check_pyramid(features, spatial_scales)
    rois = as_rois(boxes, maps[0])
    sides = output_pair(output_size)
    sampling = sampling_count(sampling_ratio), check_flag(aligned, "aligned")
    levels = check_canonical(canonical_scale, canonical_level)
    return MULTISCALE_ROI_ALIGN(maps, rois, scales, *sides, *sampling, *levels, check_backend(backend))


@overridable
def multiscale_roi_pool(
    features: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    *,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    backend: str = "auto",
) -> Tensor:
    """`roi_pool` of each box on the level of a pyramid that its size belongs to.

    Args, Returns, Raises: as `multiscale_roi_align`.
    """
    maps, scales = check_pyramid(features, spatial_scales)
    rois = as_rois(boxes, maps[0])
    sides = output_pair(output_size)
    levels = check_canonical(canonical_scale, canonical_level)
    return MULTISCALE_ROI_POOL(maps, rois, scales, *sides, *levels, check_backend(backend))


@overridable
def ps_roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of the cells of each bin, from channels of the bin's own. In place of `torchvision.ops.ps_roi_pool`.

    Bin (p, q) of output channel c is pooled from channel (c·height + p)·width + q of `input`. A box's corners, times
    `spatial_scale` and rounded half away from zero, are the first cell of its RoI and the one after its last (at least
    one cell). Bin p of P covers its cells floor(p·h/P) … ceil((p+1)·h/P), by integer arithmetic, and of them those on
    the map without its last row and column, as in R-FCN's code and torchvision. An empty bin is 0.

    torchvision computes the bins in the dtype of the features, so that at a few sizes one of them is a row or a column
    too large; and its gradient is that of bins that have the last row and column.

    Args:
        input: Tensor[N, C·height·width, H, W], floating point.
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or for each of the N images a Tensor[Ki, 4] of
            (x1, y1, x2, y2); or NumPy arrays of that form. Of any floating-point or integer dtype, whatever that of
            `input`.
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes, or a pair of them, in height and in width.
        backend: "torch", "cupy", "torchvision", or "auto": what `set_default_backend` says, else torch for CPU tensors,
            and for CUDA tensors the first that runs of CuPy, torchvision and torch.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of `input`; differentiable in `input` (reverse
        and forward mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch index
        outside [0, N) comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" or "torchvision" where it cannot run; the message says why.
    """
    sides = position_sensitive_sides(input, output_size)
    rois, scale = scaled(as_rois(boxes, input), spatial_scale)
    return PS_ROI_POOL([input], rois, scale, *sides, check_backend(backend))


@overridable
def ps_roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = -1,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of interpolated samples, from channels of the bin's own. In place of `torchvision.ops.ps_roi_align`.

    As `ps_roi_pool` in which channels a bin is pooled from, as `roi_align(aligned=True)` in how.

    Args:
        input, boxes, output_size, spatial_scale, backend: as in `ps_roi_pool`.
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up. A box without
            an area has then none, and is 0; torchvision gives NaN.

    Returns, Raises: as `ps_roi_pool`.
    """
    sides = position_sensitive_sides(input, output_size)
    rois, scale = scaled(as_rois(boxes, input), spatial_scale)
    sampling = sampling_count(sampling_ratio)
    return PS_ROI_ALIGN([input], rois, scale, *sides, sampling, check_backend(backend))


def position_sensitive_sides(input: Tensor, output_size: int | Sequence[int]) -> tuple[int, int]:
    """`output_pair` for maps that have channels of its own for each bin."""
    check_input(input)
    height, width = output_pair(output_size)
    if input.shape[1] % (height * width):
        raise ValueError(
            f"input must have a multiple of {height} · {width} channels, some for each bin; got {input.shape[1]}"
        )
    return height, width

"""RoIAlign and RoI max pooling on a pyramid: Lin et al., Feature Pyramid Networks (2017), section 4.2.

The operators that the dispatcher knows take a list of maps. With one map they do what `roi_align` and `roi_pool` do,
which take a tensor all the same: a list costs the dispatcher 40 µs more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from roi import backend as backends
from roi.arguments import check_flag, check_input, check_int, check_scale, output_pair, sampling_count
from roi.boxes import Boxes, as_rois
from roi.layout import argmax_format, empty_gradient, empty_pooled, empty_pyramid_argmax, memory_format
from roi.operators import check_rois, register
from roi.torch_multiscale_pool import multiscale_roi_pool_gather


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    canonical_scale: int = 224,
    canonical_level: int = 4,
    backend: str = "auto",
) -> Tensor:
    """`roi_align` of each box on the level of a pyramid that its size belongs to.

    The level is k = floor(canonical_level + log2(sqrt(w·h) / canonical_scale)), equation 1 of the paper, or the nearest
    there is; the map of level k has a cell per 2^k units of the boxes. A box without an area belongs to the finest
    level. (torchvision's pooler gives zeros for one with a negative area.)

    Args:
        features: Tensor[N, C, Hl, Wl] of each level, finest first, alike in everything but height and width. Where
            their memory formats differ, the first one's is used.
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or for each of the N images a Tensor[Ki, 4] of
            (x1, y1, x2, y2); of any floating-point dtype, whatever that of `features`.
        output_size: bins, an int or (height, width).
        spatial_scales: of each level, cells of the map per unit of the boxes: 1/4, 1/8, … for an FPN's P2, P3, ….
            Powers of two, each half of the one before.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        aligned: whether cells have their values at their centres.
        canonical_scale: size in units of the boxes, the root of the area, of a box that belongs to `canonical_level`.
        canonical_level: k of that size.
        backend: "torch", "cupy", or "auto": what `set_default_backend` says, else CuPy for CUDA tensors where it runs.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of the first level; differentiable in `features`
        (reverse mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch index outside
        [0, N) comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" where it cannot run; the message says what to install.
    """
    maps, scales = checked_pyramid(features, spatial_scales)
    rois = as_rois(boxes, maps[0]).detach()
    height, width = output_pair(output_size)
    levels = check_canonical(canonical_scale, canonical_level)
    options = sampling_count(sampling_ratio), check_flag(aligned, "aligned"), backends.check_backend(backend)
    output = torch.ops.fpn_roi.multiscale_roi_align(maps, rois, scales, *levels, height, width, *options)
    return cast(Tensor, output)


def multiscale_roi_pool(
    features: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    *,
    canonical_scale: int = 224,
    canonical_level: int = 4,
    backend: str = "auto",
) -> Tensor:
    """`roi_pool` of each box on the level of a pyramid that its size belongs to.

    Args, Returns, Raises: as `multiscale_roi_align`.
    """
    maps, scales = checked_pyramid(features, spatial_scales)
    rois = as_rois(boxes, maps[0]).detach()
    height, width = output_pair(output_size)
    levels = check_canonical(canonical_scale, canonical_level)
    with_argmax = torch.is_grad_enabled() and any(map_.requires_grad for map_ in maps)
    options = with_argmax, backends.check_backend(backend)
    output, _ = torch.ops.fpn_roi.multiscale_roi_pool(maps, rois, scales, *levels, height, width, *options)
    return cast(Tensor, output)


class _MultiScale(nn.Module):
    """What the two poolers have in common: which maps of a dict they take, and at which scales."""

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        canonical_scale: int,
        canonical_level: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = output_pair(output_size)
        self.canonical_scale, self.canonical_level = check_canonical(canonical_scale, canonical_level)
        self.backend = backend

    def levels(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[float]]:
        maps = [level for name, level in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(f"x must have a map of {list(self.featmap_names)}; got {list(x)}")
        if not len(image_shapes) == len(boxes) > 0:
            raise ValueError(f"image_shapes must have one (height, width) per image; got {len(image_shapes)}")
        return maps, infer_scales(maps, image_shapes)

    def extra_repr(self) -> str:
        return f"featmap_names={list(self.featmap_names)}, output_size={self.output_size}"


class MultiScaleRoIAlign(_MultiScale):
    """RoIAlign on those maps of a dict that have the given names. In place of `torchvision.ops.MultiScaleRoIAlign`.

    Args:
        featmap_names: of the levels, finest first in the dict.
        output_size: bins, an int or (height, width).
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        canonical_scale, canonical_level: as in `multiscale_roi_align`.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__(featmap_names, output_size, canonical_scale, canonical_level, backend)
        self.sampling_ratio = sampling_ratio

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Tensor[K, C, height, width].

        Args:
            x: maps by name, Tensor[N, C, Hl, Wl].
            boxes: of each image a Tensor[Ki, 4] of (x1, y1, x2, y2) in pixels.
            image_shapes: (height, width) of each image in pixels, before batching pads it. The maps' scales are
                inferred from the largest: the power of two nearest to Hl / height.
        """
        maps, scales = self.levels(x, boxes, image_shapes)
        return multiscale_roi_align(
            maps,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sampling_ratio={self.sampling_ratio}, backend={self.backend!r}"


class MultiScaleRoIPool(_MultiScale):
    """RoI max pooling on those maps of a dict that have the given names.

    Args:
        featmap_names: of the levels, finest first in the dict.
        output_size: bins, an int or (height, width).
        canonical_scale, canonical_level: as in `multiscale_roi_align`.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__(featmap_names, output_size, canonical_scale, canonical_level, backend)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Tensor[K, C, height, width]; arguments as in `MultiScaleRoIAlign.forward`."""
        maps, scales = self.levels(x, boxes, image_shapes)
        return multiscale_roi_pool(
            maps,
            boxes,
            self.output_size,
            scales,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


def infer_scales(maps: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Of each map the power of two nearest to its height by that of the largest image.

    Raises:
        ValueError: by height and by width that is not the same.
    """
    height = max(known(shape[0]) for shape in image_shapes)
    width = max(known(shape[1]) for shape in image_shapes)
    scales = []
    for map_ in maps:
        by_height, by_width = (
            2.0 ** round(math.log2(known(cells) / pixels))
            for cells, pixels in zip(map_.shape[-2:], (height, width), strict=True)
        )
        if by_height != by_width:
            raise ValueError(
                f"x must have maps of the images' shape; got one of {tuple(map_.shape[-2:])} for {height} × {width}"
            )
        scales.append(by_height)
    return scales


def known(size: int) -> int:
    """A side as a number. One that `torch.export` leaves open has that of the example: scales are the same at any size,
    and to compare the open side with a number would close it.
    """
    return cast(int, size.node.hint) if isinstance(size, torch.SymInt) else size


def checked_pyramid(features: Sequence[Tensor], spatial_scales: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    """Maps of one memory format, the first one's, and their scales."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence) or not features:
        raise TypeError(f"features must be a list of a Tensor[N, C, Hl, Wl] per level; got {type(features).__name__}")
    first = features[0]
    for level, map_ in enumerate(features):
        check_input(map_, f"features[{level}]")
        if map_.shape[:2] != first.shape[:2] or map_.dtype != first.dtype or map_.device != first.device:
            raise ValueError(
                f"features[{level}] must have batch size, channels, dtype and device of features[0], "
                f"{tuple(first.shape[:2])}, {first.dtype}, {first.device}; "
                f"got {tuple(map_.shape[:2])}, {map_.dtype}, {map_.device}"
            )
    if not isinstance(spatial_scales, Sequence):
        raise TypeError(f"spatial_scales must be a list of a number per level; got {type(spatial_scales).__name__}")
    scales = [check_scale(scale, "spatial_scales") for scale in spatial_scales]
    if len(scales) != len(features):
        raise ValueError(f"spatial_scales must have one scale per level; got {len(scales)} for {len(features)}")
    if math.log2(scales[0]) % 1 or any(scale != scales[0] / 2**level for level, scale in enumerate(scales)):
        raise ValueError(f"spatial_scales must be powers of two, each half of the one before; got {spatial_scales}")
    layout = memory_format(first)
    return [map_.contiguous(memory_format=layout) for map_ in features], scales


def check_canonical(canonical_scale: int, canonical_level: int) -> tuple[int, int]:
    scale, level = check_int(canonical_scale, "canonical_scale"), check_int(canonical_level, "canonical_level")
    if scale <= 0:
        raise ValueError(f"canonical_scale must be positive; got {canonical_scale!r}")
    return scale, level


# The operators. RoIAlign is linear in the features: its gradient is its adjoint, whose gradient is the operator again.


def _align(
    features: list[Tensor],
    rois: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    height: int,
    width: int,
    ratio: int,
    aligned: bool,
    backend: str,
) -> Tensor:
    check_rois(rois, features[0].shape[0])
    args = (features, rois, scales, canonical_scale, canonical_level, height, width, ratio, aligned)
    return cast(Tensor, backends.run("multiscale_roi_align", rois.device, backend, *args))


def _fake_align(
    features: list[Tensor],
    rois: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    height: int,
    width: int,
    ratio: int,
    aligned: bool,
    backend: str,
) -> Tensor:
    return empty_pooled(features[0], rois.shape[0], height, width)


def _save_for_align(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, ctx.scales, *ctx.canonical, _, _, ctx.ratio, ctx.aligned, ctx.backend = inputs
    _save_shapes(ctx, features)
    ctx.save_for_backward(rois)


def _save_shapes(ctx: Any, features: Sequence[Tensor]) -> None:
    heights, widths = [map_.shape[2] for map_ in features], [map_.shape[3] for map_ in features]
    channels_last = memory_format(features[0]) is torch.channels_last
    ctx.shapes = *features[0].shape[:2], heights, widths, channels_last


def _align_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rois,) = ctx.saved_tensors
    options = ctx.scales, *ctx.canonical, ctx.ratio, ctx.aligned, *ctx.shapes, ctx.backend
    return (torch.ops.fpn_roi.multiscale_roi_align_backward(grad, rois, *options), *[None] * 9)


def _align_adjoint(
    grad: Tensor,
    rois: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    heights: list[int],
    widths: list[int],
    channels_last: bool,
    backend: str,
) -> list[Tensor]:
    levels = (scales, canonical_scale, canonical_level)
    args = (grad, rois, *levels, ratio, aligned, batch, channels, heights, widths, channels_last)
    return cast(list[Tensor], backends.run("multiscale_roi_align_backward", grad.device, backend, *args))


def _fake_align_adjoint(
    grad: Tensor,
    rois: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    heights: list[int],
    widths: list[int],
    channels_last: bool,
    backend: str,
) -> list[Tensor]:
    return _empty_gradients(grad, batch, channels, heights, widths, channels_last)


def _empty_gradients(
    grad: Tensor, batch: int, channels: int, heights: list[int], widths: list[int], channels_last: bool
) -> list[Tensor]:
    sides = zip(heights, widths, strict=True)
    return [empty_gradient(grad, (batch, channels, height, width), channels_last) for height, width in sides]


def _save_for_align_adjoint(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, rois, ctx.scales, canonical_scale, canonical_level, ctx.ratio, ctx.aligned, *_, ctx.backend = inputs
    ctx.canonical, ctx.pooled = (canonical_scale, canonical_level), grad.shape[2:]
    ctx.save_for_backward(rois)


def _align_adjoint_backward(ctx: Any, tangents: list[Tensor]) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    options = ctx.scales, *ctx.canonical, *ctx.pooled, ctx.ratio, ctx.aligned, ctx.backend
    return (torch.ops.fpn_roi.multiscale_roi_align(tangents, rois, *options), *[None] * 12)


def _pool(
    features: list[Tensor],
    rois: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    height: int,
    width: int,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_rois(rois, features[0].shape[0])
    args = (features, rois, scales, canonical_scale, canonical_level, height, width, with_argmax)
    return cast(tuple[Tensor, Tensor], backends.run("multiscale_roi_pool", rois.device, backend, *args))


def _fake_pool(
    features: list[Tensor],
    rois: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    height: int,
    width: int,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    output = empty_pooled(features[0], rois.shape[0], height, width)
    return output, empty_pyramid_argmax(features, output, with_argmax, argmax_format(features[0]))


def _save_for_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, rois, ctx.scales, *ctx.canonical, _, _, with_argmax, ctx.backend = inputs
    if not with_argmax:
        raise RuntimeError("fpn_roi::multiscale_roi_pool was called with_argmax=False on features that need a gradient")
    _save_shapes(ctx, features)
    ctx.set_materialize_grads(False)  # of the argmax it would be zeros, as many as there are outputs
    ctx.save_for_backward(rois, output[1])


def _pool_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return ([None] * len(ctx.scales), *[None] * 8)
    rois, argmax = ctx.saved_tensors
    options = ctx.scales, *ctx.canonical, *ctx.shapes, ctx.backend
    return (torch.ops.fpn_roi.multiscale_roi_pool_backward(grad, rois, argmax, *options), *[None] * 8)


def _pool_adjoint(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    batch: int,
    channels: int,
    heights: list[int],
    widths: list[int],
    channels_last: bool,
    backend: str,
) -> list[Tensor]:
    levels = (scales, canonical_scale, canonical_level)
    args = (grad, rois, argmax, *levels, batch, channels, heights, widths, channels_last)
    return cast(list[Tensor], backends.run("multiscale_roi_pool_backward", grad.device, backend, *args))


def _fake_pool_adjoint(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    scales: list[float],
    canonical_scale: int,
    canonical_level: int,
    batch: int,
    channels: int,
    heights: list[int],
    widths: list[int],
    channels_last: bool,
    backend: str,
) -> list[Tensor]:
    return _empty_gradients(grad, batch, channels, heights, widths, channels_last)


def _save_for_pool_adjoint(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, rois, argmax, *ctx.levels, _, _, _, _, _, _ = inputs
    ctx.save_for_backward(rois, argmax)


def _pool_adjoint_backward(ctx: Any, tangents: list[Tensor]) -> tuple[Tensor | None, ...]:
    return (multiscale_roi_pool_gather(tangents, *ctx.saved_tensors, *ctx.levels), *[None] * 11)


_LEVELS = "float[] spatial_scales, int canonical_scale, int canonical_level"
_SHAPES = "SymInt batch, SymInt channels, SymInt[] heights, SymInt[] widths, bool channels_last"

register(
    "multiscale_roi_align",
    f"(Tensor[] features, Tensor rois, {_LEVELS}, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned, str backend) -> Tensor",
    _align,
    _fake_align,
    _save_for_align,
    _align_backward,
)
register(
    "multiscale_roi_align_backward",
    f"(Tensor grad, Tensor rois, {_LEVELS}, int sampling_ratio, bool aligned, {_SHAPES}, str backend) -> Tensor[]",
    _align_adjoint,
    _fake_align_adjoint,
    _save_for_align_adjoint,
    _align_adjoint_backward,
)
register(
    "multiscale_roi_pool",
    f"(Tensor[] features, Tensor rois, {_LEVELS}, SymInt pooled_height, SymInt pooled_width, bool with_argmax, "
    "str backend) -> (Tensor output, Tensor argmax)",
    _pool,
    _fake_pool,
    _save_for_pool,
    _pool_backward,
)
register(
    "multiscale_roi_pool_backward",
    f"(Tensor grad, Tensor rois, Tensor argmax, {_LEVELS}, {_SHAPES}, str backend) -> Tensor[]",
    _pool_adjoint,
    _fake_pool_adjoint,
    _save_for_pool_adjoint,
    _pool_adjoint_backward,
)

"""RoIAlign: He et al., Mask R-CNN (2017), section 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from roi import backend as backends
from roi.arguments import check_flag, check_input, check_scale, output_pair, sampling_count
from roi.boxes import Boxes, as_rois
from roi.layout import empty_gradient, empty_pooled, memory_format
from roi.operators import check_rois, register


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
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
            (x1, y1, x2, y2); of any floating-point dtype, whatever that of `input`. Coordinates are computed in float64
            for float64 boxes, in float32 for all others.
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes: 1/16 for boxes in pixels and a map of stride 16.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        aligned: whether cells have their values at their centres (detectron2's ROIAlignV2), as pixels have.
        backend: "torch", "cupy", or "auto": what `set_default_backend` says, else CuPy for CUDA tensors where it runs.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of `input`; differentiable in `input` (reverse
        mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch index outside [0, N)
        comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" where it cannot run; the message says what to install.
    """
    check_input(input)
    rois = as_rois(boxes, input).detach()
    height, width = output_pair(output_size)
    options = sampling_count(sampling_ratio), check_flag(aligned, "aligned"), backends.check_backend(backend)
    scale = check_scale(spatial_scale)
    return cast(Tensor, torch.ops.fpn_roi.roi_align(input, rois, scale, height, width, *options))


class RoIAlign(nn.Module):
    """`roi_align` with fixed options. In place of `torchvision.ops.RoIAlign`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        aligned: whether cells have their values at their centres.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """`roi_align(input, rois, …)`: Tensor[N, C, H, W] and boxes -> Tensor[K, C, height, width]."""
        options = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        return roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, backend={self.backend!r}"
        )


# The operator is linear in `input`: its gradient is its adjoint, whose gradient is the operator again.


def _roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool, backend: str
) -> Tensor:
    check_rois(rois, input.shape[0])
    args = (input, rois, scale, height, width, ratio, aligned)
    return cast(Tensor, backends.run("roi_align", input.device, backend, *args))


def _fake_roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool, backend: str
) -> Tensor:
    return empty_pooled(input, rois.shape[0], height, width)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, ctx.scale, _, _, ctx.ratio, ctx.aligned, ctx.backend = inputs
    ctx.shape, ctx.channels_last = input.shape, memory_format(input) is torch.channels_last
    ctx.save_for_backward(rois)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    options = ctx.scale, ctx.ratio, ctx.aligned, *ctx.shape, ctx.channels_last, ctx.backend
    return (torch.ops.fpn_roi.roi_align_backward(grad, rois, *options), *[None] * 7)


def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    scale: float,
    ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    args = (grad, rois, scale, ratio, aligned, batch, channels, height, width, channels_last)
    return cast(Tensor, backends.run("roi_align_backward", grad.device, backend, *args))


def _fake_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    scale: float,
    ratio: int,
    aligned: bool,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    return empty_gradient(grad, (batch, channels, height, width), channels_last)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, rois, ctx.scale, ctx.ratio, ctx.aligned, *_, ctx.backend = inputs
    ctx.pooled = grad.shape[2:]
    ctx.save_for_backward(rois)


def _double_backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    options = ctx.scale, *ctx.pooled, ctx.ratio, ctx.aligned, ctx.backend
    return (torch.ops.fpn_roi.roi_align(tangent, rois, *options), *[None] * 10)


register(
    "roi_align",
    "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned, str backend) -> Tensor",
    _roi_align,
    _fake_roi_align,
    _save_for_backward,
    _backward,
)
register(
    "roi_align_backward",
    "(Tensor grad, Tensor rois, float spatial_scale, int sampling_ratio, bool aligned, SymInt batch, SymInt channels, "
    "SymInt height, SymInt width, bool channels_last, str backend) -> Tensor",
    _roi_align_backward,
    _fake_roi_align_backward,
    _save_for_double_backward,
    _double_backward,
)

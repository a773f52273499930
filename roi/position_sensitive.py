"""Position-sensitive pooling: Dai et al., R-FCN (2016), equation 1, and Li et al., Light-Head R-CNN (2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from roi import backend as backends
from roi.arguments import check_input, check_scale, output_pair, sampling_count
from roi.boxes import Boxes, as_rois
from roi.layout import empty_gradient, empty_position_sensitive, memory_format
from roi.operators import check_rois, register


def ps_roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
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
            (x1, y1, x2, y2); of any floating-point dtype, whatever that of `input`.
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        backend: "torch", "cupy", or "auto": what `set_default_backend` says, else CuPy for CUDA tensors where it runs.

    Returns:
        Tensor[K, C, height, width] in the dtype and the memory format of `input`; differentiable in `input` (reverse
        mode, to any order), not in the boxes. On CUDA, a row with a non-finite number or a batch index outside [0, N)
        comes out as NaN.

    Raises:
        TypeError, ValueError: an argument is not of that form; on the CPU also for such a row.
        RuntimeError: backend="cupy" where it cannot run; the message says what to install.
    """
    rois, (height, width), scale = checked_arguments(input, boxes, output_size, spatial_scale)
    args = input, rois, scale, height, width, backends.check_backend(backend)
    return cast(Tensor, torch.ops.fpn_roi.ps_roi_pool(*args))


def ps_roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of interpolated samples, from channels of the bin's own. In place of `torchvision.ops.ps_roi_align`.

    As `ps_roi_pool` in which channels a bin is pooled from, as `roi_align(aligned=True)` in how.

    Args:
        input, boxes, output_size, spatial_scale, backend: as in `ps_roi_pool`.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up. A box without
            an area has then none, and is 0; torchvision gives NaN.

    Returns, Raises: as `ps_roi_pool`.
    """
    rois, (height, width), scale = checked_arguments(input, boxes, output_size, spatial_scale)
    options = sampling_count(sampling_ratio), backends.check_backend(backend)
    return cast(Tensor, torch.ops.fpn_roi.ps_roi_align(input, rois, scale, height, width, *options))


class PSRoIPool(nn.Module):
    """`ps_roi_pool` with fixed options. In place of `torchvision.ops.PSRoIPool`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float, *, backend: str = "auto") -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Tensor[N, C·height·width, H, W] and boxes -> Tensor[K, C, height, width]."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, backend={self.backend!r}"


class PSRoIAlign(nn.Module):
    """`ps_roi_align` with fixed options. In place of `torchvision.ops.PSRoIAlign`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Tensor[N, C·height·width, H, W] and boxes -> Tensor[K, C, height, width]."""
        options = self.output_size, self.spatial_scale, self.sampling_ratio
        return ps_roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, backend={self.backend!r}"
        )


def checked_arguments(
    input: Tensor, boxes: Boxes, output_size: int | Sequence[int], spatial_scale: float
) -> tuple[Tensor, tuple[int, int], float]:
    check_input(input)
    height, width = output_pair(output_size)
    if input.shape[1] % (height * width):
        raise ValueError(
            f"input must have a multiple of {height} · {width} channels, some for each bin; got {input.shape[1]}"
        )
    return as_rois(boxes, input).detach(), (height, width), check_scale(spatial_scale)


# Both operators are linear in `input`: the gradient is the adjoint, whose gradient is the operator again.


def _ps_roi_pool(input: Tensor, rois: Tensor, scale: float, height: int, width: int, backend: str) -> Tensor:
    check_rois(rois, input.shape[0])
    return cast(Tensor, backends.run("ps_roi_pool", input.device, backend, input, rois, scale, height, width))


def _ps_roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, backend: str
) -> Tensor:
    check_rois(rois, input.shape[0])
    return cast(Tensor, backends.run("ps_roi_align", input.device, backend, input, rois, scale, height, width, ratio))


def _fake_pooled(input: Tensor, rois: Tensor, scale: float, height: int, width: int, *options: Any) -> Tensor:
    return empty_position_sensitive(input, rois.shape[0], height, width)


def _ps_roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    args = (grad, rois, scale, batch, channels, height, width, channels_last)
    return cast(Tensor, backends.run("ps_roi_pool_backward", grad.device, backend, *args))


def _fake_ps_roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    return empty_gradient(grad, (batch, channels, height, width), channels_last)


def _ps_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    scale: float,
    ratio: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    args = (grad, rois, scale, ratio, batch, channels, height, width, channels_last)
    return cast(Tensor, backends.run("ps_roi_align_backward", grad.device, backend, *args))


def _fake_ps_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    scale: float,
    ratio: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    return empty_gradient(grad, (batch, channels, height, width), channels_last)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, ctx.scale, _, _, *ctx.ratio, ctx.backend = inputs
    ctx.shape, ctx.channels_last = input.shape, memory_format(input) is torch.channels_last
    ctx.save_for_backward(rois)


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    options = ctx.scale, *ctx.shape, ctx.channels_last, ctx.backend
    return (torch.ops.fpn_roi.ps_roi_pool_backward(grad, rois, *options), *[None] * 5)


def _align_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    options = ctx.scale, *ctx.ratio, *ctx.shape, ctx.channels_last, ctx.backend
    return (torch.ops.fpn_roi.ps_roi_align_backward(grad, rois, *options), *[None] * 6)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, rois, ctx.scale, *ctx.ratio, _, _, _, _, _, ctx.backend = inputs
    ctx.pooled = grad.shape[2:]
    ctx.save_for_backward(rois)


def _pool_double_backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    output = torch.ops.fpn_roi.ps_roi_pool(tangent, rois, ctx.scale, *ctx.pooled, ctx.backend)
    return (output, *[None] * 8)


def _align_double_backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    output = torch.ops.fpn_roi.ps_roi_align(tangent, rois, ctx.scale, *ctx.pooled, *ctx.ratio, ctx.backend)
    return (output, *[None] * 9)


_POOLED = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SHAPE = "SymInt batch, SymInt channels, SymInt height, SymInt width, bool channels_last"

register(
    "ps_roi_pool",
    f"({_POOLED}, str backend) -> Tensor",
    _ps_roi_pool,
    _fake_pooled,
    _save_for_backward,
    _pool_backward,
)
register(
    "ps_roi_pool_backward",
    f"(Tensor grad, Tensor rois, float spatial_scale, {_SHAPE}, str backend) -> Tensor",
    _ps_roi_pool_backward,
    _fake_ps_roi_pool_backward,
    _save_for_double_backward,
    _pool_double_backward,
)
register(
    "ps_roi_align",
    f"({_POOLED}, int sampling_ratio, str backend) -> Tensor",
    _ps_roi_align,
    _fake_pooled,
    _save_for_backward,
    _align_backward,
)
register(
    "ps_roi_align_backward",
    f"(Tensor grad, Tensor rois, float spatial_scale, int sampling_ratio, {_SHAPE}, str backend) -> Tensor",
    _ps_roi_align_backward,
    _fake_ps_roi_align_backward,
    _save_for_double_backward,
    _align_double_backward,
)

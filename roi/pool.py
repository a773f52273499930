"""RoI max pooling: Girshick, Fast R-CNN (2015), section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from roi import backend as backends
from roi.arguments import check_input, check_scale, output_pair
from roi.boxes import Boxes, as_rois
from roi.layout import argmax_format, empty_argmax, empty_gradient, empty_pooled, format_of, memory_format
from roi.operators import check_rois, register
from roi.torch_pool import roi_pool_gather


def roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """The maximum of the features in each bin of each RoI. In place of `torchvision.ops.roi_pool`.

    A box's corners, times `spatial_scale` and rounded half away from zero, are the first and the last cell of its RoI
    (at least one cell). Bin p of P covers its cells floor(p·h/P) … ceil((p+1)·h/P), by integer arithmetic, and of them
    those that lie on the map. A bin with none is 0 and takes no gradient; NaN in a bin gives NaN.

    torchvision computes the bins in the dtype of the features, so that at a few sizes one of them is a row or a column
    too large and may leave the RoI (7 bins over 57, 114 or 121 cells in float32); and it passes over NaN.

    Args:
        input: Tensor[N, C, H, W], floating point. Contiguous and channels_last features are each read as they lie.
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or for each of the N images a Tensor[Ki, 4] of
            (x1, y1, x2, y2); of any floating-point dtype, whatever that of `input`. Float64 coordinates are rounded in
            float64, all others in float32.
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes: 1/16 for boxes in pixels and a map of stride 16.
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
    with_argmax = torch.is_grad_enabled() and input.requires_grad
    output, _ = torch.ops.fpn_roi.roi_pool(
        input, rois, check_scale(spatial_scale), height, width, with_argmax, backends.check_backend(backend)
    )
    return cast(Tensor, output)


class RoIPool(nn.Module):
    """`roi_pool` with fixed options. In place of `torchvision.ops.RoIPool`.

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
        """`roi_pool(input, rois, …)`: Tensor[N, C, H, W] and boxes -> Tensor[K, C, height, width]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, backend={self.backend!r}"


# The operators that PyTorch's dispatcher knows. Two: the gradient is an operator, so that it has a gradient of its own.


def _roi_pool(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, with_argmax: bool, backend: str
) -> tuple[Tensor, Tensor]:
    check_rois(rois, input.shape[0])
    pooled = backends.run("roi_pool", input.device, backend, input, rois, scale, height, width, with_argmax)
    return cast(tuple[Tensor, Tensor], pooled)


def _roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    args = (grad, rois, argmax, scale, batch, channels, height, width, channels_last)
    return cast(Tensor, backends.run("roi_pool_backward", grad.device, backend, *args))


def _fake_roi_pool(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, with_argmax: bool, backend: str
) -> tuple[Tensor, Tensor]:
    output = empty_pooled(input, rois.shape[0], height, width)
    return output, empty_argmax(input, output, with_argmax, argmax_format(input))


def _fake_roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    scale: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    return empty_gradient(grad, (batch, channels, height, width), channels_last)


def _save_for_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, rois, ctx.scale, _, _, with_argmax, ctx.backend = inputs
    if not with_argmax:
        raise RuntimeError("fpn_roi::roi_pool was called with_argmax=False on features that require a gradient")
    ctx.shape, ctx.channels_last = input.shape, memory_format(input) is torch.channels_last
    ctx.set_materialize_grads(False)  # of the argmax it would be zeros, as many as there are outputs
    ctx.save_for_backward(rois, output[1])


def _pool_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    rois, argmax = ctx.saved_tensors
    options = (*ctx.shape, ctx.channels_last, ctx.backend)
    grad_input = torch.ops.fpn_roi.roi_pool_backward(grad, rois, argmax, ctx.scale, *options)
    return (grad_input, *[None] * 6)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rois, argmax, *_, ctx.channels_last, _ = inputs
    ctx.save_for_backward(rois, argmax)


def _backward_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    tangent = roi_pool_gather(grad_grad, *ctx.saved_tensors)
    return (tangent.contiguous(memory_format=format_of(ctx.channels_last)), *[None] * 9)


register(
    "roi_pool",
    "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, bool with_argmax, "
    "str backend) -> (Tensor output, Tensor argmax)",
    _roi_pool,
    _fake_roi_pool,
    _save_for_pool,
    _pool_backward,
)
register(
    "roi_pool_backward",
    "(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt batch, SymInt channels, SymInt height, "
    "SymInt width, bool channels_last, str backend) -> Tensor",
    _roi_pool_backward,
    _fake_roi_pool_backward,
    _save_for_backward,
    _backward_backward,
)

"""What the operators' outputs are made of, said once for both paths and for the fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` is that and not contiguous too (as with one channel); contiguous otherwise."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def format_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def argmax_dtype(height: int, width: int) -> torch.dtype:
    """The integer that holds any cell y·width + x of a map."""
    return torch.int32 if height * width < 2**31 else torch.int64


def empty_pooled(input: Tensor, rois: int, pooled_height: int, pooled_width: int) -> Tensor:
    """Tensor[rois, C, pooled_height, pooled_width] in the dtype and memory format of `input`, Tensor[N, C, H, W]."""
    shape = (rois, input.shape[1], pooled_height, pooled_width)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def empty_position_sensitive(input: Tensor, rois: int, pooled_height: int, pooled_width: int) -> Tensor:
    """As `empty_pooled`, of an input that has pooled_height · pooled_width times the output's channels."""
    shape = (rois, input.shape[1] // (pooled_height * pooled_width), pooled_height, pooled_width)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def empty_gradient(grad: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Tensor[*shape] of the dtype and on the device of `grad`."""
    return torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=format_of(channels_last))


def argmax_format(input: Tensor) -> torch.memory_format:
    """Of the argmax: that of the input, as kernels write it; on the CPU the one that the gradient is fastest with."""
    return torch.channels_last if input.device.type == "cpu" else memory_format(input)


def empty_argmax(input: Tensor, output: Tensor, with_argmax: bool, layout: torch.memory_format) -> Tensor:
    """A tensor of cells of the shape of `output`, or Tensor[0] where none is asked for."""
    dtype = argmax_dtype(input.shape[2], input.shape[3])
    if not with_argmax:
        return output.new_empty(0, dtype=dtype)
    return torch.empty_like(output, dtype=dtype, memory_format=layout)


def empty_pyramid_argmax(
    features: Sequence[Tensor], output: Tensor, with_argmax: bool, layout: torch.memory_format
) -> Tensor:
    """As `empty_argmax`, of an integer that holds any cell of any level."""
    largest = max(features, key=lambda level: level.shape[2] * level.shape[3])
    return empty_argmax(largest, output, with_argmax, layout)

"""The shape, dtype and memory format of the operators' results, for all paths and for the fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from roi._problem import Maps, Pooling


def empty_pooled(like: Tensor, count: int, maps: Maps, pooling: Pooling) -> Tensor:
    """Tensor[count, C, pooled_height, pooled_width] of the dtype and device of `like`, in the maps' memory format."""
    shape = (count, pooling.output_channels(maps.channels), pooling.pooled_height, pooling.pooled_width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=maps.layout)


def empty_gradients(like: Tensor, maps: Maps) -> list[Tensor]:
    """A Tensor[N, C, Hl, Wl] for each level, of the dtype and device of `like`."""
    return [
        torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=maps.layout) for shape in maps.shapes
    ]


def empty_argmax(like: Tensor, count: int, maps: Maps, pooling: Pooling) -> Tensor:
    """Tensor[count, C, pooled_height, pooled_width] of the integer that holds any cell y·width + x of any level.

    The CUDA kernels write it in the maps' memory format; elsewhere it is channels_last, as the path works inside.
    """
    dtype = argmax_dtype(maps)
    shape = (count, maps.channels, pooling.pooled_height, pooling.pooled_width)
    layout = maps.layout if like.device.type == "cuda" else torch.channels_last
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def argmax_dtype(maps: Maps) -> torch.dtype:
    """The integer that holds any cell y·width + x of any level."""
    return torch.int32 if max(height * width for height, width in maps.sizes) < 2**31 else torch.int64

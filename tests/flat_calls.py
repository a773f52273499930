"""The functions of a path with the arguments of a call in a row, as tests of one map spell them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from roi import cupy_path, torch_path
from roi._problem import Maps, Pooling

ONE_LEVEL = (1.0, 0.0)  # canonical scale and level, which mean nothing where there is one map


class FlatCalls(NamedTuple):
    """roi.cupy_path or roi.torch_path."""

    path: ModuleType

    def multiscale_roi_pool(
        self, maps: Sequence[Tensor], rois: Tensor, scales, scale, level, height, width, with_argmax
    ) -> tuple[Tensor, Tensor]:
        pooling = Pooling(tuple(scales), height, width, canonical_scale=scale, canonical_level=level)
        if with_argmax:
            return self.path.max_pool_with_argmax(maps, rois, pooling)
        return self.path.max_pool(maps, rois, pooling), torch.empty(0)

    def multiscale_roi_pool_backward(
        self, grad: Tensor, rois: Tensor, argmax: Tensor, scales, scale, level, batch, channels, heights, widths, last
    ) -> list[Tensor]:
        pooling = Pooling(tuple(scales), *grad.shape[2:], canonical_scale=scale, canonical_level=level)
        maps = Maps(batch, channels, tuple(heights), tuple(widths), last)
        return self.path.max_gather_adjoint(grad, rois, argmax, pooling, maps)

    def multiscale_roi_align(
        self, maps: Sequence[Tensor], rois: Tensor, scales, scale, level, height, width, ratio, aligned
    ) -> Tensor:
        return self.path.align(maps, rois, Pooling(tuple(scales), height, width, ratio, aligned, scale, level))

    def multiscale_roi_align_backward(
        self, grad: Tensor, rois: Tensor, scales, scale, level, ratio, aligned, batch, channels, heights, widths, last
    ) -> list[Tensor]:
        pooling = Pooling(tuple(scales), *grad.shape[2:], ratio, aligned, scale, level)
        maps = Maps(batch, channels, tuple(heights), tuple(widths), last)
        return self.path.align_adjoint(grad, rois, pooling, maps)

    def roi_pool(self, input: Tensor, rois: Tensor, scale, height, width, with_argmax) -> tuple[Tensor, Tensor]:
        return self.multiscale_roi_pool([input], rois, [scale], *ONE_LEVEL, height, width, with_argmax)

    def roi_pool_backward(
        self, grad: Tensor, rois: Tensor, argmax: Tensor, scale, batch, channels, height, width, last
    ) -> Tensor:
        shape = batch, channels, [height], [width], last
        return self.multiscale_roi_pool_backward(grad, rois, argmax, [scale], *ONE_LEVEL, *shape)[0]

    def roi_align(self, input: Tensor, rois: Tensor, scale, height, width, ratio, aligned) -> Tensor:
        return self.multiscale_roi_align([input], rois, [scale], *ONE_LEVEL, height, width, ratio, aligned)

    def roi_align_backward(
        self, grad: Tensor, rois: Tensor, scale, ratio, aligned, batch, channels, height, width, last
    ) -> Tensor:
        shape = batch, channels, [height], [width], last
        return self.multiscale_roi_align_backward(grad, rois, [scale], *ONE_LEVEL, ratio, aligned, *shape)[0]

    def ps_roi_align(self, input: Tensor, rois: Tensor, scale, height, width, ratio) -> Tensor:
        pooling = Pooling((scale,), height, width, ratio, True, position_sensitive=True)
        return self.path.align([input], rois, pooling)

    def ps_roi_align_backward(
        self, grad: Tensor, rois: Tensor, scale, ratio, batch, channels, height, width, last
    ) -> Tensor:
        pooling = Pooling((scale,), *grad.shape[2:], ratio, True, position_sensitive=True)
        return self.path.align_adjoint(grad, rois, pooling, Maps(batch, channels, (height,), (width,), last))[0]

    def ps_roi_pool(self, input: Tensor, rois: Tensor, scale, height, width) -> Tensor:
        return self.path.average_pool([input], rois, Pooling((scale,), height, width, position_sensitive=True))

    def ps_roi_pool_backward(self, grad: Tensor, rois: Tensor, scale, batch, channels, height, width, last) -> Tensor:
        pooling = Pooling((scale,), *grad.shape[2:], position_sensitive=True)
        return self.path.average_pool_adjoint(grad, rois, pooling, Maps(batch, channels, (height,), (width,), last))[0]


CUPY = FlatCalls(cupy_path)
TORCH = FlatCalls(torch_path)

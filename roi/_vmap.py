"""Batching rules for torch.func.vmap: an operator runs once for a whole batch of problems.

If all problems have the same boxes, their maps are joined along the channels, otherwise along the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from roi._operators import Family

Rule = Callable[..., Any]


def pooling_rule(family: Family, operator: Callable[..., Any], tensors: int) -> Rule:
    """Of an operator (maps, boxes and other tensors, options) -> one or two Tensor[K, C, h, w]."""

    def rule(info: Any, dims: Sequence[Any], input: Any, *rest: Any) -> Any:
        size = info.batch_size
        maps = [
            first(x, dim, size)
            for x, dim in zip(family.maps(input), dims[0] if family.pyramid else [dims[0]], strict=True)
        ]
        rois, *others = rest[:tensors]
        others = [first(x, dim, size) for x, dim in zip(others, dims[2 : 1 + tensors], strict=True)]
        if dims[1] is None:
            maps, others, dim = [as_channels(x) for x in maps], [as_channels(x) for x in others], 1
        else:
            rois = as_images(first(rois, dims[1], size), maps[0].shape[1])
            maps, others, dim = [x.flatten(0, 1) for x in maps], [x.flatten(0, 1) for x in others], 0
        output = operator(family.argument(maps), rois, *others, *rest[tensors:])
        if isinstance(output, Tensor):
            return apart(output, dim, size), dim
        return tuple(apart(x, dim, size) for x in output), (dim,) * len(output)

    return rule


def adjoint_rule(family: Family, operator: Callable[..., Any], tensors: int) -> Rule:
    """Of an operator (grad, boxes and other tensors, options, shape, backend) -> the maps' gradients."""

    def rule(info: Any, dims: Sequence[Any], grad: Tensor, *rest: Any) -> Any:
        size = info.batch_size
        grad = first(grad, dims[0], size)
        rois, *others = rest[:tensors]
        others = [first(x, dim, size) for x, dim in zip(others, dims[2 : 1 + tensors], strict=True)]
        *options, batch, channels, heights, widths, channels_last, backend = rest[tensors:]
        if dims[1] is None:
            grad, others = as_channels(grad), [as_channels(x) for x in others]
            shape, dim = (batch, size * channels), 1
        else:
            rois = as_images(first(rois, dims[1], size), batch)
            grad, others = grad.flatten(0, 1), [x.flatten(0, 1) for x in others]
            shape, dim = (size * batch, channels), 0
        found = operator(grad, rois, *others, *options, *shape, heights, widths, channels_last, backend)
        gradients = [apart(x, dim, size) for x in family.maps(found)]
        return family.argument(gradients), [dim] * len(gradients) if family.pyramid else dim

    return rule


def apart(x: Tensor, dim: int, size: int) -> Tensor:
    """The problems of a batch, which lie side by side in a dimension, in one of their own before it."""
    return x.reshape(*x.shape[:dim], size, x.shape[dim] // size, *x.shape[dim + 1 :])


def first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch as the first dimension."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def as_channels(x: Tensor) -> Tensor:
    """Tensor[N, B·C, H, W] of Tensor[B, N, C, H, W]."""
    return x.transpose(0, 1).flatten(1, 2)


def as_images(rois: Tensor, images: int) -> Tensor:
    """Tensor[B·K, 5] of Tensor[B, K, 5]: the images of each problem come after those of the one before.

    An index off the batch becomes NaN, so that it does not name an image of another problem.
    """
    index, corners = rois[..., :1], rois[..., 1:]
    before = torch.arange(len(rois), dtype=rois.dtype, device=rois.device).view(-1, 1, 1) * images
    index = torch.where((index >= 0) & (index < images), index + before, torch.nan)
    return torch.cat([index, corners], dim=2).flatten(0, 1)

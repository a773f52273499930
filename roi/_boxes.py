"""Box formats and their checks: what the RoI operators accept, brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Boxes = Tensor | Sequence[Tensor]


def as_rois(boxes: Boxes, input: Tensor) -> Tensor:
    """One Tensor[K, 5] of rows (batch index, x1, y1, x2, y2) on the device of `input`, float32 or float64.

    Args:
        boxes: Tensor[K, 5] of such rows, or one Tensor[Ki, 4] of (x1, y1, x2, y2) for each image of the batch. Any
            floating-point dtype; half precision is widened, for it cannot hold pixel coordinates beyond 2048 exactly.
        input: the features, Tensor[N, C, H, W].

    Raises:
        TypeError: `boxes` is neither, or not floating point.
        ValueError: a shape, the number of boxes' tensors or a device is wrong.
    """
    if isinstance(boxes, Tensor):
        check_boxes(boxes, "boxes", 5, input)
        return widened(boxes)
    if not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a Tensor[K, 5] or a list of Tensor[Ki, 4]; got {type(boxes).__name__}")
    if len(boxes) != input.shape[0]:
        raise ValueError(
            f"boxes must be a list of one Tensor[Ki, 4] per image; got {len(boxes)} for a batch of {input.shape[0]}"
        )
    for image, per_image in enumerate(boxes):
        check_boxes(per_image, f"boxes[{image}]", 4, input)
    if not boxes:
        return input.new_empty((0, 5), dtype=torch.float32)
    coordinates = widened(torch.cat(list(boxes)))
    index = torch.cat([coordinates.new_full((part.shape[0], 1), image) for image, part in enumerate(boxes)])
    return torch.cat([index, coordinates], dim=1)


def widened(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def check_boxes(boxes: Tensor, name: str, columns: int, input: Tensor) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{form(name, columns, input)}; got {type(boxes).__name__}")
    if boxes.layout != torch.strided:
        raise TypeError(f"{form(name, columns, input)}; got one of {boxes.layout}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{form(name, columns, input)}; got shape {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"{form(name, columns, input)}; got {boxes.dtype}")
    if boxes.device != input.device:
        raise ValueError(f"{form(name, columns, input)}; got one on {boxes.device}")


def form(name: str, columns: int, input: Tensor) -> str:
    return f"{name} must be a floating-point Tensor[K, {columns}] on {input.device}"


def check_content(rois: Tensor, batch_size: int) -> None:
    """Raise a ValueError that names the first row of `rois` with a non-finite number or a batch index off the batch.

    For CPU tensors: on CUDA reading the content would synchronise, so there such rows come out as NaN instead.
    """
    valid = valid_rows(rois.detach().numpy(), batch_size)
    if not valid.all():
        row = int(valid.argmin())
        raise ValueError(
            f"boxes must hold finite coordinates and batch indices in [0, {batch_size}); "
            f"row {row} is {rois[row].tolist()}"
        )


def valid_rows(rois: NDArray[Any], batch_size: int) -> NDArray[np.bool_]:
    """Which rows of [K, 5] are finite and name an image of the batch: [K]."""
    index = rois[:, 0]
    if len(rois) and np.isfinite(rois).all() and index.min() >= 0 and index.max() < batch_size:
        return np.ones(len(rois), np.bool_)  # what nearly always comes, told by the fewest calls
    valid: NDArray[np.bool_] = np.isfinite(rois).all(axis=1) & (index >= 0) & (index < batch_size)
    return valid

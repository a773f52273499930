"""Box formats and their checks: what the RoI operators accept, brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Unions of this form, for torch 2.6 cannot write the annotation A | B of a forward() into the code of a graph.
PerImage = Union[Tensor, NDArray[Any]]  # noqa: UP007
Boxes = Union[PerImage, Sequence[PerImage]]  # noqa: UP007

# Integers that float32 holds all of; larger ones go to float64, which holds all that are below 2^53.
SHORT_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16)


def as_rois(boxes: Boxes, input: Tensor) -> Tensor:
    """One Tensor[K, 5] of rows (batch index, x1, y1, x2, y2) on the device of `input`, float32 or float64.

    Args:
        boxes: Tensor[K, 5] of such rows, or one Tensor[Ki, 4] of (x1, y1, x2, y2) for each image of the batch; or NumPy
            arrays of that form. Any floating-point or integer dtype; half precision is widened, for it cannot hold
            pixel coordinates beyond 2048 exactly. Without boxes, also of shape [0].
        input: the features, Tensor[N, C, H, W].

    Raises:
        TypeError: `boxes` is neither, or not of numbers.
        ValueError: a shape, the number of boxes' tensors, the format of the coordinates or a device is wrong.
    """
    if isinstance(boxes, (Tensor, np.ndarray)):
        return coordinates(boxes, "boxes", 5, input)
    if not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a Tensor[K, 5] or a list of Tensor[Ki, 4]; got {type(boxes).__name__}")
    if len(boxes) != input.shape[0]:
        raise ValueError(
            f"boxes must be a list of one Tensor[Ki, 4] per image; got {len(boxes)} for a batch of {input.shape[0]}"
        )
    if not boxes:
        return input.new_empty((0, 5), dtype=torch.float32)
    parts = [coordinates(per_image, f"boxes[{image}]", 4, input) for image, per_image in enumerate(boxes)]
    joined = torch.cat(parts)
    index = torch.cat([joined.new_full((part.shape[0], 1), image) for image, part in enumerate(parts)])
    return torch.cat([index, joined], dim=1)


def coordinates(boxes: PerImage, name: str, columns: int, input: Tensor) -> Tensor:
    """Boxes as a float32 or float64 Tensor[K, columns]; numbers are as they were."""
    form = f"{name} must be a Tensor[K, {columns}] on {input.device}"
    if isinstance(boxes, np.ndarray):
        boxes = from_numpy(boxes, form).to(input.device)
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{form}; got {type(boxes).__name__}")
    if boxes.layout != torch.strided:
        raise TypeError(f"{form}; got one of {boxes.layout}")
    if boxes.dim() == 1 and boxes.shape[0] == 0:
        boxes = boxes.reshape(0, columns)  # what torch.tensor([]) and np.array([]) are
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{form}; got shape {tuple(boxes.shape)}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{form}, of numbers; got {boxes.dtype}")
    if boxes.device != input.device:
        raise ValueError(f"{form}; got one on {boxes.device}")
    check_format(boxes, form)
    if boxes.is_floating_point():
        return boxes if boxes.dtype == torch.float64 else boxes.float()
    return boxes.float() if boxes.dtype in SHORT_INTEGERS else boxes.double()


def from_numpy(boxes: NDArray[Any], form: str) -> Tensor:
    if boxes.dtype.kind not in "fiu":
        raise TypeError(f"{form}, of numbers; got {boxes.dtype}")
    # torch takes neither negative strides nor another byte order, and warns of memory that is read-only.
    return torch.from_numpy(np.array(boxes, dtype=boxes.dtype.newbyteorder("="), order="C"))


def check_format(boxes: Tensor, form: str) -> None:
    """Raise for `torchvision.tv_tensors.BoundingBoxes` whose coordinates are not the corners."""
    found = getattr(boxes, "format", None)
    name = getattr(found, "name", found)
    if type(boxes) is not Tensor and isinstance(name, str) and name != "XYXY":
        raise ValueError(
            f"{form}, of (x1, y1, x2, y2); got boxes of the format {name}: convert them with "
            'torchvision.transforms.v2.functional.convert_bounding_box_format(boxes, new_format="XYXY")'
        )


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

"""The operators' arguments beside their boxes: each check raises an error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from roi._problem import memory_format

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_input(input: Tensor, name: str = "input") -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a Tensor[N, C, H, W]; got {type(input).__name__}")
    if input.dim() != 4:
        raise ValueError(f"{name} must be a Tensor[N, C, H, W]; got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{name} must be floating point, of 16 to 64 bits; got {input.dtype}")
    if input.layout != torch.strided:
        raise TypeError(f"{name} must be a dense Tensor; got one of {input.layout}")
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"{name} must have at least one cell; got shape {tuple(input.shape)}")


def output_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in bins of `output_size`, an integer or any sequence of one or two, each at least 1."""
    sides: list[Any] = [output_size] if is_integer(output_size) or not is_sequence(output_size) else list(output_size)
    if len(sides) not in (1, 2) or not all(is_integer(side) and side >= 1 for side in sides):
        raise ValueError(f"output_size must be an int or a pair of ints, at least 1; got {output_size!r}")
    height, width = (
        cast(int, side) if isinstance(side, torch.SymInt) else index(side) for side in (sides[0], sides[-1])
    )
    return height, width


def check_scale(spatial_scale: float, name: str = "spatial_scale") -> float:
    """A positive number of cells of the map per unit of the boxes, finite in float32, as a float."""
    if not is_number(spatial_scale):
        raise TypeError(f"{name} must be a number; got {spatial_scale!r}")
    scale = float(spatial_scale)
    if not 0 < scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and positive; got {spatial_scale!r}")
    return scale


def scaled(rois: Tensor, spatial_scale: float | Sequence[float]) -> tuple[Tensor, float]:
    """The boxes and the scale that an operator is to take.

    Args:
        rois: Tensor[K, 5].
        spatial_scale: cells of the map per unit of the boxes, or those in height and in width. Operators multiply by
            one number only, before all else: for two, the boxes come multiplied.
    """
    if is_number(spatial_scale) or not is_sequence(spatial_scale):
        return rois, check_scale(cast("float", spatial_scale))
    scales = [check_scale(scale) for scale in spatial_scale]
    if len(scales) != 2:
        raise ValueError(f"spatial_scale must be a number or a pair (height, width); got {spatial_scale!r}")
    if scales[0] == scales[1]:
        return rois, scales[0]
    height, width = scales
    image, x1, y1, x2, y2 = rois.unbind(1)
    return torch.stack((image, x1 * width, y1 * height, x2 * width, y2 * height), dim=1), 1.0


def sampling_count(sampling_ratio: int) -> int:
    """`sampling_ratio` as an int, -1 for "as many as the bin is cells long"."""
    return max(check_int(sampling_ratio, "sampling_ratio"), 0) or -1


def check_int(value: int, name: str) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an int; got {value!r}")
    return index(value)


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python's, NumPy's or a compiler's, or a tensor or array that is one."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.is_floating_point() or value.is_complex())
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "biu"
    return hasattr(type(value), "__index__")


def is_number(value: object) -> bool:
    """Whether it is a real number of Python's, NumPy's or a compiler's, or a tensor or array that is one."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "biuf"
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat))


def is_sequence(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether it can be iterated over: a tensor or array that is one number cannot, though its type can."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def check_flag(value: bool, name: str) -> bool:
    """A bool, an integer that stands for one, or NumPy's."""
    if not (isinstance(value, np.bool_) or is_integer(value)):
        raise TypeError(f"{name} must be a bool; got {value!r}")
    return bool(value)


def check_canonical(canonical_scale: float, canonical_level: float) -> tuple[float, float]:
    for value, name in ((canonical_scale, "canonical_scale"), (canonical_level, "canonical_level")):
        if not is_number(value) or not math.isfinite(value):
            raise TypeError(f"{name} must be a finite number; got {value!r}")
    if canonical_scale <= 0:
        raise ValueError(f"canonical_scale must be positive; got {canonical_scale!r}")
    return float(canonical_scale), float(canonical_level)


def check_pyramid(features: Sequence[Tensor], spatial_scales: Sequence[float]) -> tuple[list[Tensor], list[float]]:
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
    if not is_sequence(spatial_scales):
        raise TypeError(f"spatial_scales must be a list of a number per level; got {type(spatial_scales).__name__}")
    scales = [check_scale(scale, "spatial_scales") for scale in spatial_scales]
    if len(scales) != len(features):
        raise ValueError(f"spatial_scales must have one scale per level; got {len(scales)} for {len(features)}")
    layout = memory_format(first)
    return [map_.contiguous(memory_format=layout) for map_ in features], scales

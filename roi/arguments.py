"""The operators' arguments beside their boxes: each check raises an error that names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from operator import index

import numpy as np
import torch
from torch import Tensor

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
    """(height, width) in bins of `output_size`, an int or a pair of them, each at least 1."""
    pair = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(pair) != 2 or not all(is_integer(side) and side >= 1 for side in pair):
        raise ValueError(f"output_size must be an int or a pair of ints, at least 1; got {output_size!r}")
    height, width = (side if isinstance(side, torch.SymInt) else index(side) for side in pair)
    return height, width


def check_scale(spatial_scale: float, name: str = "spatial_scale") -> float:
    """A positive number of cells of the map per unit of the boxes, finite in float32, as a float."""
    if not isinstance(spatial_scale, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number; got {spatial_scale!r}")
    scale = float(spatial_scale)
    if not 0 < scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and positive; got {spatial_scale!r}")
    return scale


def sampling_count(sampling_ratio: int) -> int:
    """`sampling_ratio` as an int, -1 for "as many as the bin is cells long"."""
    return max(check_int(sampling_ratio, "sampling_ratio"), 0) or -1


def check_int(value: int, name: str) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an int; got {value!r}")
    return index(value)


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python's, NumPy's or a compiler's. Tensors and arrays only have its methods."""
    return hasattr(type(value), "__index__") and not isinstance(value, (Tensor, np.ndarray))


def check_flag(value: bool, name: str) -> bool:
    """A bool, an integer that stands for one, or NumPy's."""
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{name} must be a bool; got {value!r}")
    return bool(value)

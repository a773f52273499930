"""At which sizes torchvision's floating-point bins are the integer ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from roi.torch_path.bins import roi_windows


def sizes_exact(sizes: np.ndarray, bins: int, number: type[np.floating]) -> np.ndarray:
    """Whether torchvision's bins floor(p·(size/bins)) … ceil((p+1)·(size/bins)), in `number`, are the integer ones.

    Args:
        sizes: cells of one side of each RoI, (K,) int64.
    """
    p = np.arange(bins + 1)
    integer = p * sizes[:, None]  # times the edges' positions, in units of 1/bins of a cell
    edges = p.astype(number) * (sizes.astype(number) / number(bins))[:, None]
    begins = np.floor(edges[:, :-1]).astype(np.int64) == integer[:, :-1] // bins
    ends = np.ceil(edges[:, 1:]).astype(np.int64) == -(-integer[:, 1:] // bins)
    return (begins & ends).all(axis=1)


def torchvision_bins_are_exact(rois: Tensor, scale: float, height: int, width: int) -> Tensor:
    """Tensor[K] of bool on the CPU: whether torchvision's bins, in the dtype of `rois`, are the integer ones."""
    heights, widths = torch.from_numpy(roi_windows(rois.cpu().numpy(), scale))[:, 3:].unbind(1)
    number = np.float64 if rois.dtype == torch.float64 else np.float32
    return torch.from_numpy(sizes_exact(heights.numpy(), height, number) & sizes_exact(widths.numpy(), width, number))

"""The problems that the RoI benchmarks time: maps and boxes of detectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roi.torch_path.bins import Integers, roi_windows
from tests.reference.boxes import rpn_like


@dataclass(frozen=True)
class Workload:
    """One call of a RoI operator.

    Attributes:
        rois: boxes over all images.
        batch, channels, height, width: shape of the map.
        scale: cells of the map per pixel.
        image: (height, width) of the images, in pixels.
        bins: of each side of the output.
        seed: of the boxes and the features.
    """

    name: str
    rois: int
    batch: int
    channels: int
    height: int
    width: int
    scale: float
    image: tuple[int, int]
    bins: int = 7
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    def boxes(self) -> Tensor:
        """Tensor[rois, 5], float32, on the CPU."""
        return rpn_like(self.rois, self.batch, *self.image, seed=self.seed)

    def features(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> Tensor:
        """Tensor[N, C, H, W] of normally distributed values."""
        generator = torch.Generator(device).manual_seed(self.seed)
        values = torch.randn(self.shape, generator=generator, device=device)
        return values.to(dtype).contiguous(memory_format=layout)

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"{self.name}: {self.rois} RoIs, map {shape}, scale 1/{round(1 / self.scale)}, {self.bins}×{self.bins}"


LARGE_IMAGE = (800, 1344)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("rpn", 512, 1, 256, 50, 84, 1 / 16, LARGE_IMAGE),
        Workload("training", 2 * 512, 2, 256, 50, 84, 1 / 16, LARGE_IMAGE),  # P4
        Workload("inference", 1000, 1, 256, 50, 84, 1 / 16, LARGE_IMAGE),
        Workload("fast-rcnn", 300, 1, 512, 38, 50, 1 / 16, (600, 800)),  # conv5 of VGG16
        Workload("large", 8000, 8, 256, 100, 168, 1 / 8, LARGE_IMAGE),  # P3
    )
}


def past_the_map(rois: Tensor, scale: float, height: int, width: int) -> float:
    """Share of Tensor[K, 5] `rois` that have a cell outside the map of height × width cells."""
    _, y, x, h, w = roi_windows(rois.numpy(), scale).T
    outside = (y < 0) | (x < 0) | (y + h > height) | (x + w > width)
    return float(outside.mean())


def cells_touched(windows: Integers, batch: int, height: int, width: int) -> int:
    """Cells of the maps that at least one of `roi_windows` covers, each counted once."""
    covered = torch.zeros(batch, height, width, dtype=torch.bool)
    for image, y, x, h, w in windows.tolist():
        covered[image, max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
    return int(covered.sum())

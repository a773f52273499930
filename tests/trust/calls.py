"""Ordinary calls of everything that takes tensors, forward and backward, to be made again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import roi
from fpn.pyramid import FPN
from fpn.resnet import BasicBlock, ResNet
from tests.reference.boxes import ordinary_boxes

BOXES = ordinary_boxes(20, 2, 64, 64)
SCALES = [1.0, 0.5, 0.25]

OPERATORS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "roi_pool": lambda maps: roi.roi_pool(maps[0], BOXES, (4, 4)),
    "roi_align": lambda maps: roi.roi_align(maps[0], BOXES, (4, 4)),
    "roi_align, sampling 2": lambda maps: roi.roi_align(maps[0], BOXES, (4, 4), 1.0, 2, True),
    "ps_roi_pool": lambda maps: roi.ps_roi_pool(maps[0], BOXES, (4, 4)),
    "ps_roi_align": lambda maps: roi.ps_roi_align(maps[0], BOXES, (4, 4), 1.0, 2),
    "multiscale_roi_pool": lambda maps: roi.multiscale_roi_pool(maps, BOXES, 4, SCALES, canonical_scale=32),
    "multiscale_roi_align": lambda maps: roi.multiscale_roi_align(maps, BOXES, 4, SCALES, canonical_scale=32),
}


def maps() -> list[Tensor]:
    """A pyramid of 2 images, 16 channels and 64×64, 32×32 and 16×16 cells: 512 KB the finest."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 16, 64 // n, 64 // n, generator=generator).requires_grad_() for n in (1, 2, 4)]


def forward_and_backward(operator: str) -> list[Tensor]:
    """The output, and the gradient of each map that it was pooled from."""
    leaves = maps()
    output = OPERATORS[operator](leaves)
    gradients = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def small_fpn() -> FPN:
    """A block for each stage: as many kinds of layers as there are, and little work."""
    torch.manual_seed(0)
    return FPN(ResNet(BasicBlock, (1, 1, 1, 1), width_per_group=64), out_channels=16)

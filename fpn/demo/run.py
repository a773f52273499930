"""What the demo does with a model and a photo: one timed forward pass, and boxes pooled from their levels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpn.demo.photo import Photo, to_tensor
from fpn.preprocessing import IMAGENET
from fpn.pyramid import FPN
from roi import MultiScaleRoIPool

ROI_SIZE = 7

Box = tuple[float, float, float, float]  # x1, y1, x2, y2


@dataclass(frozen=True)
class Times:
    """Milliseconds of one forward pass.

    Attributes:
        bottom_up: the trunk, C2 to C5.
        levels: the lateral and the smoothing convolution of each level that has them, finest first.
        extra: the levels above those.
        total: everything, with the merging: upsampling and addition.
    """

    bottom_up: float
    levels: tuple[float, ...]
    extra: float
    total: float

    @property
    def merging(self) -> float:
        return self.total - self.bottom_up - sum(self.levels) - self.extra


@dataclass(frozen=True)
class Result:
    """What the model made of a photo, on the CPU.

    Attributes:
        pyramid: every level, finest first, Tensor[1, C, h, w].
        strides: of each level, pixels of the model's input per cell.
        boxes: Tensor[K, 4] in pixels of the photo.
        model_boxes: Tensor[K, 4] in pixels of the model's input.
        levels: for each box, the k of the level Pk that it is pooled from.
        rois: Tensor[K, C, 7, 7].
        times: of the forward pass.
    """

    pyramid: tuple[Tensor, ...]
    strides: tuple[int, ...]
    boxes: Tensor
    model_boxes: Tensor
    levels: tuple[int, ...]
    rois: Tensor
    times: Times

    def save(self, path: Path) -> None:
        """Writes the arrays that `--help` lists."""
        arrays: dict[str, Any] = {
            f"p{k}": level.numpy() for k, level in zip(level_numbers(self.strides), self.pyramid, strict=True)
        }
        arrays |= {"boxes": self.boxes.numpy(), "model_boxes": self.model_boxes.numpy()}
        arrays |= {"levels": np.array(self.levels), "rois": self.rois.numpy()}
        np.savez(path, **arrays)


@torch.inference_mode()
def run_model(model: FPN, photo: Photo, boxes: Sequence[Box], calibrate: bool) -> Result:
    """Runs the model, on the device where it is, and pools the boxes.

    Args:
        model: in eval mode.
        photo: as read.
        boxes: in pixels of the photo.
        calibrate: give batch norm the photo's statistics first.
    """
    device = next(model.parameters()).device
    images = to_tensor(photo.image, model.preprocessing or IMAGENET).to(device)
    if calibrate:
        calibrate_batch_norm(model, images)
    else:
        model(images)  # a warm-up, as calibration is: memory is allocated, algorithms are chosen
    pyramid, times = timed_forward(model, images)
    photo_boxes = torch.tensor(boxes, dtype=torch.float32)
    model_boxes = photo_boxes * torch.tensor(photo.scale * 2)
    pooler = make_pooler(model)
    rois = pooler(dict(zip(pooler.featmap_names, pyramid, strict=False)), [model_boxes.to(device)], [images.shape[2:]])
    assert pooler.map_levels is not None
    levels = tuple(int(pooler.featmap_names[index]) for index in pooler.map_levels([model_boxes]))
    on_cpu = tuple(level.cpu() for level in pyramid)
    return Result(on_cpu, model.strides, photo_boxes, model_boxes, levels, rois.cpu(), times)


def calibrate_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Sets the running statistics of every batch norm to those of its own input, layer after layer."""

    def adopt(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if x[:, 0].numel() > 1:  # one cell has no variance
            norm.running_var, norm.running_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(adopt) for norm in norms]
    model(images)
    for hook in hooks:
        hook.remove()


def timed_forward(model: FPN, images: Tensor) -> tuple[tuple[Tensor, ...], Times]:
    """One forward pass and its times: from before a module's forward to after it, on the device's own clock."""
    clock = Clock(images.device)
    marks: defaultdict[nn.Module, list[Any]] = defaultdict(list)

    def mark(module: nn.Module, *_: object) -> None:
        marks[module].append(clock.mark())

    parts = [model, model.bottom_up, model.extra, *model.lateral, *model.smooth]
    hooks = [part.register_forward_pre_hook(mark) for part in parts]
    hooks += [part.register_forward_hook(mark) for part in parts]
    pyramid = model(images)
    for hook in hooks:
        hook.remove()

    ms = {part: clock.milliseconds(*marks[part]) for part in parts}
    top_down = [ms[lateral] + ms[smooth] for lateral, smooth in zip(model.lateral, model.smooth, strict=True)]
    return pyramid, Times(ms[model.bottom_up], tuple(reversed(top_down)), ms[model.extra], ms[model])


class Clock:
    """Marks on a device's timeline: events on CUDA, which do not stall it; elsewhere the clock of the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event  # torch has no types for it
            return torch.cuda.current_stream(self.device).record_event(event(enable_timing=True))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def milliseconds(self, start: Any, end: Any) -> float:
        if self.device.type == "cuda":
            end.synchronize()
            return float(start.elapsed_time(end))
        return 1000 * float(end - start)


def level_numbers(strides: Sequence[int]) -> list[int]:
    """The k of each level Pk, whose stride is 2^k."""
    return [stride.bit_length() - 1 for stride in strides]


def make_pooler(model: FPN) -> MultiScaleRoIPool:
    """RoI max pooling from the levels that have a lateral, named by their k; not from those above, as in the paper."""
    strides = model.strides[: len(model.lateral)]
    names = [str(k) for k in level_numbers(strides)]
    return MultiScaleRoIPool(names, ROI_SIZE, spatial_scales=[1 / stride for stride in strides])

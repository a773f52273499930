"""A detector that is being trained: its steps, what of it goes into a checkpoint, and checkpoints on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fpn._output import written_whole

WEIGHT_DECAY = 1e-4
WARM_UP = 0.1  # of the steps; then a cosine to zero


class Trainee:
    """A detector with its optimizer and its schedule: AdamW, linear warm-up, cosine.

    Args:
        detector: in torchvision's form: (images, targets) -> losses by name, while it is in training mode.
        steps: of the whole training.
        learning_rate: the highest.
        device: where it is trained. In a process group, all processes train it together.

    Attributes:
        detector: on its device.
        losses: the sum of the losses of each step, on the scenes of this process.
        seconds: of each step: forward pass, backward pass and update, and not the making of the scenes.
    """

    def __init__(self, detector: nn.Module, steps: int, learning_rate: float, device: torch.device) -> None:
        # channels_last is the faster format here, with either package's operators.
        self.detector = detector.to(device).to(memory_format=torch.channels_last)
        self.replica: nn.Module = self.detector
        if torch.distributed.is_initialized():
            self.replica = DistributedDataParallel(self.detector, [device] if device.type == "cuda" else None)
        self.device = device
        self.optimizer = AdamW(detector.parameters(), learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        self.schedule = LambdaLR(self.optimizer, partial(warm_up_and_cosine, steps=steps))
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], seed: int) -> None:
        """One update. The detector samples anchors and proposals: `seed` is all that the sampling depends on.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.detector.train()
        torch.manual_seed(seed)
        begin = time.perf_counter()
        images = [image.to(self.device) for image in images]
        losses = self.replica(images, on_device(targets, self.device))
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        value = loss.item()  # waits for the device
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {len(self.losses)}; a lower --learning-rate may help"
            )
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(value)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, and the record of those that were."""
        parts = {name: getattr(self, name).state_dict() for name in ("detector", "optimizer", "schedule")}
        return parts | {"losses": self.losses, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("detector", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])


def warm_up_and_cosine(step: int, steps: int) -> float:
    """Share of the highest learning rate at that step of so many."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def on_device(targets: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """The same targets, or detections, there."""
    return [{name: value.to(device) for name, value in target.items()} for target in targets]


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Under its name there is a whole checkpoint at every moment: the last one, until this one is on the disk."""
    with written_whole([path]) as (unfinished,):
        torch.save(dict(checkpoint), unfinished)


def load(path: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a training with the same options; None where there is none yet.

    Raises:
        ValueError: the checkpoint is of a training with other options.
    """
    if not path.exists():
        return None
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    other = {name: value for name, value in checkpoint["options"].items() if options[name] != value}
    if other:
        raise ValueError(f"{path} is of a training with {other}; continue that one, or give another --output")
    return checkpoint

"""A clear error where a torchvision detector calls a pyramid directly; its own comes from deep inside."""

from __future__ import annotations

import sys

import torch
from torch import nn


def refuse_bare_use(pyramid: nn.Module) -> None:
    """Raise if `pyramid` is the backbone of a torchvision detector that is calling it now.

    Raises:
        TypeError: it is; the message says what to write.
    """
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(2)  # what called forward
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch.nn.modules."):
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").startswith("torchvision.models.detection."):
        detector = frame.f_locals.get("self")
        if getattr(detector, "backbone", None) is pyramid:
            raise TypeError(
                f"{type(detector).__name__} takes a backbone that returns a dict of levels, and "
                f"{type(pyramid).__name__} returns a tuple: write {type(detector).__name__}("
                "fpn.detection.TorchvisionBackbone(backbone), ...), which names the levels and adds a P6"
            )

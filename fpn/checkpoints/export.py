"""Our FPNs under other frameworks' names."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fpn.checkpoints.namings import Names, detectron2, torchvision
from fpn.levels import P6P7
from fpn.pyramid import FPN
from fpn.resnet import Bottleneck


def export_state_dict(
    model: FPN, naming: Literal["torchvision", "detectron2"], prefix: str = "backbone."
) -> dict[str, Tensor]:
    """The state dict of an FPN over one of our ResNets, under the names of torchvision or detectron2.

    `from_checkpoint` builds the same model from it. A model that `from_checkpoint` built from a checkpoint of that
    framework gives the checkpoint's entries back (older torchvision names become the present ones).

    Args:
        model: the FPN.
        naming: "torchvision" or "detectron2".
        prefix: stands before all names. "backbone." is where their detectors have the FPN.

    Raises:
        ValueError: `naming` is unknown, or that framework's FPN cannot compute what the model computes.
    """
    namings = {
        "torchvision": (torchvision(conv=".0"), torchvision(conv=".0", norm=".1")),
        "detectron2": (detectron2(), detectron2(norm=".norm")),
    }
    if naming not in namings:
        raise ValueError(f"naming must be one of {list(namings)}; got {naming!r}")
    state = model.state_dict()
    names = Names(namings[naming]["lateral.0.1.weight" in state], prefix, len(model.lateral))
    theirs = {name: names.theirs(name) for name in state}
    unlike = [f"entry {name}" for name, other in theirs.items() if other is None]
    if model.upsample != "nearest":
        unlike.append(f"upsample={model.upsample!r}")
    if isinstance(model.smooth[0], nn.Identity):
        unlike.append("smooth_top=False")
    if isinstance(model.extra, P6P7) and not model.extra.relu:
        unlike.append("P6P7(relu=False)")
    if naming == "torchvision" and any(
        isinstance(module, Bottleneck) and module.conv1.stride != (1, 1) for module in model.bottom_up.modules()
    ):
        unlike.append("stride_in_1x1=True")
    if unlike:
        raise ValueError(f"{naming}'s FPN does not have: {', '.join(unlike[:5])}")
    return {other: state[name] for name, other in theirs.items() if other is not None}

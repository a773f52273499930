"""A trunk's first convolution for images of another number of channels, with the weights that timm would give it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.namings import Names

FIRST = "bottom_up.conv1.weight"
RGB = 3


def adapt_channels(state: Mapping[str, Tensor], names: Names, channels: int) -> dict[str, Tensor]:
    """The state dict, its first convolution for so many channels.

    One channel has the sum of the weights of three: a grey image gives what it gives as three equal channels. Of more
    channels each has a weight of the three, in turn, times 3 / channels.

    Raises:
        CheckpointError: the checkpoint's images have neither three channels nor that number.
    """
    first = names.theirs(FIRST)
    if first is None or first not in state or state[first].shape[1] == channels:
        return dict(state)
    weight = state[first]
    if weight.dim() != 4 or weight.shape[1] != RGB:
        raise CheckpointError(
            f"its images have {weight.shape[1]} channels; only weights of {RGB} channels are adapted, to {channels}"
        )
    if channels == 1:
        adapted = weight.sum(dim=1, keepdim=True)
    else:
        times = -(-channels // RGB)
        adapted = weight.repeat(1, times, 1, 1)[:, :channels] * (RGB / channels)
    return {**state, first: adapted}

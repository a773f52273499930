"""The maps that a trunk returns, in whatever form, as a list of Tensor[N, C, H, W]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn


def as_maps(output: Any, channels: Sequence[int], layout: str | None) -> list[Tensor]:
    """What a trunk returned, as a list of maps.

    Args:
        output: a sequence or a dict of maps, finest first. While torch.fx records, also one Proxy: the output of a
            trunk that is a leaf of the graph.
        channels: of each map.
        layout: of each map: "NCHW", "NHWC", or None: recognised by their shapes.

    Raises:
        TypeError: it is neither a sequence nor a dict.
        ValueError: it has other channels, or another number of maps.
    """
    if isinstance(output, fx.Proxy):
        whole: Any = output
        output = [whole[index] for index in range(len(channels))]
    if isinstance(output, Tensor) or not isinstance(output, (Mapping, Sequence)):  # torch 2.6 compiles no `|` here
        raise TypeError(
            f"bottom_up must return a sequence or a dict of feature maps, finest first; got {type(output).__name__}"
        )
    maps = list(output.values() if isinstance(output, Mapping) else output)
    if layout == "NHWC":
        maps = [c.permute(0, 3, 1, 2) for c in maps]
    if not any(isinstance(c, fx.Proxy) for c in maps):
        return in_nchw(maps, tuple(channels), layout)
    if layout is not None:
        return maps
    recorded = in_nchw(maps, tuple(channels), layout)
    return [recorded[index] for index in range(len(channels))]


def in_nchw(maps: list[Tensor], channels: tuple[int, ...], layout: str | None) -> list[Tensor]:
    """The maps, checked. Where `layout` is None, those that have their channels last, all of them, are permuted.

    torch.fx records it as one call, since only real maps have shapes.
    """
    found = tuple(c.shape[1] for c in maps)
    if found == channels:
        return maps
    if layout is None and all(c.dim() == 4 for c in maps) and tuple(c.shape[3] for c in maps) == channels:
        return [c.permute(0, 3, 1, 2) for c in maps]
    raise ValueError(f"bottom_up must return maps of {channels} channels; got {found}")


fx.wrap("in_nchw")


def announced(bottom_up: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides that `bottom_up.feature_info` announces; empty where there is none."""
    info: Any = getattr(bottom_up, "feature_info", [])
    if hasattr(info, "channels"):  # timm's FeatureInfo: only the maps that were asked for
        return tuple(info.channels()), tuple(info.reduction())
    return tuple(level["num_chs"] for level in info), tuple(level["reduction"] for level in info)


def announced_layout(bottom_up: nn.Module) -> str | None:
    """ "NCHW" or "NHWC", the value of the attribute `output_fmt` of timm's models; None where there is none."""
    layout = getattr(bottom_up, "output_fmt", None)
    return None if layout is None else str(getattr(layout, "value", layout))

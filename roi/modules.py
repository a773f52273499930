"""The operators as modules, with torchvision's names and arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from roi._arguments import check_canonical, output_pair
from roi._boxes import Boxes
from roi.functions import (
    multiscale_roi_align,
    multiscale_roi_pool,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)


class RoIPool(nn.Module):
    """`roi_pool` with fixed options. In place of `torchvision.ops.RoIPool`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float, *, backend: str = "auto") -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """`roi_pool(input, rois, …)`: Tensor[N, C, H, W] and boxes -> Tensor[K, C, height, width]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, backend={self.backend!r}"


class RoIAlign(nn.Module):
    """`roi_align` with fixed options. In place of `torchvision.ops.RoIAlign`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        aligned: whether cells have their values at their centres.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """`roi_align(input, rois, …)`: Tensor[N, C, H, W] and boxes -> Tensor[K, C, height, width]."""
        options = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        return roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, backend={self.backend!r}"
        )


class PSRoIPool(nn.Module):
    """`ps_roi_pool` with fixed options. In place of `torchvision.ops.PSRoIPool`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float, *, backend: str = "auto") -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Tensor[N, C·height·width, H, W] and boxes -> Tensor[K, C, height, width]."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, backend={self.backend!r}"


class PSRoIAlign(nn.Module):
    """`ps_roi_align` with fixed options. In place of `torchvision.ops.PSRoIAlign`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes.
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Tensor[N, C·height·width, H, W] and boxes -> Tensor[K, C, height, width]."""
        options = self.output_size, self.spatial_scale, self.sampling_ratio
        return ps_roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, backend={self.backend!r}"
        )


class _MultiScale(nn.Module):
    """What the two poolers have in common: which maps of a dict they take, and at which scales."""

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        canonical_scale: int,
        canonical_level: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = output_pair(output_size)
        self.canonical_scale, self.canonical_level = check_canonical(canonical_scale, canonical_level)
        self.backend = backend

    def levels(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[float]]:
        maps = [level for name, level in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(f"x must have a map of {list(self.featmap_names)}; got {list(x)}")
        if not len(image_shapes) == len(boxes) > 0:
            raise ValueError(f"image_shapes must have one (height, width) per image; got {len(image_shapes)}")
        return maps, infer_scales(maps, image_shapes)

    def extra_repr(self) -> str:
        return f"featmap_names={list(self.featmap_names)}, output_size={self.output_size}"


class MultiScaleRoIAlign(_MultiScale):
    """RoIAlign on those maps of a dict that have the given names. In place of `torchvision.ops.MultiScaleRoIAlign`.

    Args:
        featmap_names: of the levels, finest first in the dict.
        output_size: bins, an int or (height, width).
        sampling_ratio: samples of a bin's side; 0 or less: as many as the bin is cells long, rounded up.
        canonical_scale, canonical_level: as in `multiscale_roi_align`.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__(featmap_names, output_size, canonical_scale, canonical_level, backend)
        self.sampling_ratio = sampling_ratio

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Tensor[K, C, height, width].

        Args:
            x: maps by name, Tensor[N, C, Hl, Wl].
            boxes: of each image a Tensor[Ki, 4] of (x1, y1, x2, y2) in pixels.
            image_shapes: (height, width) of each image in pixels, before batching pads it. The maps' scales are
                inferred from the largest: the power of two nearest to Hl / height.
        """
        maps, scales = self.levels(x, boxes, image_shapes)
        return multiscale_roi_align(
            maps,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sampling_ratio={self.sampling_ratio}, backend={self.backend!r}"


class MultiScaleRoIPool(_MultiScale):
    """RoI max pooling on those maps of a dict that have the given names.

    Args:
        featmap_names: of the levels, finest first in the dict.
        output_size: bins, an int or (height, width).
        canonical_scale, canonical_level: as in `multiscale_roi_align`.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__(featmap_names, output_size, canonical_scale, canonical_level, backend)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Tensor[K, C, height, width]; arguments as in `MultiScaleRoIAlign.forward`."""
        maps, scales = self.levels(x, boxes, image_shapes)
        return multiscale_roi_pool(
            maps,
            boxes,
            self.output_size,
            scales,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


def infer_scales(maps: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Of each map the power of two nearest to its height by that of the largest image.

    Raises:
        ValueError: by height and by width that is not the same.
    """
    height = max(known(shape[0]) for shape in image_shapes)
    width = max(known(shape[1]) for shape in image_shapes)
    scales = []
    for map_ in maps:
        by_height, by_width = (
            2.0 ** round(math.log2(known(cells) / pixels))
            for cells, pixels in zip(map_.shape[-2:], (height, width), strict=True)
        )
        if by_height != by_width:
            raise ValueError(
                f"x must have maps of the images' shape; got one of {tuple(map_.shape[-2:])} for {height} × {width}"
            )
        scales.append(by_height)
    return scales


def known(size: int) -> int:
    """A side as a number. One that `torch.export` leaves open has that of the example: scales are the same at any size,
    and to compare the open side with a number would close it.
    """
    return cast(int, size.node.hint) if isinstance(size, torch.SymInt) else size

"""The poolers of a pyramid as modules, with torchvision's names, arguments and attributes.

Where torchvision is installed its own pooler is their base class: the constructors of its detectors ask for that.
`import roi` imports this module, and so torchvision, when one of its classes is first asked for.
"""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from roi._arguments import check_canonical, check_scale, output_pair
from roi._backend import backend_repr
from roi._boxes import Boxes, as_rois
from roi._problem import LEVEL_EPSILON, level_range, memory_format
from roi.functions import multiscale_roi_align, multiscale_roi_pool, roi_align, roi_pool
from roi.torch_path.levels import level_of

if TYPE_CHECKING:
    Base = nn.Module
else:
    try:
        from torchvision.ops import MultiScaleRoIAlign as Base
    except Exception:
        Base = nn.Module

Mapper = Callable[[Any], Tensor]  # boxes of each image -> the index of each box's map
SpatialScales = Sequence[float] | Mapping[str, float]


@dataclass
class LevelMapper:
    """The level of each box: Lin et al., Feature Pyramid Networks (2017), section 4.2, equation 1.

    Attributes:
        k_min, k_max: the first and the last level, -log2 of the scales of the first and of the last map.
        s0, lvl0: a box of that size, in pixels, belongs to that level.
        eps: added to the level, that one of exactly a level's size is not put below it by rounding.
    """

    k_min: int
    k_max: int
    s0: float = 224
    lvl0: float = 4
    eps: float = LEVEL_EPSILON

    def __call__(self, boxlists: Sequence[Tensor]) -> Tensor:
        """Tensor[K] of int64: for all boxes, Tensor[Ki, 4] of each image, the index of the map."""
        return level_of(torch.cat(list(boxlists)), self.k_min, self.k_max, self.s0, self.lvl0, self.eps)


class _MultiScale(Base):
    """What the two poolers have in common: which maps of a dict they take, and at which scales."""

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        canonical_scale: float,
        canonical_level: float,
        spatial_scales: SpatialScales | None,
        backend: str,
    ) -> None:
        nn.Module.__init__(self)
        check_canonical(canonical_scale, canonical_level)
        self.featmap_names = featmap_names
        self.output_size = output_pair(output_size)
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.backend = backend
        self.scales: list[float] | None = None
        self.map_levels: Mapper | None = None
        if spatial_scales is not None:
            self.set_scales(spatial_scales)

    def set_scales(self, spatial_scales: SpatialScales) -> None:
        """Use these scales from now on.

        Args:
            spatial_scales: cells of each map per pixel, in the order of the maps; or by the maps' names, which may be
                more than are pooled.

        Raises:
            TypeError, ValueError: it has no scale for a map of `featmap_names`, or one that is not a positive number.
        """
        if isinstance(spatial_scales, Mapping):
            spatial_scales = [scale for name, scale in spatial_scales.items() if name in self.featmap_names]
        if isinstance(spatial_scales, str) or not isinstance(spatial_scales, Iterable):
            raise TypeError(f"spatial_scales must be a list or a dict of numbers; got {type(spatial_scales).__name__}")
        scales = [check_scale(scale, "spatial_scales") for scale in spatial_scales]
        if not scales:
            raise ValueError(f"spatial_scales must have a scale for a map of {list(self.featmap_names)}; got none")
        self.scales = scales
        self.map_levels = LevelMapper(*level_range(scales), self.canonical_scale, self.canonical_level)

    def levels(
        self, x: Mapping[str, Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[float], Mapper]:
        """The maps, their scales, and which of them a box belongs to."""
        maps = named_maps(x, self.featmap_names)
        if self.scales is not None and self.map_levels is not None:
            return maps, self.scales, self.map_levels
        scales, mapper = infer_scales(maps, image_shapes, self.canonical_scale, self.canonical_level)
        if not (isinstance(scales, fx.Proxy) or torch.compiler.is_compiling()):
            self.scales, self.map_levels = scales, mapper
        return maps, scales, mapper

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return f"featmap_names={self.featmap_names}, output_size={self.output_size}"


class MultiScaleRoIAlign(_MultiScale):
    """RoIAlign on those maps of a dict that have the given names. In place of `torchvision.ops.MultiScaleRoIAlign`.

    Scales that are not given are inferred at the first call, and kept, as torchvision's pooler does: each is the power
    of two nearest to the map's height by that of the largest image. That fails for strides that are no powers of two,
    and where the first image is so small that a map's height is rounded to another power: `spatial_scales` of a model
    whose strides are known is better, and `fpn.detection.accelerate` gives it.

    Args:
        featmap_names: of the levels, finest first in the dict.
        output_size: bins, an int or (height, width).
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up.
        canonical_scale, canonical_level: as in `multiscale_roi_align`.
        aligned: whether cells have their values at their centres.
        spatial_scales: cells of each map per pixel, 1 / stride: a list in the order of the maps, or a dict by their
            names, as `fpn.detection.TorchvisionBackbone.spatial_scales`. None: inferred.
        backend: "auto", "torch", "cupy" or "torchvision".

    Attributes:
        scales: cells of each map per pixel; None before they are inferred. Set it to None to have them inferred anew.
        map_levels: boxes of each image -> Tensor[K] of int64, the index of each box's map; None before scales are
            inferred. It may be set to any function of that kind.

    Raises:
        TypeError, ValueError: an argument is not of that form.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: float = 4,
        aligned: bool = False,
        spatial_scales: SpatialScales | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(featmap_names, output_size, canonical_scale, canonical_level, spatial_scales, backend)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Tensor[K, C, height, width].

        Args:
            x: maps by name, Tensor[N, C, Hl, Wl].
            boxes: of each image a Tensor[Ki, 4] of (x1, y1, x2, y2) in pixels.
            image_shapes: (height, width) of images in pixels, before batching pads them. Scales are inferred from the
                largest, at the first call.

        Raises:
            TypeError, ValueError: an argument is not of that form, or scales are to be inferred from sizes that
                `torch.export` leaves open.
        """
        maps, scales, mapper = self.levels(x, image_shapes)
        sampling = self.sampling_ratio, self.aligned
        return align_levels(maps, boxes, self.output_size, scales, mapper, *sampling, self.backend)

    def extra_repr(self) -> str:
        aligned = ", aligned=True" if self.aligned else ""
        return f"{super().extra_repr()}, sampling_ratio={self.sampling_ratio}{aligned}{backend_repr(self.backend)}"


class MultiScaleRoIPool(_MultiScale):
    """RoI max pooling on those maps of a dict that have the given names.

    Args, Attributes, Raises: as `MultiScaleRoIAlign`.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        *,
        canonical_scale: float = 224,
        canonical_level: float = 4,
        spatial_scales: SpatialScales | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(featmap_names, output_size, canonical_scale, canonical_level, spatial_scales, backend)

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Tensor[K, C, height, width]; arguments as in `MultiScaleRoIAlign.forward`."""
        maps, scales, mapper = self.levels(x, image_shapes)
        return pool_levels(maps, boxes, self.output_size, scales, mapper, self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + backend_repr(self.backend)


# Each function below is one node of a torch.fx graph: while it is recorded, no values are known.


@fx.wrap
def named_maps(x: Mapping[str, Tensor], featmap_names: Sequence[str]) -> list[Tensor]:
    """The maps that have one of these names, in the dict's order."""
    maps = [level for name, level in x.items() if name in featmap_names]
    if not maps:
        raise ValueError(f"x must have a map of {list(featmap_names)}; got {list(x)}")
    return maps


@fx.wrap
def infer_scales(
    maps: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]], canonical_scale: float, canonical_level: float
) -> tuple[list[float], LevelMapper]:
    """Of each map the power of two nearest to its height by that of the largest image, as torchvision's pooler does.

    Raises:
        ValueError: there is no image, or a height is left open by `torch.export`.
    """
    if not image_shapes:
        raise ValueError("image_shapes must have the (height, width) of an image; got none")
    heights = [map_.shape[2] for map_ in maps]
    pixels = max(shape[0] for shape in image_shapes)
    if any(isinstance(height, torch.SymInt) for height in [*heights, pixels]):
        raise ValueError(
            "scales cannot be inferred from sizes that are left open: give the pooler spatial_scales (1 / stride of "
            "each map), or call it once before"
        )
    scales = [2.0 ** round(math.log2(height / pixels)) for height in heights]
    return scales, LevelMapper(*level_range(scales), canonical_scale, canonical_level)


@fx.wrap
def align_levels(
    maps: list[Tensor],
    boxes: Boxes,
    output_size: tuple[int, int],
    scales: list[float],
    mapper: Any,
    sampling_ratio: int,
    aligned: bool,
    backend: str,
) -> Tensor:
    """RoIAlign of each box on the map that `mapper` says."""
    maps, dtype = of_one_dtype(maps)
    if len(maps) == 1 or is_of_scales(mapper, scales):
        options: Any = {**canonical_of(mapper), "backend": backend}
        return multiscale_roi_align(maps, boxes, output_size, scales, sampling_ratio, aligned, **options).to(dtype)

    def pool(map_: Tensor, rois: Tensor, scale: float) -> Tensor:
        return roi_align(map_, rois, output_size, scale, sampling_ratio, aligned, backend=backend)

    return level_by_level(pool, maps, boxes, scales, mapper).to(dtype)


@fx.wrap
def pool_levels(
    maps: list[Tensor], boxes: Boxes, output_size: tuple[int, int], scales: list[float], mapper: Any, backend: str
) -> Tensor:
    """Max pooling of each box on the map that `mapper` says."""
    maps, dtype = of_one_dtype(maps)
    if len(maps) == 1 or is_of_scales(mapper, scales):
        options: Any = {**canonical_of(mapper), "backend": backend}
        return multiscale_roi_pool(maps, boxes, output_size, scales, **options).to(dtype)

    def pool(map_: Tensor, rois: Tensor, scale: float) -> Tensor:
        return roi_pool(map_, rois, output_size, scale, backend=backend)

    return level_by_level(pool, maps, boxes, scales, mapper).to(dtype)


def of_one_dtype(maps: list[Tensor]) -> tuple[list[Tensor], torch.dtype]:
    """The maps in the widest of their dtypes, and the first one's, which the output has. Autocast may mix them."""
    dtypes = [map_.dtype for map_ in maps]
    widest = reduce(torch.promote_types, dtypes)
    return [map_.to(widest) for map_ in maps], dtypes[0]


def is_of_scales(mapper: object, scales: Iterable[float]) -> bool:
    """Whether a mapper computes equation 1 for these scales; the operators then compute it themselves."""
    known: Any = mapper
    kind = type(mapper)
    return (
        (kind is LevelMapper or f"{kind.__module__}.{kind.__qualname__}" == "torchvision.ops.poolers.LevelMapper")
        and (known.k_min, known.k_max) == level_range(list(scales))
        and known.eps == LEVEL_EPSILON
    )


def canonical_of(mapper: Any) -> dict[str, float]:
    """The options of equation 1. With one map they mean nothing, whatever the mapper is."""
    return {"canonical_scale": getattr(mapper, "s0", 224), "canonical_level": getattr(mapper, "lvl0", 4)}


def level_by_level(
    pool: Callable[[Tensor, Tensor, float], Tensor],
    maps: list[Tensor],
    boxes: Boxes,
    scales: list[float],
    mapper: Mapper,
) -> Tensor:
    """Pool the boxes of each map, and 0 for those on none."""
    rois, level = as_rois(boxes, maps[0]), mapper(boxes)
    places = [torch.where(level == index)[0] for index in range(len(maps))]
    pooled = torch.cat([pool(map_, rois[rows], scale) for map_, rows, scale in zip(maps, places, scales, strict=True)])
    output = pooled.new_zeros(len(rois), *pooled.shape[1:]).index_copy(0, torch.cat(places), pooled)
    return output.contiguous(memory_format=memory_format(maps[0]))

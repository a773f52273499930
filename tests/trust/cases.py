"""Random problems for the RoI operators, and what is to come out: by the slow references, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import roi
from roi import torch_path
from roi._problem import Pooling
from tests.reference import weighted_pool
from tests.reference.levels import is_valid
from tests.reference.maps import features
from tests.reference.max_pool import MaxPool
from tests.reference.weighted_pool import WeightedPool

OPERATORS = ("roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align", "multiscale_roi_pool", "multiscale_roi_align")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CANONICAL = (32, 3)  # so that boxes on maps of a few cells belong to different levels
MOST_POSITION_SENSITIVE = 128  # bins: there is a channel for each

NAN, INF = float("nan"), float("inf")
WILD = (-0.0, 1e30, -1e30, 3e38, -3e38, 1e-45, -1e-40, 0.49999997, -0.5, 2.0**28 * 3, 2.0**31, 65504.0)
NO_NUMBERS = (NAN, INF, -INF)


@dataclass(frozen=True)
class Case:
    """A call, in a form that a failure prints. Boxes are as given: maybe not finite, or of no image."""

    operator: str
    shape: tuple[int, int, int, int]  # N, C of the output, H, W of the finest level
    levels: int
    dtype: torch.dtype
    view: str
    boxes: list[list[float]]
    boxes_dtype: torch.dtype
    boxes_view: str
    size: tuple[int, int]
    scale: float
    ratio: int
    aligned: bool
    seed: int

    @property
    def position_sensitive(self) -> bool:
        return self.operator.startswith("ps_")

    @property
    def takes_maximum(self) -> bool:
        return self.operator in ("roi_pool", "multiscale_roi_pool")

    @property
    def pyramid(self) -> bool:
        return self.operator.startswith("multiscale")

    @property
    def scales(self) -> list[float]:
        return [self.scale / 2**level for level in range(self.levels)]

    @functools.cached_property
    def maps(self) -> list[Tensor]:
        images, channels, height, width = self.shape
        channels *= self.size[0] * self.size[1] if self.position_sensitive else 1
        maps = []
        for level in range(self.levels):
            shape = images, channels, -(-height // 2**level), -(-width // 2**level)
            # Not finite, the mean of a bin says nothing of its other cells.
            values = features(shape, self.dtype, special=self.takes_maximum, seed=self.seed + level)
            maps.append(VIEWS[self.view](values))
        return maps

    @functools.cached_property
    def rois(self) -> Tensor:
        rois = torch.tensor(self.boxes, dtype=torch.float64).reshape(-1, 5).to(self.boxes_dtype)
        return BOXES_VIEWS[self.boxes_view](rois)

    @functools.cached_property
    def wide_rois(self) -> Tensor:
        """As the paths take them."""
        return self.rois if self.boxes_dtype == torch.float64 else self.rois.float()

    @property
    def valid(self) -> bool:
        return all(is_valid(box, self.shape[0]) for box in self.wide_rois.numpy())

    @property
    def options(self) -> tuple[Any, ...]:
        """What the operator takes beside what all of them take."""
        both = self.ratio, self.aligned
        return {"roi_align": both, "multiscale_roi_align": both, "ps_roi_align": both[:1]}.get(self.operator, ())

    def public(self, maps: list[Tensor]) -> Tensor:
        """The call that users make."""
        function = getattr(roi, self.operator)
        if self.pyramid:
            levels = {"canonical_scale": CANONICAL[0], "canonical_level": CANONICAL[1]}
            output: Tensor = function(maps, self.rois, self.size, self.scales, *self.options, **levels)
        else:
            output = function(maps[0], self.rois, self.size, self.scale, *self.options)
        return output

    def direct(self) -> Tensor:
        """What the torch path makes of it, whatever is in the boxes."""
        functions = {"ps_roi_pool": torch_path.average_pool, "roi_pool": torch_path.max_pool}
        function = functions.get(self.operator.removeprefix("multiscale_"), torch_path.align)
        sensitive = self.operator.startswith("ps_")
        aligned = self.aligned or self.operator == "ps_roi_align"
        pooling = Pooling(tuple(self.scales), *self.size, self.ratio, aligned, *CANONICAL, sensitive)
        output: Tensor = function(self.maps, self.wide_rois, pooling)
        return output

    @property
    def reference(self) -> MaxPool | WeightedPool:
        if self.takes_maximum:
            return MaxPool(self.size)
        if self.operator == "ps_roi_pool":
            return weighted_pool.ps_roi_pool(self.size)
        if self.operator == "ps_roi_align":
            return weighted_pool.ps_roi_align(self.size, self.ratio)
        return weighted_pool.roi_align(self.size, self.ratio, self.aligned)

    def expected(self) -> Tensor:
        arrays = [x.double().numpy() for x in self.maps]
        return torch.from_numpy(self.reference.forward(arrays, self.wide_rois.numpy(), self.scales, CANONICAL))

    def expected_gradients(self, grad: Tensor) -> list[Tensor]:
        """Of the maps, for that of the output."""
        arrays = [x.double().numpy() for x in self.maps]
        options = self.wide_rois.numpy(), self.scales, CANONICAL
        gradients = self.reference.backward(grad.double().numpy(), arrays, *options)
        return [torch.from_numpy(gradient) for gradient in gradients]


# --- Views: tensors of the values, or of some of them repeated, as no constructor lays them out. What lies around them
# is NaN, which shows where it is read.


def inside(values: Tensor, shape: tuple[int, ...], where: tuple[slice, ...]) -> Tensor:
    around = values.new_full(shape, torch.nan)
    around[where] = values
    return around[where]


def sliced(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return inside(x, (n + 1, 2 * c, h + 2, 3 * w), np.s_[1:, ::2, 1:-1, ::3])


def from_the_end(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return inside(x, (n, c, h + 3, w + 1), np.s_[:, :, -h:, -w:])


def at_an_odd_address(x: Tensor) -> Tensor:
    return inside(x.flatten(), (x.numel() + 1,), np.s_[1:]).view(x.shape)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": sliced,
    "from the end": from_the_end,
    "at an odd address": at_an_odd_address,
    "channels_last at an odd address": lambda x: at_an_odd_address(x.permute(0, 2, 3, 1).contiguous()).permute(
        0, 3, 1, 2
    ),
    "one image for all": lambda x: x[:1].expand(x.shape) if len(x) else x,
    "one channel for all": lambda x: x[:, :1].expand(x.shape) if x.shape[1] else x,
    "one row for all": lambda x: x[:, :, :1].expand(x.shape),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand(x.shape) if x.numel() else x,
}

BOXES_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: inside(x, (2 * len(x), 8), np.s_[::2, 2:7]),
    "one for all": lambda x: x[:1].expand(x.shape) if len(x) else x,
}

# --- Strategies


def coordinates(cells: int, scale: float, wild: bool) -> st.SearchStrategy[float]:
    """Around a map of so many cells: anywhere, on halves of cells, or far from anything sensible."""
    near = st.floats(-0.5, 1.5).map(lambda place: place * cells / scale)
    halves = st.integers(-3, 2 * cells + 3).map(lambda half: half / 2 / scale)
    return st.one_of(near, halves, *([st.sampled_from(WILD)] if wild else []))


@st.composite
def boxes(draw: st.DrawFn, images: int, height: int, width: int, scale: float) -> list[list[float]]:
    """Rows (batch index, x1, y1, x2, y2), reversed ones among them; in one case of four also such as are refused."""
    wild, refused = draw(st.booleans()), draw(st.integers(0, 3)) == 0
    indices: st.SearchStrategy[float] = st.integers(0, max(images - 1, 0)).map(float)
    x, y = coordinates(width, scale, wild), coordinates(height, scale, wild)
    if refused:
        indices = st.one_of(indices, st.sampled_from((-1.0, float(images), -0.5, 1e30, *NO_NUMBERS)))
        x, y = st.one_of(x, st.sampled_from(NO_NUMBERS)), st.one_of(y, st.sampled_from(NO_NUMBERS))
    count = draw(st.integers(0, 6)) if images or refused else 0
    return [list(row) for row in draw(st.lists(st.tuples(indices, x, y, x, y), min_size=count, max_size=count))]


@st.composite
def cases(draw: st.DrawFn, operator: str) -> Case:
    side = st.one_of(st.integers(1, 9), st.integers(1, 24), st.sampled_from((57, 64, 121)))
    bins = st.one_of(st.integers(1, 7), st.integers(1, 64))
    shape = draw(st.integers(0, 3)), draw(st.integers(0, 9)), draw(side), draw(side)
    size = draw(bins), draw(bins)
    if operator.startswith("ps_"):
        size = size[0], min(size[1], max(1, MOST_POSITION_SENSITIVE // size[0]))
        shape = shape[0], min(shape[1], 2), min(shape[2], 24), min(shape[3], 24)
    pyramid = operator.startswith("multiscale")
    scale = draw(st.one_of(st.sampled_from((1.0, 1 / 4, 1 / 16)), st.floats(-6, 3).map(lambda power: 10.0**power)))
    if pyramid:
        scale = draw(st.sampled_from((1.0, 1 / 4, 1 / 8, 4.0)))
    return Case(
        operator=operator,
        shape=shape,
        levels=draw(st.integers(1, 4)) if pyramid else 1,
        dtype=draw(st.sampled_from(DTYPES)),
        view=draw(st.sampled_from(sorted(VIEWS))),
        boxes=draw(boxes(shape[0], shape[2], shape[3], scale)),
        boxes_dtype=draw(st.sampled_from((torch.float32, torch.float32, *DTYPES))),
        boxes_view=draw(st.sampled_from(sorted(BOXES_VIEWS))),
        size=size,
        scale=scale,
        ratio=draw(st.sampled_from((-1, 0, 1, 2, 3, 5))),
        aligned=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )

"""The CUDA kernels of RoIAlign and of the position-sensitive operators, run on the CPU (see cuda_on_cpu)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from roi import cupy_path
from roi.cupy_path import align, launch
from tests.cuda_on_cpu import COMPILER, Library, build, ps_roi_pool_variants, reference, roi_align_variants
from tests.cuda_on_cpu.boxes import hostile_boxes, ordinary_boxes
from tests.cuda_on_cpu.reference import WeightedPool

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Of features and boxes: what the library is built for.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]
dtypes = pytest.mark.parametrize(("dtype", "coordinates"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
ways = pytest.mark.parametrize("way", ["atomic", "gather"], indirect=True)


@dataclass(frozen=True)
class Operator:
    """A function of the CUDA path and its reference."""

    name: str
    options: tuple[Any, ...]
    reference: Callable[..., WeightedPool]

    def forward(self, input: Tensor, rois: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
        output: Tensor = getattr(cupy_path, self.name)(input, rois, scale, *size, *self.options)
        return output

    def backward(self, grad: Tensor, rois: Tensor, scale: float, shape: tuple[int, ...], channels_last: bool) -> Tensor:
        options = (*self.options, *shape, channels_last)
        gradient: Tensor = getattr(cupy_path, f"{self.name}_backward")(grad, rois, scale, *options)
        return gradient

    def input_channels(self, channels: int, size: tuple[int, int]) -> int:
        return channels * size[0] * size[1] if self.name.startswith("ps_") else channels

    def expected(self, size: tuple[int, int]) -> WeightedPool:
        return self.reference(size, *self.options)


ADAPTIVE = Operator("roi_align", (-1, False), reference.roi_align)
ALIGNED = Operator("roi_align", (-1, True), reference.roi_align)
SAMPLING_2 = Operator("roi_align", (2, True), reference.roi_align)
SAMPLING_11 = Operator("roi_align", (11, False), reference.roi_align)
PS_ADAPTIVE = Operator("ps_roi_align", (0,), reference.ps_roi_align)
PS_SAMPLING_3 = Operator("ps_roi_align", (3,), reference.ps_roi_align)
PS_POOL = Operator("ps_roi_pool", (), reference.ps_roi_pool)

# Operator; N, channels of the output, H, W; output size; scale. 8 and 16 channels take the vector accesses.
CASES = [
    (ADAPTIVE, (2, 8, 9, 13), (7, 7), 0.25),
    (ADAPTIVE, (1, 3, 40, 2), (2, 3), 1.0),
    (ALIGNED, (2, 5, 12, 7), (3, 2), 1 / 16),
    (ALIGNED, (2, 1, 1, 30), (1, 1), 0.125),
    (SAMPLING_2, (1, 16, 6, 6), (2, 5), 1.0),
    (SAMPLING_2, (3, 3, 5, 17), (1, 1), 0.5),
    (SAMPLING_11, (2, 4, 8, 8), (14, 3), 1.0),
    (PS_ADAPTIVE, (2, 3, 9, 13), (3, 2), 0.25),
    (PS_SAMPLING_3, (1, 2, 6, 6), (2, 5), 1.0),
    (PS_POOL, (2, 2, 9, 13), (3, 4), 0.25),
    (PS_POOL, (1, 5, 12, 7), (1, 2), 1 / 16),
    (PS_POOL, (2, 1, 4, 1), (7, 3), 1.0),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}{case[0].options}-{case[2]}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    types = [(launch.FEATURES[dtype], launch.COORDINATES[coordinates]) for dtype, coordinates in DTYPES]
    built = []
    for source, variants in (("roi_align", roi_align_variants), ("ps_roi_pool", ps_roi_pool_variants)):
        names = [name for feature, coordinate in types for name in variants((feature,), (coordinate,))]
        built.append(build(folder, source, names))
    return Library(*built)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    """Launches go to the library. Few threads: every loop over a grid or a block then takes several turns."""
    monkeypatch.setattr(launch, "run", library.run)
    monkeypatch.setattr(launch, "THREADS", 32)
    monkeypatch.setattr(launch, "MAX_GRID_Y", 2)
    monkeypatch.setattr(launch, "SLOTS_BYTES", 2048)
    monkeypatch.setattr(align, "has_vector_atomics", lambda device: True)
    library.launched.clear()
    return library


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> str:
    """Of the backward pass."""
    if request.param == "gather":
        request.getfixturevalue("deterministic")
    return str(request.param)


def boxes_for(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    height, width = shape[2] / scale, shape[3] / scale
    return torch.cat([hostile_boxes(shape[0], height, width), ordinary_boxes(20, shape[0], height, width)]).to(dtype)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Float64, and exact in every dtype: quarters from -1 to 1."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double() / 4


@functools.cache
def problem(index: int, coordinates: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a case: input, boxes, output, a gradient of it, that of the input; in float64 but for the boxes."""
    operator, (images, channels, height, width), size, scale = CASES[index]
    shape = (images, operator.input_channels(channels, size), height, width)
    input, rois = numbers(shape), boxes_for(shape, scale, coordinates)
    expected = operator.expected(size)
    output = torch.from_numpy(expected.forward([input.numpy()], rois.numpy(), [scale], launch.ONE_LEVEL))
    grad = numbers(tuple(output.shape), seed=1)
    arguments = (grad.numpy(), rois.numpy(), [scale], launch.ONE_LEVEL, [shape])
    return input, rois, output, grad, torch.from_numpy(expected.backward(*arguments)[0])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Sums are float64, or float32, of up to some hundred terms that are at most 1, rounded to the dtype once."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)
    else:
        rounding = torch.finfo(actual.dtype).eps / 2
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5 + rounding, atol=1e-5, equal_nan=True)


@cases
@layouts
@dtypes
@pytest.mark.usefixtures("deterministic")  # torch.empty is then filled: an element that is not written shows
def test_forward(dtype, coordinates, layout, case):
    operator, _, size, scale = case
    input, rois, expected, *_ = problem(CASES.index(case), coordinates)
    input = input.to(dtype).contiguous(memory_format=layout)
    output = operator.forward(input, rois, scale, size)
    assert output.dtype == dtype
    assert_close(output, expected)
    if not input.is_contiguous():
        assert output.is_contiguous(memory_format=torch.channels_last)


@cases
@layouts
@dtypes
@ways
def test_backward(way, dtype, coordinates, layout, case, on_cpu):
    operator, _, _, scale = case
    input, rois, _, grad, expected = problem(CASES.index(case), coordinates)
    channels_last = layout is torch.channels_last
    actual = operator.backward(grad.to(dtype), rois, scale, tuple(input.shape), channels_last)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=layout)
    assert_close(actual, expected)
    assert [f"backward_{way}<" in name for name in on_cpu.launched] == [True]

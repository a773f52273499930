"""Numbers: the same bits every time, gradients in float64, maps beyond 2^31 cells, values at the ends of a dtype."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import roi
from roi.cupy_path import access, launch
from roi.cupy_path import roi_align_launches as align
from tests.conftest import ALL_TRUST_CASES
from tests.cuda_on_cpu import COMPILER, Library, build
from tests.flat_calls import CUPY as cupy_path
from tests.reference.boxes import ordinary_boxes
from tests.reference.comparison import same_bits
from tests.trust.calls import BOXES, OPERATORS, forward_and_backward, small_fpn
from tests.trust.conftest import Amounts

pytestmark = pytest.mark.trust


# --- Determinism


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_call_gives_the_same_bits(operator: str, amounts: Amounts, tally: Counter[str]) -> None:
    first = forward_and_backward(operator)
    for _ in range(max(amounts.calls // 100, 2)):
        assert all(map(same_bits, forward_and_backward(operator), first))
        tally["repeated calls"] += 1


def test_a_seed_gives_the_same_model_and_the_same_training_step() -> None:
    def step() -> list[Tensor]:
        model = small_fpn()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        images = torch.randn(2, 3, 64, 64)
        pooled = roi.multiscale_roi_align(model(images), BOXES, 3, [1 / 4, 1 / 8, 1 / 16, 1 / 32])
        pooled.square().sum().backward()
        optimizer.step()
        return [pooled.detach(), *model.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Of the CUDA kernels on the CPU those for float32 that are run here."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    pool = [f"roi::roi_pool<float, float, {index}, true, roi::Contiguous<4>>" for index in ("int", "long long")]
    pool += [f"roi::roi_pool_backward_gather<float, float, int, {last}>" for last in ("false", "true")]
    pool += ["roi::roi_pool_backward_atomic<float, float, long long, roi::Contiguous<1>>"]
    samples = ["roi::roi_align<float, float, roi::Contiguous<4>, false>"]
    samples += [f"roi::roi_align_backward_gather<float, float, {last}, false>" for last in ("false", "true")]
    samples += ["roi::roi_align_backward_atomic<float, float, roi::Contiguous<4>, false>"]
    copies = [f"roi::transpose<{name}, {name}>" for name in ("float", "int")]
    return Library(
        *(build(folder, *kernels) for kernels in (("roi_pool", pool), ("roi_align", samples), ("transpose", copies)))
    )


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(launch, "run", library.run)
    monkeypatch.setattr(launch, "THREADS", 32)
    monkeypatch.setattr(align, "has_vector_atomics", lambda device: True)


@needs_compiler
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("copied", [False, True], ids=["contiguous", "copied"])
def test_the_cuda_kernels_give_the_same_bits_every_time(
    copied: bool, tally: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `torch.use_deterministic_algorithms`, however the threads of a block take turns."""
    monkeypatch.setattr(access, "copy_pays", lambda work, maps, accesses: copied)
    input, rois = torch.randn(2, 3, 8, 9), ordinary_boxes(30, 2, 8, 9).float()

    def outcome() -> list[Tensor]:
        pooled, argmax = cupy_path.roi_pool(input, rois, 1.0, 3, 3, True)
        sampled = cupy_path.roi_align(input, rois, 1.0, 3, 3, 2, False)
        shape = *input.shape, False
        gradient = cupy_path.roi_pool_backward(pooled, rois, argmax, 1.0, *shape)
        return [pooled, sampled, gradient, cupy_path.roi_align_backward(sampled, rois, 1.0, 2, False, *shape)]

    torch.use_deterministic_algorithms(True)
    try:
        first = outcome()
        for _ in range(5):
            assert all(map(same_bits, outcome(), first))
            tally["repeated calls of kernels"] += len(first)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Gradients

SIZES, LAYOUTS = (1, (2, 3)), (torch.contiguous_format, torch.channels_last)
RATIOS, ALIGNED = (-1, 1, 2, 3), (False, True)
SCALES, CANONICAL = [1.0, 0.5], {"canonical_scale": 8, "canonical_level": 1}


def gradient_cases() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every operator with every option."""
    for size in SIZES:
        for name in ("roi_pool", "ps_roi_pool", "multiscale_roi_pool"):
            yield name, size, {}
        for ratio in RATIOS:
            yield "ps_roi_align", size, {"sampling_ratio": ratio}
        for ratio, aligned in itertools.product(RATIOS, ALIGNED):
            yield "roi_align", size, {"sampling_ratio": ratio, "aligned": aligned}
            yield "multiscale_roi_align", size, {"sampling_ratio": ratio, "aligned": aligned}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "size", "options"), list(gradient_cases()), ids=str)
def test_gradients_of_first_and_second_order(
    name: str, size: Any, options: dict[str, Any], layout: torch.memory_format, amounts: Amounts, tally: Counter[str]
) -> None:
    """In float64 against differences; in the slice along random directions, in full element by element."""
    channels = 6 if name.startswith("ps_") and size != 1 else 2
    sides = ((8, 9), (4, 5)) if name.startswith("multiscale") else ((6, 7),)
    generator = torch.Generator().manual_seed(0)
    # Distinct values a unit apart: a step of the numerical gradient moves no maximum.
    shapes = [(2, channels, *side) for side in sides]
    maps = [
        torch.randperm(2 * channels * h * w, generator=generator).double().view(n, c, h, w) for n, c, h, w in shapes
    ]
    leaves = [x.contiguous(memory_format=layout).requires_grad_() for x in maps]
    rois = ordinary_boxes(5, 2, *sides[0])

    def call(*maps: Tensor) -> Tensor:
        function: Callable[..., Tensor] = getattr(roi, name)
        if name.startswith("multiscale"):
            return function(list(maps), rois, size, SCALES, **CANONICAL, **options)
        return function(*maps, rois, size, **options)

    fast = amounts.cases < ALL_TRUST_CASES
    assert torch.autograd.gradcheck(call, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda *maps: call(*maps).square(), leaves, fast_mode=fast)
    tally["gradient checks"] += 2


# --- Beyond 2^31 elements. The maps are zeros that nobody has touched: addresses without memory.

SIDE = 46_344  # whose square is above 2^31
LAST = SIDE - 2


def untouched(*shape: int) -> Tensor:
    return torch.from_numpy(np.zeros(shape, np.float32))


def large_map() -> Tensor:
    """1, 2, 3, 4 in the last corner; all else is 0."""
    try:
        input = untouched(1, 1, SIDE, SIDE)
    except MemoryError:
        pytest.skip("the system gives no 8 GB of addresses")
    input[0, 0, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    return input


CORNER = torch.tensor([[0.0, LAST, LAST, LAST + 1, LAST + 1]])
CELLS = [y * SIDE + x for y in (LAST, LAST + 1) for x in (LAST, LAST + 1)]


def test_a_map_of_more_than_31_bits_of_cells(tally: Counter[str]) -> None:
    """And no more memory than its corner: a copy of the map, or the numbers of its cells, would be 8 or 17 GB."""
    input = large_map()
    output, argmax = torch.ops.fpn_roi.roi_pool_with_argmax(input, CORNER, 1.0, 2, 2, "torch")
    assert output.flatten().tolist() == [1, 2, 3, 4]
    assert argmax.flatten().tolist() == CELLS
    mean = [[[[2.5]]]]
    assert roi.roi_align(input, CORNER, 1, 1.0, 2).tolist() == mean
    assert roi.ps_roi_align(input, CORNER + torch.tensor([0, 0.5, 0.5, 0.5, 0.5]), 1, 1.0, 2).tolist() == mean
    assert roi.ps_roi_pool(input, CORNER, 1).tolist() == [[[[1.0]]]]  # without the last row and column
    assert roi.multiscale_roi_pool([input], CORNER, 2, [1.0]).flatten().tolist() == [1, 2, 3, 4]
    assert roi.multiscale_roi_align([input], CORNER, 1, [1.0], 2).tolist() == mean
    tally["calls beyond 2^31 elements"] += 6


@needs_compiler
@pytest.mark.usefixtures("kernels")
def test_kernels_on_a_map_of_more_than_31_bits_of_cells(monkeypatch: pytest.MonkeyPatch, tally: Counter[str]) -> None:
    input = large_map()
    output, argmax = cupy_path.roi_pool(input, CORNER, 1.0, 2, 2, True)
    assert output.flatten().tolist() == [1, 2, 3, 4]
    assert argmax.flatten().tolist() == CELLS
    sampled = cupy_path.roi_align(input, CORNER, 1.0, 1, 1, 2, False)
    assert sampled.tolist() == [[[[2.5]]]]
    del input

    monkeypatch.setattr(launch, "zeros", lambda *_: [untouched(1, 1, SIDE, SIDE)])
    shape = (1, 1, SIDE, SIDE, False)
    gradient = cupy_path.roi_pool_backward(output, CORNER, argmax, 1.0, *shape)
    assert gradient[0, 0, -3:, -3:].tolist() == [[0, 0, 0], [0, 1, 2], [0, 3, 4]]
    gradient = cupy_path.roi_align_backward(torch.ones_like(sampled), CORNER, 1.0, 2, False, *shape)
    assert gradient[0, 0, -3:, -3:].tolist() == [[0, 0, 0], [0, 0.25, 0.25], [0, 0.25, 0.25]]
    tally["calls beyond 2^31 elements"] += 4


# --- The ends of a dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_largest_and_the_smallest_numbers_come_through(
    operator: str, dtype: torch.dtype, tally: Counter[str]
) -> None:
    """Means of a constant are that constant: their sums neither overflow in half precision nor vanish."""
    limits = torch.finfo(dtype)
    # In the others sums are of numbers no larger than the dtype's own, and a mean is rounded up or down.
    largest = limits.max if dtype == torch.float16 else limits.max / 2
    rounding = 400 * limits.eps  # of up to 18 × 18 cells, one for each
    for value in (largest, -largest, limits.smallest_normal, limits.smallest_normal / 4):
        maps = [torch.full((2, 16, 64 // n, 64 // n), value, dtype=dtype) for n in (1, 2, 4)]
        output = OPERATORS[operator](maps)
        inside = output[output != 0]
        assert inside.numel() > 0
        assert inside.isfinite().all()
        if operator in ("roi_pool", "multiscale_roi_pool"):
            assert (inside == value).all()
        else:  # samples off the map are 0: no mean is beyond the constant
            assert inside.abs().max() <= (abs(value) + limits.smallest_normal * rounding) * (1 + rounding)
        tally["calls at the ends of a dtype"] += 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", ["roi_pool", "roi_align", "ps_roi_align", "multiscale_roi_align"])
def test_gradients_in_half_precision_are_summed_in_float32(operator: str, dtype: torch.dtype) -> None:
    """2000 boxes one on top of the other: the first one's gradient is so large that no other would count beside it."""
    input = torch.ones(1, 4, 4, 4, dtype=dtype, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 1, 2, 2]]).expand(2000, 5)
    function = getattr(roi, operator)
    if operator == "multiscale_roi_align":
        output = function([input], rois, 1, [1.0], 1)
    else:
        output = function(input, rois, *((2, 1.0, 1) if operator == "ps_roi_align" else (1, 1.0)))
    weight = torch.tensor([2048.0, *[1.0] * 1999]).view(-1, 1, 1, 1).expand(output.shape).to(dtype)
    (gradient,) = torch.autograd.grad(output, input, weight)
    bins = output[0].numel()
    assert gradient.double().sum().item() == pytest.approx(bins * (2048 + 1999), rel=4 * torch.finfo(dtype).eps)

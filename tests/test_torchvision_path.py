"""The path of torchvision's operators against the torch path, which other tests hold to slow references.

The CPU runs the same operators of torchvision's as a GPU without CuPy would.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import roi
from roi import torch_path, torchvision_path
from roi._problem import Maps, Pooling
from roi.torch_path.bins import roi_windows
from roi.torchvision_path.problem import OperatorLimitError
from tests.reference.boxes import ordinary_boxes
from tests.reference.comparison import same_bits
from tests.reference.maps import features, numbers
from tests.reference.torchvision_bins import sizes_exact

pytestmark = pytest.mark.torchvision

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCALES = {
    "one map": (1 / 4,),
    "pyramid": (1 / 4, 1 / 8, 1 / 16),
    "gap": (1 / 4, 1 / 16),
    "equal": (1 / 4, 1 / 8, 1 / 8),
}
LINEAR = {
    "align": ("align", {}),
    "align aligned 2": ("align", {"sampling_ratio": 2, "aligned": True}),
    "ps_align": ("align", {"sampling_ratio": 2, "aligned": True, "position_sensitive": True}),
    "ps_pool": ("average_pool", {"position_sensitive": True}),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", list(LAYOUTS))
pyramids = pytest.mark.parametrize("levels", list(SCALES))


def pyramid(scales: tuple[float, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    shapes = [(2, 24, round(160 * scale), round(232 * scale)) for scale in scales]
    maps = [features(shape, dtype, special=False, seed=level) for level, shape in enumerate(shapes)]
    return [x.contiguous(memory_format=LAYOUTS[layout]) for x in maps]


def hostile_rois(dtype: torch.dtype) -> Tensor:
    """Ordinary boxes, and among them some that are not finite or off the batch."""
    rois = ordinary_boxes(60, 2, 160, 232).to(torch.promote_types(dtype, torch.float32))
    rois[3, 2] = float("nan")
    rois[11, 4] = float("inf")
    rois[20, 0], rois[21, 0] = 2, -1
    return rois


def exact_bins(rois: Tensor, pooling: Pooling) -> Tensor:
    """Whose bins torchvision computes without a rounding error, on whatever level they are. Tensor[K] of bool."""
    valid = torch.isfinite(rois).all(1)
    exact = valid.clone()
    boxes = torch.where(valid[:, None], rois, 0).numpy()
    for scale in pooling.scales:
        height, width = roi_windows(boxes, scale)[:, 3:].T
        for size, bins in ((height, pooling.pooled_height), (width, pooling.pooled_width)):
            exact &= torch.from_numpy(sizes_exact(size, bins, boxes.dtype.type))
    return exact | ~valid


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Sums of some hundred terms of at most 1, in the same memory format."""
    assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
    tolerance = 1e-12 if actual.dtype == torch.float64 else 1e-5 + 2 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "levels"),
    [(name, levels) for name in LINEAR for levels in SCALES if levels == "one map" or not name.startswith("ps_")],
)
@dtypes
@layouts
def test_weighted_sums_and_their_gradient(name: str, dtype: torch.dtype, layout: str, levels: str) -> None:
    function, options = LINEAR[name]
    pooling, maps, rois = (
        Pooling(SCALES[levels], 2, 3, **options),
        pyramid(SCALES[levels], dtype, layout),
        hostile_rois(dtype),
    )
    output, expected = (getattr(path, function)(maps, rois, pooling) for path in (torchvision_path, torch_path))
    kept = exact_bins(rois, pooling) if function == "average_pool" else torch.ones(len(rois), dtype=torch.bool)
    assert int(kept.sum()) > 40
    assert bool(expected[[3, 11, 20, 21]].isnan().all())
    assert_close(output[kept], expected[kept])
    assert output.stride() == expected.stride()

    grad = numbers(expected.shape).to(dtype)
    adjoint = f"{function}_adjoint"
    found, wanted = (
        getattr(path, adjoint)(grad, rois, pooling, Maps.of(maps)) for path in (torchvision_path, torch_path)
    )
    for one, other in zip(found, wanted, strict=True):
        assert_close(one / 8, other / 8)  # up to a few hundred terms in a cell


@dtypes
@layouts
@pyramids
def test_max_pooling_and_its_gradient(dtype: torch.dtype, layout: str, levels: str) -> None:
    pooling, maps, rois = Pooling(SCALES[levels], 3, 2), pyramid(SCALES[levels], dtype, layout), hostile_rois(dtype)
    output, argmax = torchvision_path.max_pool_with_argmax(maps, rois, pooling)
    expected, cells = torch_path.max_pool_with_argmax(maps, rois, pooling)
    kept = exact_bins(rois, pooling)
    assert int(kept.sum()) > 40
    assert same_bits(output[kept], expected[kept])
    assert torch.equal(argmax[kept], cells[kept])
    assert argmax.dtype == cells.dtype
    assert output.stride() == expected.stride()
    assert same_bits(torchvision_path.max_pool(maps, rois, pooling), output)

    grad = numbers(expected.shape).to(dtype)
    found, wanted = (
        path.max_gather_adjoint(grad, rois, argmax, pooling, Maps.of(maps)) for path in (torchvision_path, torch_path)
    )
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)
    assert same_bits(torchvision_path.max_gather(maps, rois, argmax, pooling)[kept], expected[kept].nan_to_num(0))


def test_boxes_on_no_level_are_zero() -> None:
    """Scales that do not double can leave a level without a map."""
    pooling, maps = Pooling((1 / 4, 1 / 32), 2, 2), [torch.ones(1, 3, 40, 40), torch.ones(1, 3, 5, 5)]
    rois = torch.tensor([[0.0, 0, 0, 600, 600], [0, 0, 0, 40, 40]])
    for path in (torchvision_path, torch_path):
        assert path.align(maps, rois, pooling).flatten(1).amax(1).tolist() == [0, 1]
        assert path.max_pool_with_argmax(maps, rois, pooling)[1].flatten(1).amax(1)[0] == -1


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8)])
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_pool(shape: tuple[int, ...], count: int) -> None:
    pooling, rois, maps = Pooling((1.0,), 2, 2), torch.zeros(count, 5), [torch.zeros(shape)]
    for function in ("align", "max_pool"):
        found, wanted = (getattr(path, function)(maps, rois, pooling) for path in (torchvision_path, torch_path))
        assert same_bits(found, wanted)
    found, wanted = (
        path.align_adjoint(wanted, rois, pooling, Maps.of(maps)) for path in (torchvision_path, torch_path)
    )
    assert same_bits(found[0], wanted[0])


def test_what_is_left_to_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    input, rois = torch.randn(1, 4, 9, 9, requires_grad=True), torch.tensor([[0.0, 0, 0, 8, 8]])
    with pytest.raises(
        RuntimeError, match=r"torchvision's operators take boxes of the features' dtype; got torch.float64"
    ):
        roi.roi_align(input, rois.double(), 2, backend="torchvision")
    monkeypatch.setattr(torchvision_path.problem, "MAX_ELEMENTS", 300)
    with pytest.raises(OperatorLimitError, match="fewer than"):
        torchvision_path.align([input], rois, Pooling((1.0,), 2, 2))


def test_deterministic_gradients_are_left_to_the_torch_path() -> None:
    input, rois = torch.randn(1, 4, 9, 9, requires_grad=True), torch.tensor([[0.0, 0, 0, 8, 8]])
    output = roi.roi_align(input, rois, 2, backend="torchvision")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="not deterministic"):
            output.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("function", ["multiscale_roi_align", "multiscale_roi_pool"])
def test_derivatives_of_both_orders(function: str) -> None:
    maps = [x.double().requires_grad_() for x in pyramid(SCALES["pyramid"], torch.float64, "contiguous")]
    rois = ordinary_boxes(12, 2, 160, 232).double()
    results = []
    for backend in ("torchvision", "torch"):
        output = getattr(roi, function)(maps, rois, (2, 2), SCALES["pyramid"], backend=backend)
        first = torch.autograd.grad(output.square().sum(), maps, create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), maps))
    for one, other in zip(*results, strict=True):
        assert_close(one / 64, other / 64)


def test_under_autocast() -> None:
    """Boxes keep float32, and half precision is summed in float32."""
    maps, rois = pyramid(SCALES["one map"], torch.bfloat16, "contiguous"), ordinary_boxes(12, 2, 160, 232).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = roi.roi_align(maps[0], rois, 2, 1 / 4, backend="torchvision")
    assert_close(output, roi.roi_align(maps[0], rois, 2, 1 / 4, backend="torch"))

"""Pyramids of any list of scales: with gaps, equal ones, such as do not double; the torch path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from roi import multiscale_roi_align, torch_path
from roi._problem import Maps, Pooling
from tests.reference import weighted_pool
from tests.reference.comparison import assert_sums_close, same_bits
from tests.reference.levels import Array
from tests.reference.maps import features, numbers
from tests.reference.max_pool import MaxPool
from tests.reference.pyramids import IMAGE, IMAGES, PYRAMIDS, Pyramid, boxes_of_all_kinds, boxes_of_all_sizes

LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
pyramids = pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
BINS = (3, 2)


def torchvisions_mapper(pyramid: Pyramid) -> Any:
    """As torchvision's pooler makes it for these scales."""
    from torchvision.ops.poolers import initLevelMapper

    first, last = (-torch.tensor(scale).log2().item() for scale in (pyramid.scales[0], pyramid.scales[-1]))
    return initLevelMapper(int(first), int(last), *pyramid.canonical)


def per_image(rois: Tensor) -> list[Tensor]:
    return [rois[rois[:, 0] == image, 1:] for image in range(IMAGES)]


@pyramids
@dtypes
def test_there_are_boxes_of_every_level(dtype: torch.dtype, pyramid: Pyramid) -> None:
    assert set(pyramid.levels(boxes_of_all_sizes().to(dtype))) == pyramid.used


@pytest.mark.torchvision
@pyramids
@dtypes
def test_the_references_levels_are_torchvisions(dtype: torch.dtype, pyramid: Pyramid) -> None:
    rois = boxes_of_all_sizes().to(dtype)
    theirs = torchvisions_mapper(pyramid)(per_image(rois)).tolist()
    assert pyramid.levels(rois) == [level if 0 <= level < len(pyramid.scales) else None for level in theirs]


@pytest.mark.torchvision
@pyramids
@layouts
@dtypes
@pytest.mark.parametrize("ratio", [2, -1])
def test_torchvisions_output_and_gradient(ratio: int, dtype: torch.dtype, layout, pyramid: Pyramid) -> None:
    from torchvision.ops import MultiScaleRoIAlign

    shapes, boxes = pyramid.shapes(5), per_image(boxes_of_all_sizes().to(dtype))
    maps = [numbers(shape, seed).to(dtype).contiguous(memory_format=layout) for seed, shape in enumerate(shapes)]
    ours, theirs = ([x.clone().requires_grad_() for x in maps] for _ in range(2))
    names = [str(level) for level in range(len(maps))]
    pooler = MultiScaleRoIAlign(names, BINS, ratio)
    pooler.scales, pooler.map_levels = list(pyramid.scales), torchvisions_mapper(pyramid)
    expected = pooler(dict(zip(names, theirs, strict=True)), boxes, [IMAGE] * IMAGES)

    size, level = pyramid.canonical
    options = {"canonical_scale": size, "canonical_level": level}
    output = multiscale_roi_align(ours, boxes, BINS, pyramid.scales, ratio, **options)
    assert_sums_close(output.detach(), expected.detach().double())
    assert output.is_contiguous(memory_format=layout)
    grad = numbers(tuple(expected.shape), seed=1).to(dtype)
    output.backward(grad)
    expected.backward(grad)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_sums_close(mine.grad, wanted.grad.double())
        assert mine.grad.is_contiguous(memory_format=layout)


def arrays_of(maps: list[Tensor]) -> list[Array]:
    return [x.double().numpy() for x in maps]


def pooling_of(pyramid: Pyramid) -> Pooling:
    size, level = pyramid.canonical
    return Pooling(pyramid.scales, *BINS, 2, False, size, level)


@pyramids
@layouts
@dtypes
def test_roi_align_of_any_boxes(dtype: torch.dtype, layout, pyramid: Pyramid) -> None:
    """A box that is on no level comes out as 0 and takes no gradient, a NaN neither."""
    rois, pooling = boxes_of_all_kinds().to(dtype), pooling_of(pyramid)
    maps = [numbers(shape, seed).to(dtype).to(memory_format=layout) for seed, shape in enumerate(pyramid.shapes(4))]
    reference, options = weighted_pool.roi_align(BINS, 2, False), (rois.numpy(), pyramid.scales, pyramid.canonical)
    output = torch_path.align(maps, rois, pooling)
    assert_sums_close(output, torch.from_numpy(reference.forward(arrays_of(maps), *options)))
    grad = numbers(tuple(output.shape), seed=1)
    expected = reference.backward(grad.numpy(), arrays_of(maps), *options)
    grad[pyramid.takes_no_gradient(rois)] = torch.nan
    gradients = torch_path.align_adjoint(grad.to(dtype), rois, pooling, Maps.of(maps))
    for gradient, of_level in zip(gradients, expected, strict=True):
        assert_sums_close(gradient, torch.from_numpy(of_level))


@pyramids
@layouts
@dtypes
def test_max_pooling_of_any_boxes(dtype: torch.dtype, layout, pyramid: Pyramid) -> None:
    """The same, to the bit."""
    rois, pooling = boxes_of_all_kinds().to(dtype), pooling_of(pyramid)
    maps = [features(shape, dtype, seed=seed) for seed, shape in enumerate(pyramid.shapes(4))]
    maps = [x.contiguous(memory_format=layout) for x in maps]
    reference, options = MaxPool(BINS), (rois.numpy(), pyramid.scales, pyramid.canonical)
    expected, positions = map(torch.from_numpy, reference.with_argmax(arrays_of(maps), *options))
    output, argmax = torch_path.max_pool_with_argmax(maps, rois, pooling)
    assert same_bits(output, expected.to(dtype))
    assert torch.equal(argmax.long(), positions)
    assert same_bits(torch_path.max_pool(maps, rois, pooling), expected.to(dtype))
    # Small integers: every sum is exact.
    grad = torch.randint(-1, 2, output.shape, generator=torch.Generator().manual_seed(1)).double()
    expected_gradients = reference.backward(grad.numpy(), arrays_of(maps), *options)
    grad[pyramid.takes_no_gradient(rois)] = torch.nan
    gradients = torch_path.max_gather_adjoint(grad.to(dtype), rois, argmax, pooling, Maps.of(maps))
    for gradient, of_level in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient.double(), torch.from_numpy(of_level))

"""The CUDA kernels of RoIAlign and of the position-sensitive operators, run on the CPU (see cuda_on_cpu)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from roi.cupy_path import access, launch
from roi.cupy_path import roi_align_launches as align
from tests.cuda_on_cpu import COMPILER, Library, build, ps_roi_pool_variants, roi_align_variants, transpose_variants
from tests.cuda_on_cpu.operators import (
    ADAPTIVE,
    CANONICAL,
    CASES,
    PS_ADAPTIVE,
    PS_POOL,
    SCALES,
    SIZES,
    Operator,
    boxes_for,
    problem,
    pyramid,
    pyramid_boxes,
)
from tests.flat_calls import CUPY as cupy_path
from tests.reference import weighted_pool
from tests.reference.boxes import ordinary_boxes
from tests.reference.comparison import assert_sums_close, same_bits
from tests.reference.levels import level_of
from tests.reference.maps import numbers
from tests.reference.pyramids import PYRAMIDS, boxes_of_all_kinds

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

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
ways = pytest.mark.parametrize("way", ["atomic", "gather"], indirect=True)


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}{case[0].options}-{case[2]}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    types = [(launch.FEATURES[dtype], launch.COORDINATES[coordinates]) for dtype, coordinates in DTYPES]
    built = []
    for source, variants in (("roi_align", roi_align_variants), ("ps_roi_pool", ps_roi_pool_variants)):
        names = [name for feature, coordinate in types for name in variants((feature,), (coordinate,))]
        built.append(build(folder, source, names))
    built.append(build(folder, "transpose", transpose_variants()))
    return Library(*built)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    """Launches go to the library. Few threads: every loop over a grid or a block then takes several turns."""
    monkeypatch.setattr(launch, "run", library.run)
    monkeypatch.setattr(launch, "THREADS", 32)
    monkeypatch.setattr(launch, "MAX_GRID_Y", 2)
    monkeypatch.setattr(access, "TILE_BYTES", 1024)
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


@cases
@dtypes
@pytest.mark.usefixtures("deterministic")  # torch.empty is then filled: an element that is not written shows
def test_forward(dtype, coordinates, layout, case):
    operator, _, size, scale = case
    input, rois, expected, *_ = problem(case, coordinates)
    input = input.to(dtype).contiguous(memory_format=layout)
    output = operator.forward(input, rois, scale, size)
    assert output.dtype == dtype
    assert_sums_close(output, expected)
    if not input.is_contiguous():
        assert output.is_contiguous(memory_format=torch.channels_last)


@cases
@dtypes
@ways
def test_backward(way, dtype, coordinates, layout, case, on_cpu):
    operator, _, _, scale = case
    input, rois, _, grad, expected = problem(case, coordinates)
    channels_last = layout is torch.channels_last
    actual = operator.backward(grad.to(dtype), rois, scale, tuple(input.shape), channels_last)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=layout)
    assert_sums_close(actual, expected)
    assert [f"backward_{way}<" in name for name in on_cpu.operators] == [True]


# --- Pyramids


@dtypes
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(-1, False), (2, True)])
@pytest.mark.usefixtures("deterministic")
def test_levels_in_one_launch(sampling_ratio, aligned, dtype, coordinates, layout, on_cpu):
    features, rois = pyramid(dtype, layout), pyramid_boxes(coordinates)
    arrays = [x.double().numpy() for x in features]
    operator = weighted_pool.roi_align((3, 2), sampling_ratio, aligned)
    expected = torch.from_numpy(operator.forward(arrays, rois.numpy(), SCALES, CANONICAL))
    used = {level_of(box, SCALES, CANONICAL) for box in rois.numpy()}
    assert used == {0, 1, 2}
    output = cupy_path.multiscale_roi_align(features, rois, SCALES, *CANONICAL, 3, 2, sampling_ratio, aligned)
    assert_sums_close(output, expected)
    assert output.is_contiguous(memory_format=layout)
    assert len(on_cpu.operators) == 1


@dtypes
@ways
def test_gradients_of_levels_in_one_launch(way, dtype, coordinates, layout, on_cpu):
    rois, channels_last = pyramid_boxes(coordinates), layout is torch.channels_last
    grad = numbers((len(rois), 4, 3, 2))
    maps = [np.empty((2, 4, *size)) for size in SIZES]
    expected = weighted_pool.roi_align((3, 2), 2, False).backward(grad.numpy(), maps, rois.numpy(), SCALES, CANONICAL)
    sizes = ([height for height, _ in SIZES], [width for _, width in SIZES])
    options = (SCALES, *CANONICAL, 2, False, 2, 4, *sizes, channels_last)
    actual = cupy_path.multiscale_roi_align_backward(grad.to(dtype), rois, *options)
    assert len(actual) == len(expected)
    for of_level, expected_of_level in zip(actual, expected, strict=True):
        assert of_level.is_contiguous(memory_format=layout)
        assert_sums_close(of_level, torch.from_numpy(expected_of_level))
    assert len(on_cpu.operators) == 1


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_any_list_of_scales(name, dtype, way, layout, on_cpu):
    """A box that is on no level comes out as 0 and takes no gradient, a NaN neither."""
    any_scales = PYRAMIDS[name]
    shapes, rois = any_scales.shapes(8), boxes_of_all_kinds().to(dtype)
    maps = [numbers(shape, seed) for seed, shape in enumerate(shapes)]
    operator = weighted_pool.roi_align((3, 2), 2, False)
    arrays, options = [x.numpy() for x in maps], (rois.numpy(), any_scales.scales, any_scales.canonical)
    expected = torch.from_numpy(operator.forward(arrays, *options))

    flat, sampling = (any_scales.scales, *any_scales.canonical), (2, False)
    inputs = [x.to(dtype).contiguous(memory_format=layout) for x in maps]
    output = cupy_path.multiscale_roi_align(inputs, rois, *flat, 3, 2, *sampling)
    assert_sums_close(output, expected)

    grad = numbers(tuple(expected.shape), seed=1)
    expected_gradients = operator.backward(grad.numpy(), arrays, *options)
    grad[any_scales.takes_no_gradient(rois)] = torch.nan
    sizes = [shape[2] for shape in shapes], [shape[3] for shape in shapes]
    sizes = *shapes[0][:2], *sizes, layout is torch.channels_last
    gradients = cupy_path.multiscale_roi_align_backward(grad.to(dtype), rois, *flat, *sampling, *sizes)
    assert [f"backward_{way}<" in launched for launched in on_cpu.operators] == [False, True]
    for actual, of_level in zip(gradients, expected_gradients, strict=True):
        assert actual.is_contiguous(memory_format=layout)
        assert_sums_close(actual, torch.from_numpy(of_level))


def test_levels_of_several_layouts_take_the_first_ones():
    features, rois = pyramid(torch.float32, torch.channels_last), pyramid_boxes(torch.float32)
    options = (rois, SCALES, *CANONICAL, 3, 2, 2, False)
    expected = cupy_path.multiscale_roi_align(features, *options)
    features[1] = features[1].contiguous()
    features[2] = features[2].repeat_interleave(2, dim=2)[:, :, ::2]
    actual = cupy_path.multiscale_roi_align(features, *options)
    assert same_bits(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.torchvision
@pytest.mark.parametrize("levels", [2, 4])
def test_agrees_with_torchvisions_multi_scale_roi_align(levels):
    from torchvision.ops import MultiScaleRoIAlign

    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 5, 48 >> level, 64 >> level, generator=generator) for level in range(levels)]
    rois = ordinary_boxes(80, 2, 192, 256, seed=3).float()
    names = [str(level) for level in range(levels)]
    pooler = MultiScaleRoIAlign(names, 7, 2, canonical_scale=64, canonical_level=4)
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    expected = pooler(dict(zip(names, features, strict=True)), boxes, [(192, 256)] * 2)
    rois = torch.cat([rois[rois[:, 0] == image] for image in range(2)])
    scales = [1 / (4 << level) for level in range(levels)]
    actual = cupy_path.multiscale_roi_align(features, rois, scales, 64.0, 4.0, 7, 7, 2, False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- Beside torchvision


@pytest.mark.torchvision
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 5])
@pytest.mark.parametrize("name", ["roi_align", "roi_align aligned", "ps_roi_align", "ps_roi_pool"])
def test_agrees_with_torchvision_on_ordinary_boxes(name, sampling_ratio, layout):
    from torchvision import ops

    generator = torch.Generator().manual_seed(4)
    input = torch.randn(2, 24, 19, 23, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
    rois = ordinary_boxes(60, 2, 19 * 8, 23 * 8, seed=5)
    theirs = input.clone().requires_grad_()
    if name == "ps_roi_pool":
        # torchvision's forward pass leaves out the map's last row and column, its backward pass does not.
        rois = rois[(rois[:, 3] / 8 < 22) & (rois[:, 4] / 8 < 18)]
        expected = ops.ps_roi_pool(theirs, rois, (3, 4), 1 / 8)
        operator = PS_POOL
    elif name == "ps_roi_align":
        expected = ops.ps_roi_align(theirs, rois, (3, 4), 1 / 8, sampling_ratio)
        operator = Operator("ps_roi_align", (sampling_ratio,), weighted_pool.ps_roi_align)
    else:
        aligned = name.endswith("aligned")
        expected = ops.roi_align(theirs, rois, (3, 4), 1 / 8, sampling_ratio, aligned)
        operator = Operator("roi_align", (sampling_ratio, aligned), weighted_pool.roi_align)
    # torchvision's ps_roi_align divides 0 by 0 for an empty box.
    expected_output = expected.detach().nan_to_num(nan=0.0)
    torch.testing.assert_close(operator.forward(input, rois, 1 / 8, (3, 4)), expected_output, rtol=0, atol=1e-12)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected.backward(grad)
    channels_last = layout is torch.channels_last
    actual = operator.backward(grad, rois, 1 / 8, tuple(input.shape), channels_last)
    torch.testing.assert_close(actual, theirs.grad, rtol=0, atol=1e-11)


# --- What the cases above do not reach


@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[9]], ids=["roi_align", "ps_roi_align", "ps_roi_pool"])
@pytest.mark.usefixtures("deterministic")
def test_with_as_many_threads_as_on_a_device(case, layout, monkeypatch):
    monkeypatch.setattr(launch, "THREADS", 256)
    monkeypatch.setattr(launch, "MAX_GRID_Y", 65535)
    monkeypatch.setattr(launch, "SLOTS_BYTES", 16 * 1024)
    operator, _, size, scale = case
    input, rois, expected, grad, expected_gradient = problem(case, torch.float32)
    output = operator.forward(input.float().contiguous(memory_format=layout), rois, scale, size)
    assert_sums_close(output, expected)
    shape, channels_last = tuple(input.shape), layout is torch.channels_last
    assert_sums_close(operator.backward(grad.float(), rois, scale, shape, channels_last), expected_gradient)


@pytest.mark.parametrize(
    ("dtype", "channels", "offset", "device_has_it", "forward", "backward"),
    [
        (torch.float32, 8, 0, True, 4, 4),
        (torch.float32, 8, 0, False, 4, 1),
        (torch.float32, 6, 0, True, 1, 1),
        (torch.float32, 8, 1, True, 1, 1),
        (torch.float16, 8, 0, True, 8, 4),
        (torch.float16, 4, 0, True, 1, 4),
        (torch.float64, 8, 0, True, 2, 1),
    ],
)
def test_vector_accesses_only_where_they_can_be(
    dtype, channels, offset, device_has_it, forward, backward, monkeypatch, on_cpu
):
    monkeypatch.setattr(align, "has_vector_atomics", lambda device: device_has_it)
    shape = (2, channels, 5, 6)

    def placed(values: Tensor) -> Tensor:
        """In channels_last memory that begins `offset` elements after an aligned address."""
        n, c, h, w = values.shape
        buffer = torch.empty(offset + values.numel(), dtype=dtype)
        return buffer[offset:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(values)

    rois = boxes_for(shape, 1.0, torch.float32)
    input, grad = numbers(shape), numbers((len(rois), channels, 3, 2))
    operator = weighted_pool.roi_align((3, 2), 2, False)
    expected = operator.forward([input.numpy()], rois.numpy(), [1.0])
    assert_sums_close(cupy_path.roi_align(placed(input), rois, 1.0, 3, 2, 2, False), torch.from_numpy(expected))
    (expected,) = operator.backward(grad.numpy(), [input.numpy()], rois.numpy(), [1.0])
    actual = cupy_path.roi_align_backward(placed(grad), rois, 1.0, 2, False, *shape, True)
    assert_sums_close(actual, torch.from_numpy(expected))
    types = f"{launch.FEATURES[dtype]}, float, roi::ChannelsLast"
    assert on_cpu.launched == [
        f"roi::roi_align<{types}<{forward}>, false>",
        f"roi::roi_align_backward_atomic<{types}<{backward}>, false>",
    ]


def test_features_without_weight_are_not_read(layout):
    """NaN on one cell is seen by the bins that have a sample less than a cell from it, and by no other."""
    input = torch.zeros(1, 4, 8, 8).contiguous(memory_format=layout)
    input[:, :, 4, 4] = torch.nan
    rois = torch.tensor([[0, 0.0, 0.0, 8.0, 8.0]])  # samples on whole cells, one in each bin
    output = cupy_path.roi_align(input, rois, 1.0, 8, 8, 1, True)
    expected = torch.zeros(1, 4, 8, 8)
    expected[:, :, 4, 4] = torch.nan
    assert same_bits(output.contiguous() + 0.0, expected)


@ways
def test_work_does_not_grow_with_what_lies_off_the_map(way):
    """2**30 samples in a bin; those on the map count as they do in torchvision."""
    rois = torch.tensor([[0, -(2.0**30), 0.0, 2.0**30, 8.0], [0, 2.0, -(2.0**30), 6.0, 16.0]], dtype=torch.float64)
    input = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    for sampling_ratio in (-1, 2):
        output = cupy_path.roi_align(input, rois, 1.0, 2, 2, sampling_ratio, True)
        arguments = ([input.numpy()], rois.numpy(), [1.0])
        expected = weighted_pool.roi_align((2, 2), sampling_ratio, True).forward(*arguments)
        assert_sums_close(output, torch.from_numpy(expected))
        grad = torch.ones_like(output)
        gradient = cupy_path.roi_align_backward(grad, rois, 1.0, sampling_ratio, True, *input.shape, False)
        torch.testing.assert_close((gradient * input).sum(), output.sum())


@pytest.mark.parametrize("size", [(1, 700), (600, 2)])
@pytest.mark.usefixtures("deterministic")
def test_a_gather_of_very_many_bins_takes_smaller_patches(size, layout, monkeypatch):
    monkeypatch.setattr(launch, "THREADS", 256)
    shape = (1, 3, 4, 70)
    rois = ordinary_boxes(5, 1, 4, 70)
    grad = numbers((5, 3, *size))
    (expected,) = weighted_pool.roi_align(size, 1, False).backward(grad.numpy(), [np.empty(shape)], rois.numpy(), [1.0])
    actual = cupy_path.roi_align_backward(grad, rois, 1.0, 1, False, *shape, layout is torch.channels_last)
    assert_sums_close(actual, torch.from_numpy(expected))


@ways
@pytest.mark.parametrize("operator", [ADAPTIVE, PS_ADAPTIVE, PS_POOL], ids=lambda operator: operator.name)
@pytest.mark.parametrize(
    ("shape", "boxes", "value"),
    [((2, 4, 4, 5), 0, None), ((2, 0, 4, 5), 3, None), ((0, 4, 4, 5), 3, float("nan"))],
    ids=["no boxes", "no channels", "no images"],
)
def test_empty(shape, boxes, value, operator, way, on_cpu):
    rois = ordinary_boxes(boxes, 2, 4, 5).float()
    output = operator.forward(torch.zeros(shape), rois, 1.0, (2, 2))
    assert output.shape == (boxes, shape[1] // (4 if operator.name.startswith("ps_") else 1), 2, 2)
    if value is None:
        assert on_cpu.launched == []
    else:
        assert same_bits(output, torch.full_like(output, value))
    assert torch.equal(operator.backward(torch.ones_like(output), rois, 1.0, shape, False), torch.zeros(shape))


@pytest.mark.parametrize("operator", [ADAPTIVE, PS_ADAPTIVE, PS_POOL], ids=lambda operator: operator.name)
@pytest.mark.parametrize(
    ("shape", "size", "named"),
    [
        ((1, 1, 2**30 + 1, 1), (1, 1), "rows and columns"),
        ((1, 1, 1, 1), (6144, 1), "output size"),
        ((1, 2**20, 1, 1), (64, 64), "per box"),
        ((2**16, 2**15, 1, 1), (1, 1), "batch size"),
    ],
)
def test_sizes_beyond_what_the_kernels_address_are_refused(shape, size, named, operator, on_cpu):
    bins = size[0] * size[1] if operator.name.startswith("ps_") else 1
    shape = (shape[0], shape[1] * bins, *shape[2:])
    input, rois = torch.zeros(()).expand(shape), torch.zeros(1, 5)
    with pytest.raises(launch.KernelLimitError, match=named):
        operator.forward(input, rois, 1.0, size)
    with pytest.raises(launch.KernelLimitError, match=named):
        operator.backward(torch.zeros(()).expand(1, shape[1] // bins, *size), rois, 1.0, shape, False)
    assert on_cpu.launched == []


def test_what_does_not_fit_the_shared_memory_is_refused(on_cpu, request):
    rois = torch.zeros(1, 5)
    with pytest.raises(launch.KernelLimitError, match="weights for maps of 5000 x 2000"):
        cupy_path.roi_align(torch.zeros(1, 1, 5000, 2000), rois, 1.0, 7, 7, -1, False)
    cupy_path.roi_align(torch.zeros(1, 1, 5000, 2000), rois, 1.0, 7, 7, 2, False)  # a few samples need no more there
    with pytest.raises(launch.KernelLimitError, match="at least one cell"):
        cupy_path.roi_align(torch.zeros(1, 1, 0, 5), rois, 1.0, 7, 7, 2, False)
    features = [torch.zeros(1, 1, 4, 4)] * 9
    with pytest.raises(launch.KernelLimitError, match="at most 8 levels, got 9"):
        cupy_path.multiscale_roi_align(features, rois, [1.0] * 9, 224.0, 4.0, 7, 7, 2, False)
    with pytest.raises(launch.KernelLimitError, match="float8_e5m2"):
        cupy_path.roi_align(torch.zeros(1, 1, 4, 4).to(torch.float8_e5m2), rois, 1.0, 7, 7, 2, False)
    request.getfixturevalue("deterministic")
    grad = torch.zeros(1, 1, 6100, 43, dtype=torch.float64)
    with pytest.raises(launch.KernelLimitError, match="6100 x 43 bins"):
        cupy_path.roi_align_backward(grad, rois, 1.0, 2, False, 1, 1, 4, 4, False)
    assert len(on_cpu.operators) == 1

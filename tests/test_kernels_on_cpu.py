"""The CUDA kernels and their launches, run on the CPU: g++ builds the very same sources (see cuda_on_cpu)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from roi._problem import memory_format
from roi.cupy_path import access, launch
from tests.cuda_on_cpu import COMPILER, Library, build, roi_pool_variants, transpose_variants
from tests.flat_calls import CUPY as cupy_path
from tests.reference import max_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.comparison import same_bits
from tests.reference.levels import level_of
from tests.reference.maps import features
from tests.reference.pyramids import PYRAMIDS, boxes_of_all_kinds

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COORDINATES = [torch.float32, torch.float64]
# (N, C, H, W), output size, scale. 8 channels take the vector accesses, the others do not.
CASES = [
    ((2, 8, 9, 13), (7, 7), 0.25),
    ((2, 5, 12, 7), (3, 2), 1 / 16),
    ((1, 16, 6, 6), (2, 5), 1.0),
    ((3, 3, 5, 17), (1, 1), 0.5),
    ((2, 1, 4, 4), (14, 3), 1.0),
    ((1, 9, 40, 2), (4, 4), 0.125),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    variants = roi_pool_variants(indices=("int",))
    variants += roi_pool_variants(features=("float",), coordinates=("float",), indices=("long long",))
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    return Library(build(folder, "roi_pool", variants), build(folder, "transpose", transpose_variants()))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    """Launches go to the library. Few threads: every loop over a grid or a block then takes several turns."""
    monkeypatch.setattr(launch, "run", library.run)
    monkeypatch.setattr(launch, "THREADS", 32)
    monkeypatch.setattr(launch, "MAX_GRID_Y", 2)
    monkeypatch.setattr(access, "TILE_BYTES", 1024)
    library.launched.clear()
    return library


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pool_backward(grad: Tensor, rois: Tensor, argmax: Tensor, scale: float, shape: tuple[int, int, int, int]) -> Tensor:
    """In the format of `argmax`, which is that of the features."""
    channels_last = memory_format(argmax) is torch.channels_last
    return cupy_path.roi_pool_backward(grad, rois, argmax, scale, *shape, channels_last)


def boxes_for(shape: tuple[int, int, int, int], scale: float, dtype: torch.dtype) -> Tensor:
    height, width = shape[2] / scale, shape[3] / scale
    return torch.cat([hostile_boxes(shape[0], height, width), ordinary_boxes(20, shape[0], height, width)]).to(dtype)


def expected_pool(input: Tensor, rois: Tensor, scale: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    output, argmax = max_pool.roi_pool(input.double().numpy(), rois.numpy(), scale, *size)
    return torch.from_numpy(output).to(input.dtype), torch.from_numpy(argmax)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("deterministic")  # torch.empty is then filled: an element that is not written shows
def test_forward(dtype, coordinates, layout, case):
    shape, size, scale = case
    input = features(shape, dtype).to(memory_format=layout)
    rois = boxes_for(shape, scale, coordinates)
    expected, positions = expected_pool(input, rois, scale, size)

    output, argmax = cupy_path.roi_pool(input, rois, scale, *size, True)
    assert output.dtype == dtype
    assert argmax.dtype == torch.int32
    assert same_bits(output, expected)
    assert torch.equal(argmax.long(), positions)
    assert same_bits(cupy_path.roi_pool(input, rois, scale, *size, False)[0], expected)
    if not input.is_contiguous():
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert argmax.stride() == output.stride()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True], ids=["atomic", "gather"])
def test_backward(ordered, dtype, coordinates, layout, case, request, on_cpu):
    if ordered:
        request.getfixturevalue("deterministic")
    shape, size, scale = case
    input = features(shape, dtype)
    rois = boxes_for(shape, scale, coordinates)
    _, argmax = expected_pool(input, rois, scale, size)
    # Small integers: every sum is exact in every dtype, so that any order has to give the same.
    grad = torch.randint(-1, 2, argmax.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.from_numpy(max_pool.roi_pool_backward(grad.double().numpy(), rois.numpy(), argmax.numpy(), shape))
    assert expected.abs().max() <= 128

    argmax = argmax.int().contiguous(memory_format=layout)
    actual = pool_backward(grad, rois, argmax, scale, shape)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=memory_format(argmax))
    assert torch.equal(actual.double(), expected)
    assert [name.split("<")[0] for name in on_cpu.operators] == [
        "roi::roi_pool_backward_gather" if ordered else "roi::roi_pool_backward_atomic"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_backward_adds_in_the_order_of_boxes_and_bins(dtype, layout):
    shape, size, scale = (2, 6, 9, 11), (7, 7), 0.5
    rois = boxes_for(shape, scale, torch.float32).repeat(3, 1)
    _, argmax = expected_pool(torch.randn(shape, generator=torch.Generator().manual_seed(2)), rois, scale, size)
    grad = torch.randn(argmax.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = torch.from_numpy(max_pool.roi_pool_backward(grad.numpy(), rois.numpy(), argmax.numpy(), shape))
    argmax = argmax.int().contiguous(memory_format=layout)
    actual = pool_backward(grad, rois, argmax, scale, shape)
    assert same_bits(actual, expected + 0.0)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 64), (50, 2), (14, 14)])
@pytest.mark.usefixtures("deterministic")
def test_every_cell_of_a_box_belongs_to_the_bins_that_the_gather_looks_at(size):
    """The forward cuts an axis into bins, the gather asks which bins cover a cell: the two must agree."""
    shape = (1, 1, 6, 130)
    extents = torch.tensor([*range(1, 131), 2**30]).double()
    zero = torch.zeros_like(extents)
    ahead = torch.stack([zero, zero - 1, zero + 2, extents - 2, zero + 3], dim=1)
    behind = torch.stack([zero, 130 - extents, zero, zero + 129, extents - 1], dim=1)
    # Boxes so wide that float32 cannot tell neighbouring cells apart, placed to have the edge of a bin on the map.
    generator = torch.Generator().manual_seed(6)
    extents = torch.randint(10**6, 2**30, (60,), generator=generator)
    edge = torch.randint(size[1], (60,), generator=generator)
    x1 = torch.randint(130, (60,), generator=generator) - edge * extents // size[1]
    zero = torch.zeros(60, dtype=torch.float64)
    wide = torch.stack([zero, x1.double(), zero + 2, (x1 + extents - 1).double(), zero + 3], dim=1)
    rois = torch.cat([ahead, behind, wide])
    input = torch.arange(6 * 130, dtype=torch.float64).reshape(shape)
    output, argmax = cupy_path.roi_pool(input, rois, 1.0, *size, True)
    taken = argmax[argmax >= 0].long()
    expected = torch.bincount(taken, minlength=6 * 130).double()
    actual = pool_backward(torch.ones_like(output), rois, argmax, 1.0, shape)
    assert torch.equal(actual.flatten(), expected)


@pytest.mark.parametrize("ordered", [False, True], ids=["atomic", "gather"])
def test_positions_off_the_map_are_ignored(ordered, layout, request):
    """They do not come from the forward pass, but they are memory addresses all the same."""
    if ordered:
        request.getfixturevalue("deterministic")
    shape = (2, 3, 4, 5)
    rois = torch.tensor([[0, 0.0, 0.0, 4.0, 3.0], [1, 0.0, 0.0, 4.0, 3.0]])
    argmax = torch.tensor([20, 21, -2, -(2**31), 2**31 - 1, 10**6], dtype=torch.int32)
    argmax = argmax.expand(2, 3, 6).reshape(2, 3, 2, 3).contiguous(memory_format=layout)
    actual = pool_backward(torch.ones(argmax.shape), rois, argmax, 1.0, shape)
    assert torch.equal(actual, torch.zeros(shape))


@pytest.mark.parametrize("ordered", [False, True], ids=["atomic", "gather"])
def test_positions_of_64_bits(ordered, layout, monkeypatch, request, on_cpu):
    if ordered:
        request.getfixturevalue("deterministic")
    monkeypatch.setattr("roi._outputs.argmax_dtype", lambda maps: torch.int64)
    shape, size, scale = CASES[0]
    input = features(shape, torch.float32).to(memory_format=layout)
    rois = boxes_for(shape, scale, torch.float32)
    expected, positions = expected_pool(input, rois, scale, size)
    output, argmax = cupy_path.roi_pool(input, rois, scale, *size, True)
    assert same_bits(output, expected)
    assert argmax.dtype == torch.int64
    assert torch.equal(argmax, positions)
    grad = torch.ones_like(output)
    expected = max_pool.roi_pool_backward(grad.double().numpy(), rois.numpy(), positions.numpy(), shape)
    actual = pool_backward(grad, rois, argmax, scale, shape)
    assert torch.equal(actual.double(), torch.from_numpy(expected))
    assert all("long long" in name for name in on_cpu.operators)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("deterministic")
def test_with_as_many_threads_as_on_a_device(dtype, layout, monkeypatch):
    monkeypatch.setattr(launch, "THREADS", 256)
    monkeypatch.setattr(launch, "MAX_GRID_Y", 65535)
    shape, size, scale = (1, 40, 7, 9), (3, 3), 1.0
    input = features(shape, dtype).to(memory_format=layout)
    rois = boxes_for(shape, scale, torch.float32)
    expected, positions = expected_pool(input, rois, scale, size)
    output, argmax = cupy_path.roi_pool(input, rois, scale, *size, True)
    assert same_bits(output, expected)
    assert torch.equal(argmax.long(), positions)
    grad = torch.ones_like(output)
    expected = max_pool.roi_pool_backward(grad.double().numpy(), rois.numpy(), positions.numpy(), shape)
    actual = pool_backward(grad, rois, argmax, scale, shape)
    assert torch.equal(actual.double(), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("channels", "offset", "lanes"), [(8, 0, 4), (6, 0, 1), (8, 1, 1)], ids=["vectors", "channels", "alignment"]
)
def test_vector_accesses_only_where_channels_and_alignment_allow(channels, offset, lanes, on_cpu):
    shape = (2, channels, 5, 6)
    buffer = torch.empty(offset + 2 * channels * 30)
    input = buffer[offset:].view(2, 5, 6, channels).permute(0, 3, 1, 2)
    input.copy_(features(shape, torch.float32))
    rois = boxes_for(shape, 1.0, torch.float32)
    expected, _ = expected_pool(input, rois, 1.0, (3, 3))
    assert same_bits(cupy_path.roi_pool(input, rois, 1.0, 3, 3, False)[0], expected)
    assert on_cpu.launched == [f"roi::roi_pool<float, float, int, false, roi::ChannelsLast<{lanes}>>"]


def test_input_of_another_layout_is_copied():
    input = features((2, 3, 10, 12), torch.float32)[:, :, ::2, 1::3]
    rois = boxes_for((2, 3, 5, 4), 1.0, torch.float32)
    expected, _ = expected_pool(input, rois, 1.0, (2, 2))
    output = cupy_path.roi_pool(input, rois, 1.0, 2, 2, False)[0]
    assert same_bits(output, expected)
    assert output.is_contiguous()


def test_boxes_and_gradients_of_another_layout():
    shape = (2, 8, 6, 7)
    input = features(shape, torch.float32, special=False).to(memory_format=torch.channels_last)
    rois = boxes_for(shape, 1.0, torch.float32)
    strided = torch.stack([rois, rois], dim=2)[:, :, 1]
    output, argmax = cupy_path.roi_pool(input, strided, 1.0, 3, 3, True)
    assert same_bits(output, cupy_path.roi_pool(input, rois, 1.0, 3, 3, False)[0])
    grad = torch.ones(()).expand_as(output)
    actual = pool_backward(grad, strided, argmax, 1.0, shape)
    expected = pool_backward(torch.ones_like(output), rois, argmax, 1.0, shape)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ordered", [False, True], ids=["atomic", "gather"])
@pytest.mark.parametrize(
    ("shape", "boxes", "value"),
    [
        ((2, 3, 4, 5), 0, None),
        ((2, 0, 4, 5), 3, None),
        ((0, 3, 4, 5), 3, float("nan")),
        ((2, 3, 0, 5), 3, 0.0),
        ((2, 3, 4, 0), 3, 0.0),
    ],
    ids=["no boxes", "no channels", "no images", "no rows", "no columns"],
)
def test_empty(shape, boxes, value, ordered, request, on_cpu):
    if ordered:
        request.getfixturevalue("deterministic")
    rois = ordinary_boxes(boxes, 2, 4, 5).float()
    output, argmax = cupy_path.roi_pool(torch.zeros(shape), rois, 1.0, 2, 2, True)
    assert output.shape == argmax.shape == (boxes, shape[1], 2, 2)
    if value is None:
        assert on_cpu.launched == []
    else:
        assert same_bits(output, torch.full_like(output, value))
        assert (argmax == -1).all()
    grad_input = pool_backward(torch.ones_like(output), rois, argmax, 1.0, shape)
    assert torch.equal(grad_input, torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "size", "named"),
    [
        ((1, 1, 2**30 + 1, 1), (1, 1), "rows and columns"),
        ((1, 1, 1, 2**30 + 1), (1, 1), "rows and columns"),
        ((1, 1, 1, 1), (0, 1), "output size"),
        ((1, 1, 1, 1), (6144, 1), "output size"),
        ((1, 2**20, 1, 1), (64, 64), "per box"),
        ((2**16, 2**15, 1, 1), (1, 1), "batch size"),
    ],
)
def test_sizes_beyond_what_the_kernels_address_are_refused(shape, size, named, on_cpu):
    input = torch.zeros(()).expand(shape)
    rois = torch.zeros(1, 5)
    pooled = torch.zeros(()).expand(1, shape[1], *size)
    with pytest.raises(ValueError, match=named):
        cupy_path.roi_pool(input, rois, 1.0, *size, True)
    with pytest.raises(ValueError, match=named):
        pool_backward(pooled, rois, pooled, 1.0, shape)
    assert on_cpu.launched == []


@pytest.mark.torchvision
@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 16])
@pytest.mark.parametrize("size", [(7, 7), (2, 3), (14, 1)])
def test_agrees_with_torchvision_on_ordinary_boxes(size, scale, layout):
    from torchvision import ops

    input = torch.randn(2, 5, 19, 23, generator=torch.Generator().manual_seed(4))
    rois = ordinary_boxes(60, 2, 19 / scale, 23 / scale, seed=5).float()
    expected = ops.roi_pool(input, rois, size, scale)
    assert same_bits(cupy_path.roi_pool(input.to(memory_format=layout), rois, scale, *size, False)[0], expected)


# --- Pyramids

SIZES, SCALES, CANONICAL = [(16, 20), (8, 10), (4, 5)], [1 / 4, 1 / 8, 1 / 16], (32.0, 3.0)


def expected_of_levels(inputs: list[Tensor], rois: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, argmax and the level of each box."""
    arrays = rois.numpy()
    level = torch.tensor([level_of(box, SCALES, CANONICAL) for box in arrays])
    maps = [x.double().numpy() for x in inputs]
    output, argmax = max_pool.MaxPool(size).with_argmax(maps, arrays, SCALES, CANONICAL)
    return torch.from_numpy(output).to(inputs[0].dtype), torch.from_numpy(argmax), level


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True], ids=["atomic", "gather"])
def test_levels_in_one_launch(ordered, dtype, coordinates, layout, request, on_cpu):
    if ordered:
        request.getfixturevalue("deterministic")
    shapes = [(2, 8, *size) for size in SIZES]
    inputs = [features(shape, dtype, seed=seed) for seed, shape in enumerate(shapes)]
    rois = torch.cat([hostile_boxes(2, 64, 80), ordinary_boxes(30, 2, 64, 80)]).to(coordinates)
    expected, positions, level = expected_of_levels(inputs, rois, (3, 2))
    assert set(level.tolist()) == {0, 1, 2}

    maps = [x.contiguous(memory_format=layout) for x in inputs]
    output, argmax = cupy_path.multiscale_roi_pool(maps, rois, SCALES, *CANONICAL, 3, 2, True)
    assert same_bits(output, expected)
    assert output.is_contiguous(memory_format=layout)
    assert torch.equal(argmax.long(), positions)

    grad = torch.randint(-1, 2, argmax.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    sizes = ([height for height, _ in SIZES], [width for _, width in SIZES])
    options = (SCALES, *CANONICAL, 2, 8, *sizes, layout is torch.channels_last)
    gradients = cupy_path.multiscale_roi_pool_backward(grad, rois, argmax, *options)
    assert len(on_cpu.operators) == 2
    for i, (actual, shape) in enumerate(zip(gradients, shapes, strict=True)):
        mine = level == i
        arrays = (x[mine].numpy() for x in (grad.double(), rois, positions))
        assert torch.equal(actual.double(), torch.from_numpy(max_pool.roi_pool_backward(*arrays, shape)))
        assert actual.is_contiguous(memory_format=layout)


def test_boxes_without_an_area_belong_to_the_finest_level():
    """One that is reversed along one axis, torchvision puts on no level."""
    inputs = [torch.full((1, 1, *size), float(level)) for level, size in enumerate(SIZES)]
    rois = torch.tensor([[0, 40.0, 8, 8, 40], [0, 8.0, 8, 8, 60], [0, 0.0, 0, 0, 0], [0, 0.0, 0, 70, 60]])
    output, _ = cupy_path.multiscale_roi_pool(inputs, rois, SCALES, *CANONICAL, 1, 1, False)
    assert output.flatten().tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("ordered", [False, True], ids=["atomic", "gather"])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_any_list_of_scales(name, ordered, coordinates, layout, request, on_cpu):
    """A box that is on no level comes out as 0 and takes no gradient, a NaN neither."""
    if ordered:
        request.getfixturevalue("deterministic")
    pyramid, dtype = PYRAMIDS[name], torch.float16
    shapes, rois = pyramid.shapes(8), boxes_of_all_kinds().to(coordinates)
    inputs = [features(shape, dtype, seed=seed).contiguous(memory_format=layout) for seed, shape in enumerate(shapes)]
    reference, options = max_pool.MaxPool((3, 2)), (rois.numpy(), pyramid.scales, pyramid.canonical)
    arrays = [x.double().numpy() for x in inputs]
    expected, positions = map(torch.from_numpy, reference.with_argmax(arrays, *options))

    flat = (pyramid.scales, *pyramid.canonical)
    output, argmax = cupy_path.multiscale_roi_pool(inputs, rois, *flat, 3, 2, True)
    assert same_bits(output, expected.to(dtype))
    assert torch.equal(argmax.long(), positions)
    assert same_bits(cupy_path.multiscale_roi_pool(inputs, rois, *flat, 3, 2, False)[0], expected.to(dtype))

    grad = torch.randint(-1, 2, argmax.shape, generator=torch.Generator().manual_seed(1)).double()
    expected_gradients = reference.backward(grad.numpy(), arrays, *options)
    unpooled = pyramid.takes_no_gradient(rois)
    grad[unpooled], argmax[unpooled] = torch.nan, 0  # whatever the positions are
    sizes = [shape[2] for shape in shapes], [shape[3] for shape in shapes]
    sizes = *shapes[0][:2], *sizes, layout is torch.channels_last
    gradients = cupy_path.multiscale_roi_pool_backward(grad.to(dtype), rois, argmax, *flat, *sizes)
    assert f"backward_{'gather' if ordered else 'atomic'}" in on_cpu.operators[-1]
    for actual, of_level in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual.double(), torch.from_numpy(of_level))
        assert actual.is_contiguous(memory_format=layout)

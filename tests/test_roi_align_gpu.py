"""The CUDA path of RoIAlign, the pyramid poolers and the position-sensitive operators on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.operators import (
    CANONICAL,
    CASES,
    PS_ADAPTIVE,
    PS_POOL,
    SAMPLING_2,
    SCALES,
    SIZES,
    Operator,
    problem,
    pyramid,
    pyramid_boxes,
)
from tests.flat_calls import CUPY as cupy_path
from tests.flat_calls import TORCH as torch_path
from tests.reference import weighted_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.comparison import assert_sums_close, relative_error, same_bits
from tests.reference.maps import numbers
from tests.test_position_sensitive import exact

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ways = pytest.mark.parametrize("way", ["atomic", "gather"], indirect=True)
SIZE, SCALE = (7, 7), 1 / 16
OPERATORS = [SAMPLING_2, PS_ADAPTIVE, PS_POOL]
operators = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)

FINE, SCALES_4 = (200, 336), [1 / 4, 1 / 8, 1 / 16, 1 / 32]  # of a detector's pyramid, images of 800 x 1344
SIZES_4 = [(FINE[0] >> level, FINE[1] >> level) for level in range(4)]
RULE = (224.0, 4.0)


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


def workload(operator: Operator, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    """A feature map and boxes of a detector's size."""
    channels = 196 if operator.name.startswith("ps_") else 256
    input = torch.randn(2, channels, 50, 84, generator=torch.Generator().manual_seed(0))
    rois = ordinary_boxes(512, 2, 800, 1344, seed=1).float()
    return input.cuda().contiguous(memory_format=layout), rois.cuda()


def detector_pyramid(layout: torch.memory_format) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 64, *size, generator=generator).cuda().contiguous(memory_format=layout) for size in SIZES_4]
    return maps, ordinary_boxes(1000, 2, 800, 1344, seed=2).float().cuda()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}{case[0].options}-{case[2]}")
@pytest.mark.parametrize("coordinates", [torch.float32, torch.float64], ids=["boxes32", "boxes64"])
@dtypes
def test_forward_and_backward_match_the_reference(dtype, coordinates, layout, case):
    operator, _, size, scale = case
    input, rois, expected, grad, expected_gradient = problem(case, coordinates)
    on_gpu, rois = input.to(dtype).cuda().contiguous(memory_format=layout), rois.cuda()
    output = operator.forward(on_gpu, rois, scale, size)
    assert output.dtype == dtype
    assert_sums_close(output, expected)
    for ordered in (False, True):
        torch.use_deterministic_algorithms(ordered)
        try:
            channels_last = layout is torch.channels_last
            gradient = operator.backward(grad.to(dtype).cuda(), rois, scale, tuple(input.shape), channels_last)
        finally:
            torch.use_deterministic_algorithms(False)
        assert gradient.dtype == dtype
        assert gradient.is_contiguous(memory_format=layout)
        assert_sums_close(gradient, expected_gradient)


@pytest.mark.parametrize("coordinates", [torch.float32, torch.float64], ids=["boxes32", "boxes64"])
@dtypes
@ways
def test_levels_match_the_reference(way, dtype, coordinates, layout):
    maps, rois = pyramid(dtype, layout), pyramid_boxes(coordinates)
    operator = weighted_pool.roi_align((3, 2), -1, True)
    arrays = [x.double().numpy() for x in maps]
    expected = operator.forward(arrays, rois.numpy(), SCALES, CANONICAL)
    features = [x.cuda() for x in maps]
    output = cupy_path.multiscale_roi_align(features, rois.cuda(), SCALES, *CANONICAL, 3, 2, -1, True)
    assert_sums_close(output, torch.from_numpy(expected))

    grad = numbers(tuple(output.shape))
    expected = operator.backward(grad.numpy(), arrays, rois.numpy(), SCALES, CANONICAL)
    sizes = ([height for height, _ in SIZES], [width for _, width in SIZES])
    options = (SCALES, *CANONICAL, -1, True, 2, 4, *sizes, layout is torch.channels_last)
    gradients = cupy_path.multiscale_roi_align_backward(grad.to(dtype).cuda(), rois.cuda(), *options)
    for gradient, of_level in zip(gradients, expected, strict=True):
        assert_sums_close(gradient, torch.from_numpy(of_level))


@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@ways
def test_a_detectors_pyramid_matches_the_torch_path(way, sampling_ratio, layout):
    maps, rois = detector_pyramid(layout)
    hostile = hostile_boxes(2, 800, 1344).float().cuda()
    rois = torch.cat([rois, hostile])
    options = (rois, SCALES_4, *RULE, 7, 7)
    output = cupy_path.multiscale_roi_align(maps, *options, sampling_ratio, False)
    expected = torch_path.multiscale_roi_align(maps, *options, sampling_ratio, False)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    sizes = ([height for height, _ in SIZES_4], [width for _, width in SIZES_4])
    shape = (2, 64, *sizes, layout is torch.channels_last)
    grad = torch.randn(output.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    arguments = (grad, rois, SCALES_4, *RULE, sampling_ratio, False, *shape)
    pairs = zip(
        cupy_path.multiscale_roi_align_backward(*arguments),
        torch_path.multiscale_roi_align_backward(*arguments),
        strict=True,
    )
    for actual, expected in pairs:
        assert relative_error(actual, expected) < 1e-6

    pooled, argmax = cupy_path.multiscale_roi_pool(maps, *options, True)
    expected, positions = torch_path.multiscale_roi_pool(maps, *options, True)
    assert same_bits(pooled, expected)
    assert torch.equal(argmax.long(), positions.long())
    arguments = (grad, rois, argmax, SCALES_4, *RULE, *shape)
    pairs = zip(
        cupy_path.multiscale_roi_pool_backward(*arguments),
        torch_path.multiscale_roi_pool_backward(*arguments),
        strict=True,
    )
    for actual, expected in pairs:
        assert relative_error(actual, expected) < 1e-6


# Of the mean of values of about 1, and of the sums of a gradient. Coordinates of up to 84 cells are rounded in float32,
# by torchvision's kernel otherwise than by ours (it contracts products and sums); neighbouring cells differ by up to 8.
ROUNDING = {torch.float64: (1e-12, 1e-12), torch.float32: (84 * 2**-24 * 8, 84 * 2**-24)}


@pytest.mark.torchvision
@ways
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=["float64", "float32"])
def test_roi_align_matches_torchvision(dtype, aligned, sampling_ratio, way, layout):
    from torchvision import ops

    input, rois = (x.to(dtype) for x in workload(SAMPLING_2, layout))
    of_means, of_sums = ROUNDING[dtype]
    leaf = input.detach().clone().requires_grad_()
    # torchvision's gradient has no deterministic form on CUDA.
    torch.use_deterministic_algorithms(False)
    expected = ops.roi_align(leaf, rois, SIZE, SCALE, sampling_ratio, aligned)
    grad = torch.randn(expected.shape, dtype=dtype, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected.backward(grad)
    torch.use_deterministic_algorithms(way == "gather")
    output = cupy_path.roi_align(input, rois, SCALE, *SIZE, sampling_ratio, aligned)
    torch.testing.assert_close(output, expected.detach(), rtol=0, atol=of_means)
    channels_last = layout is torch.channels_last
    gradient = cupy_path.roi_align_backward(grad, rois, SCALE, sampling_ratio, aligned, *input.shape, channels_last)
    assert relative_error(gradient, leaf.grad) < of_sums


@pytest.mark.torchvision
def test_position_sensitive_operators_match_torchvision(layout):
    from torchvision import ops

    input, rois = workload(PS_POOL, layout)
    input, rois = input.double(), rois.double()
    # At a few sizes torchvision cuts a bin a cell too large.
    rois = rois[exact("pool", rois.cpu(), SCALE, SIZE).cuda()]
    assert len(rois) > 400
    output = cupy_path.ps_roi_pool(input, rois, SCALE, *SIZE)
    torch.testing.assert_close(output, ops.ps_roi_pool(input, rois, SIZE, SCALE))
    output = cupy_path.ps_roi_align(input, rois, SCALE, *SIZE, 2)
    torch.testing.assert_close(output, ops.ps_roi_align(input, rois, SIZE, SCALE, 2))


@operators
@dtypes
@pytest.mark.usefixtures("deterministic")
def test_deterministic_backward_repeats_bit_for_bit(dtype, layout, operator):
    input, rois = workload(operator, layout)
    output = operator.forward(input, rois, SCALE, SIZE)
    grad = torch.randn(output.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    arguments = (grad, rois, SCALE, tuple(input.shape), layout is torch.channels_last)
    runs = [operator.backward(*arguments) for _ in range(5)]
    assert all(same_bits(run, runs[0]) for run in runs)
    torch.use_deterministic_algorithms(False)
    assert relative_error(operator.backward(*arguments), runs[0]) < torch.finfo(dtype).eps + 1e-6


@operators
def test_runs_on_the_current_stream(operator):
    input, rois = workload(operator)
    expected = operator.forward(input, rois, SCALE, SIZE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.empty_like(input)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # On another stream the kernel would read `late` before it is filled.
        torch.cuda._sleep(200_000_000)
        late.copy_(input)
        output = operator.forward(late, rois, SCALE, SIZE)
    assert not stream.query()  # the launch did not wait
    stream.synchronize()
    assert same_bits(output, expected)


@ways
def test_cuda_graph_capture_and_replay(way, layout):
    """Of a pyramid: boxes may change their level between replays."""
    maps, rois = detector_pyramid(layout)
    grad = torch.ones(len(rois), 64, *SIZE, device="cuda").contiguous(memory_format=layout)
    sizes = ([height for height, _ in SIZES_4], [width for _, width in SIZES_4])
    shape = (2, 64, *sizes, layout is torch.channels_last)

    def step() -> tuple[Tensor, list[Tensor]]:
        output = cupy_path.multiscale_roi_align(maps, rois, SCALES_4, *RULE, *SIZE, 2, False)
        return output, cupy_path.multiscale_roi_align_backward(grad, rois, SCALES_4, *RULE, 2, False, *shape)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    for seed in range(3):
        for x in maps:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        rois.copy_(ordinary_boxes(1000, 2, 800, 1344, seed=seed).float())
        graph.replay()
        expected_output, expected_gradients = step()
        assert same_bits(output, expected_output)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient, expected) < 1e-6


@ways
def test_does_not_synchronise(way):
    maps, rois = detector_pyramid(torch.channels_last)
    sizes = ([height for height, _ in SIZES_4], [width for _, width in SIZES_4])

    def step() -> None:
        output = cupy_path.multiscale_roi_align(maps, rois, SCALES_4, *RULE, *SIZE, -1, True)
        cupy_path.multiscale_roi_align_backward(output, rois, SCALES_4, *RULE, -1, True, 2, 64, *sizes, True)
        pooled, argmax = cupy_path.multiscale_roi_pool(maps, rois, SCALES_4, *RULE, *SIZE, True)
        cupy_path.multiscale_roi_pool_backward(pooled, rois, argmax, SCALES_4, *RULE, 2, 64, *sizes, True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@operators
def test_threads(operator):
    input, rois = workload(operator)
    expected = operator.forward(input, rois, SCALE, SIZE)
    torch.cuda.synchronize()
    results: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(operator.forward(input, rois, SCALE, SIZE))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(same_bits(result, expected) for result in results)


def test_a_map_of_more_than_31_bits_of_elements():
    """Offsets beyond 2**31 elements, in the last image and, channels_last, within one image."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    for layout, shape in (
        (torch.contiguous_format, (2, 1040, 1024, 1024)),
        (torch.channels_last, (1, 2064, 1024, 1024)),
    ):
        input = torch.zeros(shape, dtype=torch.float16, device="cuda").contiguous(memory_format=layout)
        image, channels, height, width = (extent - 1 for extent in shape)
        input[image, channels, height, width] = 3.0
        rois = torch.tensor([[image, width - 0.5, height - 0.5, width + 0.5, height + 0.5]], device="cuda")
        output = cupy_path.roi_align(input, rois, 1.0, 1, 1, 1, False)  # one sample, on the last cell
        assert output[0, channels].item() == 3.0
        assert output.sum().item() == 3.0
        del input

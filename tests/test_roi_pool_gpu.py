"""The CUDA path of RoIPool on a GPU, against the slow reference and torchvision."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.flat_calls import CUPY as cupy_path
from tests.reference import max_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.comparison import same_bits
from tests.reference.maps import features

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# (N, C, H, W), output size, scale.
CASES = [
    ((2, 8, 25, 42), (7, 7), 1 / 16),
    ((2, 5, 12, 7), (3, 2), 0.25),
    ((1, 64, 6, 6), (2, 5), 1.0),
    ((3, 3, 5, 70), (1, 1), 0.5),
    ((1, 272, 9, 9), (14, 14), 1.0),
]
SIZE, SCALE = (7, 7), 1 / 16


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def boxes_for(shape: tuple[int, int, int, int], scale: float) -> Tensor:
    height, width = shape[2] / scale, shape[3] / scale
    return torch.cat([hostile_boxes(shape[0], height, width), ordinary_boxes(300, shape[0], height, width)])


def is_last(layout: torch.memory_format) -> bool:
    return layout is torch.channels_last


def workload(device: str = "cuda", layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    """A feature map and boxes of a detector's size."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 256, 50, 84, generator=generator)
    rois = ordinary_boxes(512, 2, 800, 1344, seed=1).float()
    return input.to(device).to(memory_format=layout), rois.to(device)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coordinates", [torch.float32, torch.float64], ids=["boxes32", "boxes64"])
@dtypes
def test_forward_and_backward_match_the_reference(dtype, coordinates, layout, case):
    shape, size, scale = case
    input = features(shape, dtype)
    rois = boxes_for(shape, scale).to(coordinates)
    output, positions = max_pool.roi_pool(input.double().numpy(), rois.numpy(), scale, *size)
    expected = torch.from_numpy(output).to(dtype)
    grad = torch.randint(-1, 2, expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    on_gpu = input.cuda().to(memory_format=layout)
    rois = rois.cuda()
    actual, argmax = cupy_path.roi_pool(on_gpu, rois, scale, *size, True)
    assert same_bits(actual, expected)
    assert torch.equal(argmax.cpu().long(), torch.from_numpy(positions))
    assert same_bits(cupy_path.roi_pool(on_gpu, rois, scale, *size, False)[0], expected)

    # Small integers: the sums are exact, whatever their order.
    summed = torch.from_numpy(max_pool.roi_pool_backward(grad.double().numpy(), rois.cpu().numpy(), positions, shape))
    if summed.abs().max() > 256:  # beyond bfloat16's integers
        pytest.fail("the case is too large to be exact")
    for ordered in (False, True):
        torch.use_deterministic_algorithms(ordered)
        try:
            gradient = cupy_path.roi_pool_backward(
                grad.cuda(), rois, argmax, scale, *shape, layout is torch.channels_last
            )
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(gradient.cpu().double(), summed)
        assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.torchvision
def test_matches_torchvision(layout):
    from torchvision import ops

    input, rois = workload(layout=layout)
    # Where a side of a box is 57, 114 or 121 cells, torchvision's float division gives its last bin a cell too many.
    scaled = rois[:, 1:].cpu().double() * SCALE
    cells = scaled.sign() * (scaled.abs() + 0.5).floor()
    sides = (cells[:, 2:] - cells[:, :2] + 1).clamp(min=1)
    rois = rois[~torch.isin(sides, torch.tensor([57.0, 114.0, 121.0]).double()).any(dim=1).cuda()]
    assert len(rois) > 400
    leaf = input.contiguous().requires_grad_()
    expected = ops.roi_pool(leaf, rois, SIZE, SCALE)
    output, argmax = cupy_path.roi_pool(input, rois, SCALE, *SIZE, True)
    assert same_bits(output, expected.detach())
    expected.sum().backward()
    gradient = cupy_path.roi_pool_backward(
        torch.ones_like(output), rois, argmax, SCALE, *input.shape, layout is torch.channels_last
    )
    assert torch.equal(gradient, leaf.grad)


@dtypes
@pytest.mark.usefixtures("deterministic")
def test_deterministic_backward_repeats_bit_for_bit(dtype, layout):
    input, rois = workload(layout=layout)
    _, argmax = cupy_path.roi_pool(input, rois, SCALE, *SIZE, True)
    grad = torch.randn(argmax.shape, device="cuda").to(dtype)
    runs = [cupy_path.roi_pool_backward(grad, rois, argmax, SCALE, *input.shape, is_last(layout)) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    torch.use_deterministic_algorithms(False)
    atomic = cupy_path.roi_pool_backward(grad, rois, argmax, SCALE, *input.shape, is_last(layout))
    torch.testing.assert_close(atomic, runs[0])


def test_runs_on_the_current_stream():
    input, rois = workload()
    expected = cupy_path.roi_pool(input, rois, SCALE, *SIZE, False)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.empty_like(input)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # On another stream the kernel would read `late` before it is filled.
        torch.cuda._sleep(200_000_000)
        late.copy_(input)
        output = cupy_path.roi_pool(late, rois, SCALE, *SIZE, False)[0]
    assert not stream.query()  # the launch did not wait
    stream.synchronize()
    assert same_bits(output, expected)


def test_cuda_graph_capture_and_replay(layout):
    input, rois = workload(layout=layout)
    grad = torch.ones(len(rois), input.shape[1], *SIZE, device="cuda").contiguous(memory_format=layout)

    def step() -> tuple[Tensor, Tensor]:
        output, argmax = cupy_path.roi_pool(input, rois, SCALE, *SIZE, True)
        gradient = cupy_path.roi_pool_backward(grad, rois, argmax, SCALE, *input.shape, is_last(layout))
        return output, gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradient = step()
    for seed in range(3):
        input.copy_(torch.randn(input.shape, generator=torch.Generator().manual_seed(seed)))
        rois.copy_(ordinary_boxes(512, 2, 800, 1344, seed=seed).float())
        graph.replay()
        expected_output, expected_gradient = step()
        assert same_bits(output, expected_output)
        assert torch.equal(gradient, expected_gradient)


def test_threads():
    input, rois = workload()
    expected = cupy_path.roi_pool(input, rois, SCALE, *SIZE, False)[0]
    torch.cuda.synchronize()
    results: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(cupy_path.roi_pool(input, rois, SCALE, *SIZE, False)[0])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(same_bits(result, expected) for result in results)


def test_does_not_synchronise():
    input, rois = workload()
    cupy_path.roi_pool(input, rois, SCALE, *SIZE, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cupy_path.roi_pool(input, rois, SCALE, *SIZE, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    input, rois = workload("cuda:0")
    expected = cupy_path.roi_pool(input, rois, SCALE, *SIZE, False)[0]
    other, other_rois = workload("cuda:1")
    assert torch.cuda.current_device() == 0
    actual = cupy_path.roi_pool(other, other_rois, SCALE, *SIZE, False)[0]
    assert torch.cuda.current_device() == 0
    assert actual.device == other.device
    assert same_bits(actual, expected)


def test_a_map_of_more_than_31_bits_of_elements():
    """Offsets beyond 2**31 elements, in the last image and, channels_last, within one image."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    for layout, shape in (
        (torch.contiguous_format, (2, 1040, 1024, 1024)),
        (torch.channels_last, (1, 2064, 1024, 1024)),
    ):
        input = torch.zeros(shape, dtype=torch.float16, device="cuda").to(memory_format=layout)
        image, channels, height, width = (extent - 1 for extent in shape)
        input[image, channels, height, width] = 3.0
        rois = torch.tensor([[image, width - 3.0, height - 3.0, width, height]], device="cuda")
        output, argmax = cupy_path.roi_pool(input, rois, 1.0, 1, 1, True)
        assert output[0, channels].item() == 3.0
        assert output.sum().item() == 3.0
        assert argmax[0, channels].item() == height * shape[3] + width
        del input

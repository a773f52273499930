"""The package on a GPU through the doors that its users come in by, against the CPU: whatever path a call takes."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import roi
from fpn import FPN18
from roi._backend import cupy_problem
from tests.reference.boxes import ordinary_boxes
from tests.reference.comparison import largest_relative_error, relative_error, unmatched
from tests.reference.random_weights import randomise
from tests.test_roi_transforms import OPS, ROIS, maps_for

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
every_op = pytest.mark.parametrize("name", list(OPS))
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
SIZES = [(40, 56), (20, 28), (10, 14), (5, 7)]

Op = Callable[[list[Tensor], Tensor], Tensor]
PUBLIC: dict[str, Op] = {
    "roi_pool": lambda maps, rois: roi.roi_pool(maps[0], rois, 7, SCALES[0]),
    "roi_align": lambda maps, rois: roi.roi_align(maps[0], rois, 7, SCALES[0], 2, True),
    "roi_align, adaptive": lambda maps, rois: roi.roi_align(maps[0], rois, (3, 5), SCALES[0]),
    "ps_roi_pool": lambda maps, rois: roi.ps_roi_pool(maps[0], rois, 2, SCALES[0]),
    "ps_roi_align": lambda maps, rois: roi.ps_roi_align(maps[0], rois, 2, SCALES[0], 2),
    "multiscale_roi_pool": lambda maps, rois: roi.multiscale_roi_pool(maps, rois, 7, SCALES),
    "multiscale_roi_align": lambda maps, rois: roi.multiscale_roi_align(maps, rois, 7, SCALES, 2),
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions in float32, not in TF32, which cuDNN takes by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


def pyramid(dtype: torch.dtype, layout: torch.memory_format, channels: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, *size, generator=generator) for size in SIZES]
    return [x.to(dtype).contiguous(memory_format=layout) for x in maps]


def test_auto_takes_cupys_kernels() -> None:
    if problem := cupy_problem(DEVICE):
        pytest.skip(problem)
    assert roi.backend_info().cuda == "cupy"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roi.roi_pool(torch.randn(1, 4, 8, 8, device=DEVICE), [torch.tensor([[0.0, 0, 5, 5]], device=DEVICE)], 2)


@pytest.mark.parametrize("name", list(PUBLIC))
@pytest.mark.parametrize("backend", ["auto", "torch", "torchvision"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_output_and_gradients_are_the_cpus(
    dtype: torch.dtype, layout: torch.memory_format, backend: str, name: str
) -> None:
    if backend == "torchvision" and dtype != torch.float32:
        pytest.skip("its operators compute boxes in the features' dtype, and have no bfloat16")
    maps, rois = pyramid(dtype, layout), ordinary_boxes(40, 2, 160, 224, seed=1)
    rois = rois if dtype == torch.float64 else rois.float()  # coordinates are rounded in the dtype of the boxes
    leaves = [x.requires_grad_() for x in maps]
    expected = PUBLIC[name](leaves, rois)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted = torch.autograd.grad(expected, leaves, grad, allow_unused=True)

    roi.set_default_backend(backend)
    try:
        there = [x.detach().to(DEVICE).requires_grad_() for x in maps]
        output = PUBLIC[name](there, rois.to(DEVICE))
        found = torch.autograd.grad(output, there, grad.to(DEVICE), allow_unused=True)
    finally:
        roi.set_default_backend("auto")
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    # torchvision's kernels contract products and sums of coordinates, of up to 56 cells.
    allowed = (1e-5 if backend == "torchvision" else 1e-6) if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    if name in ("roi_pool", "multiscale_roi_pool"):
        assert torch.equal(output.cpu(), expected)
    assert relative_error(output.cpu(), expected.detach()) < allowed
    for actual, of_cpu in zip(found, wanted, strict=True):
        assert (actual is None) == (of_cpu is None)
        if actual is not None:
            assert relative_error(actual.cpu(), of_cpu) < allowed


@pytest.mark.parametrize("name", list(PUBLIC))
def test_no_boxes_and_rows_that_are_rejected(name: str) -> None:
    maps = on_gpu(pyramid(torch.float32, torch.contiguous_format))
    assert PUBLIC[name](maps, torch.zeros(0, 5, device=DEVICE)).shape[0] == 0
    rows = [
        [0.0, 1, 1, 9, 9],
        [7, 1, 1, 9, 9],
        [-1, 1, 1, 9, 9],
        [0, float("nan"), 1, 9, 9],
        [0, 1, 1, float("inf"), 9],
    ]
    output = PUBLIC[name](maps, torch.tensor(rows, device=DEVICE))
    assert output.flatten(1).isnan().all(dim=1).tolist() == [False, True, True, True, True]
    assert not output[0].isnan().any()


# --- torch.compile, torch.export, torch.library


@every_op
def test_opcheck(name: str) -> None:
    """Of every operator that a call and its gradients reach."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, tuple[torch._ops.OpOverload, tuple[object, ...]]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function.namespace == "fpn_roi":
                detached = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach(), args)
                calls.setdefault(str(function), (function, detached))
            return function(*args, **(kwargs or {}))

    leaves = [x.requires_grad_() for x in on_gpu(maps_for(name))]
    with Record():
        output = OPS[name](leaves, ROIS.to(DEVICE))
        grad = torch.ones_like(output, requires_grad=True)
        found = torch.autograd.grad(output, leaves, grad, create_graph=True)
        torch.autograd.grad(sum(x.sum() for x in found), grad)
    assert len(calls) >= 2
    for function, args in calls.values():
        torch.library.opcheck(function, args)


@every_op
def test_compiled(name: str) -> None:
    maps, rois = on_gpu(maps_for(name)), ROIS.to(DEVICE)
    compiled = torch.compile(lambda maps, rois: OPS[name](maps, rois) * 2, fullgraph=True)
    leaves, plain = ([x.clone().requires_grad_() for x in maps] for _ in range(2))
    output, expected = compiled(leaves, rois), OPS[name](plain, rois) * 2
    torch.testing.assert_close(output, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), x) for y, x in ((output, leaves), (expected, plain)))
    for actual, of_eager in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, of_eager)


@every_op
def test_exported(name: str) -> None:
    class Pooler(nn.Module):
        def forward(self, maps: list[Tensor], rois: Tensor) -> Tensor:
            return OPS[name](maps, rois)

    maps, rois = on_gpu(maps_for(name)), ROIS.to(DEVICE)
    program = torch.export.export(Pooler(), (maps, rois))
    torch.testing.assert_close(program.module()(maps, rois), OPS[name](maps, rois))


@every_op
def test_every_derivative(name: str) -> None:
    """Reverse, forward and batched, against differences; and the second derivative."""
    rois = ROIS.to(DEVICE)
    leaves = [x.requires_grad_() for x in on_gpu(maps_for(name))]

    def op(*maps: Tensor) -> Tensor:
        return OPS[name](list(maps), rois)

    # Atomic additions are made in any order.
    tolerance = {"nondet_tol": 1e-9}
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, check_batched_grad=True, **tolerance)
    assert torch.autograd.gradgradcheck(op, leaves, **tolerance)


@every_op
def test_vmap(name: str) -> None:
    batches, rois = on_gpu(maps_for(name, 3)), ROIS.to(DEVICE)
    actual = torch.func.vmap(lambda *maps: OPS[name](list(maps), rois))(*batches)
    expected = [OPS[name]([x[i] for x in batches], rois) for i in range(3)]
    torch.testing.assert_close(actual, torch.stack(expected))


# --- whole models


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_backbone_is_the_cpus(layout: torch.memory_format, fused: bool) -> None:
    model = randomise(FPN18(extra="maxpool")).eval()
    images = torch.randn(2, 3, 96, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        model = (model.fuse() if fused else model).to(DEVICE, memory_format=layout)
        levels = model(images.to(DEVICE, memory_format=layout))
        with torch.autocast(DEVICE, torch.bfloat16):
            rough = model(images.to(DEVICE))
    assert largest_relative_error([x.cpu() for x in levels], expected) < 1e-4
    assert largest_relative_error([x.float().cpu() for x in rough], expected) < 5e-2


def test_a_compiled_backbone_with_its_pooler() -> None:
    torch.manual_seed(0)
    model, pooler = randomise(FPN18()).eval().to(DEVICE), roi.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)

    def features(images: Tensor, boxes: Tensor) -> Tensor:
        return pooler(dict(zip("0123", model(images), strict=True)), [boxes], [(96, 128)])

    images = torch.randn(1, 3, 96, 128, device=DEVICE)
    boxes = torch.tensor([[8.0, 8, 90, 70], [1, 0, 127, 95]], device=DEVICE)
    with torch.no_grad():
        expected = features(images, boxes)
        assert relative_error(torch.compile(features)(images, boxes), expected) < 1e-4


def test_a_training_step_learns() -> None:
    """Forward, pooling, backward and a step, with gradients that are the CPU's."""
    torch.manual_seed(0)
    model = randomise(FPN18(trunk={"norm_layer": nn.BatchNorm2d})).train()
    there = copy.deepcopy(model).to(DEVICE)
    images, rois = torch.randn(2, 3, 96, 128), ordinary_boxes(20, 2, 96, 128, seed=3).float()
    losses = []
    for network, device in ((model, "cpu"), (there, DEVICE)):
        levels = network(images.to(device))
        pooled = roi.multiscale_roi_align(levels, rois.to(device), 7, SCALES, 2)
        loss = pooled.square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    gradients = [[p.grad.cpu() for p in network.parameters()] for network in (model, there)]
    assert largest_relative_error(gradients[1], gradients[0]) < 1e-2


@pytest.mark.torchvision
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN"])
def test_detections_of_an_accelerated_detector(name: str, fuse: bool) -> None:
    from fpn.detection import accelerate
    from tests.test_detection import output_of, photos, random_detector

    detector = random_detector(name).to(DEVICE)
    original = copy.deepcopy(detector)
    accelerate(detector, fuse=fuse)
    images = on_gpu(photos())
    for found, expected in zip(output_of(detector, images), output_of(original, images), strict=True):
        found, expected = ({key: value.cpu() for key, value in one.items()} for one in (found, expected))
        assert len(found["boxes"]) == len(expected["boxes"]) >= 20
        assert unmatched(found, expected) == unmatched(expected, found) == 0


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fpn", "--device", DEVICE, "--model", "FPN18", "--out", str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert DEVICE in done.stdout
    assert (tmp_path / "pyramid.png").stat().st_size > 10_000

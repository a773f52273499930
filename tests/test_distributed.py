"""Training in several processes: DistributedDataParallel, SyncBatchNorm and FSDP2, against one process.

Each process of a test is started anew and meets the others at a file; on the CPU they talk through gloo.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from fpn import FPN, FPN18, FPN101
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import Bottleneck
from roi import multiscale_roi_align, multiscale_roi_pool
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

PROCESSES = 2
IMAGES = 4  # of the joint batch
SIDE = 64

Gradients = dict[str, Tensor]


class Pooled(nn.Module):
    """A backbone and both poolers on it: one loss per RoI, of which every image has two."""

    def __init__(self, fpn: FPN) -> None:
        super().__init__()
        self.fpn = fpn

    def forward(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        levels = self.fpn(images)
        scales = [1 / stride for stride in self.fpn.strides]
        aligned = multiscale_roi_align(levels, boxes, 3, scales, 2, canonical_scale=32)
        pooled = multiscale_roi_pool(levels, boxes, 3, scales, canonical_scale=32)
        return (aligned.square() + pooled.square()).mean(dim=(1, 2, 3))


def batch(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator, dtype=dtype)
    corners = torch.rand(IMAGES, 2, 2, generator=generator, dtype=dtype) * SIDE / 2
    sizes = 2 + torch.rand(IMAGES, 2, 2, generator=generator, dtype=dtype) * SIDE / 2
    return images.to(device), list(torch.cat([corners, corners + sizes], dim=2).to(device))


def share(rank: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    images, boxes = batch(dtype, device)
    return images[rank::PROCESSES], boxes[rank::PROCESSES]


def gradients(model: nn.Module) -> Gradients:
    """Of all parameters, whole where they are sharded; DDP's prefix is left out."""
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in named.values())
    return {name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu() for name, grad in named.items()}


def in_processes(worker: Callable[..., Any], folder: Path, *arguments: Any, backend: str = "gloo") -> Any:
    """What `worker(rank, *arguments)` returns in process 0 of a group."""
    multiprocessing.spawn(join, (worker, str(folder), backend, arguments), nprocs=PROCESSES)
    return torch.load(folder / "result.pt", weights_only=True)


def join(rank: int, worker: Callable[..., Any], folder: str, backend: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    try:
        result = worker(rank, *arguments)
        if rank == 0:
            torch.save(result, f"{folder}/result.pt")
    finally:
        distributed.destroy_process_group()


# torch's SyncBatchNorm does not run on the CPU: there, the norms are those that do not mix the images of a batch.
NORMS: dict[str, Any] = {"group norm": nn.GroupNorm, "frozen": FrozenBatchNorm2d}


def pooled_fpn18(norm: Any, dtype: torch.dtype = torch.float64) -> Pooled:
    torch.manual_seed(0)
    fpn = FPN18(trunk={"norm_layer": norm}, out_channels=32, upsample="nearest", smooth_top=True)
    return Pooled(randomise(fpn)).to(dtype)


def ddp_worker(rank: int, norm: str) -> Gradients:
    model = DistributedDataParallel(pooled_fpn18(NORMS[norm]))
    model(*share(rank, torch.float64)).mean().backward()
    return gradients(model)


@pytest.mark.parametrize("norm", list(NORMS))
def test_ddp_gives_the_gradients_of_one_process(norm: str, tmp_path: Path) -> None:
    model = pooled_fpn18(NORMS[norm])
    model(*batch(torch.float64)).mean().backward()
    expected = gradients(model)
    actual = in_processes(ddp_worker, tmp_path, norm)
    assert actual.keys() == expected.keys()
    # float64: what differs is the order of sums.
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 1e-10


def sync_batchnorm_worker(rank: int) -> Gradients:
    device = f"cuda:{rank}"
    torch.cuda.set_device(device)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(pooled_fpn18(nn.BatchNorm2d)).to(device)
    model = DistributedDataParallel(model, [device])
    model(*share(rank, torch.float64, device)).mean().backward()
    return gradients(model)


@pytest.mark.gpu
def test_sync_batchnorm_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    if torch.cuda.device_count() < PROCESSES:
        pytest.skip(f"needs {PROCESSES} CUDA devices")
    model = pooled_fpn18(nn.BatchNorm2d).cuda()
    model(*batch(torch.float64, "cuda")).mean().backward()
    expected = gradients(model)
    actual = in_processes(sync_batchnorm_worker, tmp_path, backend="nccl")
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 1e-8


def test_converted_to_sync_batchnorm_a_model_keeps_its_state_and_its_outputs() -> None:
    model = FPN18()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(FPN18()))
    model.load_state_dict(converted.state_dict())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 20
    images, _ = batch(torch.float32)
    for actual, expected in zip(converted.eval()(images), model.eval()(images), strict=True):
        assert torch.equal(actual, expected)


def pooled_fpn101() -> Pooled:
    torch.manual_seed(0)
    return Pooled(randomise(FPN101(trunk={"norm_layer": FrozenBatchNorm2d}))).double()


def fsdp_worker(rank: int) -> tuple[Tensor, Gradients, int]:
    from torch.distributed.fsdp import fully_shard

    model = pooled_fpn101()
    mesh = distributed.init_device_mesh("cpu", (PROCESSES,))
    for module in list(model.modules()):
        if isinstance(module, Bottleneck):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    losses = model(*share(rank, torch.float64))
    losses.mean().backward()
    return losses.detach(), gradients(model), held


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 does not run on the CPU")
def test_fsdp2_wraps_fpn101(tmp_path: Path) -> None:
    model = pooled_fpn101()
    losses = model(*batch(torch.float64))
    losses.mean().backward()
    expected = gradients(model)
    actual_losses, actual, held = in_processes(fsdp_worker, tmp_path)
    assert relative_error(actual_losses, losses.view(IMAGES, -1)[::PROCESSES].flatten()) < 1e-12
    assert actual.keys() == expected.keys()
    # float64 through 101 layers: what differs is the order of sums.
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 1e-9
    # Each process holds its share of the parameters, give or take the rows that do not divide.
    total = sum(parameter.numel() for parameter in model.parameters())
    assert held == pytest.approx(total / PROCESSES, rel=0.01)

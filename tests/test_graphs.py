"""CUDA graphs of the backbone, alone and with pooling behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpn import FPN18
from fpn.graphs import capture
from roi import roi_pool
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["model", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replay_of_the_backbone(fused: bool, dtype: torch.dtype) -> None:
    model = randomise(FPN18()).eval().cuda().to(dtype)
    model = model.fuse() if fused else model
    replay = capture(model, torch.zeros(2, 3, 96, 128, dtype=dtype, device="cuda"))
    with torch.no_grad():
        for _ in range(3):
            images = torch.randn(2, 3, 96, 128, dtype=dtype, device="cuda")
            for level, expected in zip(replay(images), model(images), strict=True):
                assert relative_error(level, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
def test_replay_of_the_backbone_and_pooling() -> None:
    model = randomise(FPN18()).eval().cuda().fuse()

    def pooled(images: Tensor, rois: Tensor) -> list[Tensor]:
        levels = model(images)
        return [roi_pool(p, rois, 7, spatial_scale=1 / s) for p, s in zip(levels, model.strides, strict=True)]

    rois = torch.tensor([[0.0, 8, 8, 90, 70], [1.0, 0, 0, 127, 95]], device="cuda")
    replay = capture(pooled, torch.zeros(2, 3, 96, 128, device="cuda"), rois)
    for shift in (0, 4, 9):
        images, moved = torch.randn(2, 3, 96, 128, device="cuda"), rois + rois.new_tensor([0, shift, 0, shift, 0])
        with torch.no_grad():
            for output, expected in zip(replay(images, moved), pooled(images, moved), strict=True):
                assert relative_error(output, expected) < 1e-5


@pytest.mark.gpu
def test_other_inputs_than_recorded_are_refused() -> None:
    replay = capture(FPN18().eval().cuda(), torch.zeros(2, 3, 64, 64, device="cuda"))
    for images in (torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64).half().cuda()):
        with pytest.raises(ValueError, match="inputs must be as recorded"):
            replay(images)
    with pytest.raises(ValueError, match="inputs must be as recorded"):
        replay()


@pytest.mark.parametrize("inputs", [[], [torch.zeros(1, 3, 64, 64)]], ids=["none", "cpu"])
def test_inputs_that_are_not_on_a_gpu_are_refused(inputs: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="inputs must be tensors on one CUDA device"):
        capture(FPN18().eval(), *inputs)

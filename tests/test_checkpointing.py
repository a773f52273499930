"""Activation checkpointing: the same training step with less kept for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpn import FPN, FPN18
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import Bottleneck, ResNet
from tests.comparison import randomise

ALL = (True, True, True, True)


def small_fpn(**trunk: Any) -> FPN:
    torch.manual_seed(0)
    return randomise(FPN(ResNet(Bottleneck, (2, 2, 1, 1), **trunk), out_channels=32))


def step(model: FPN, images: Tensor) -> int:
    """One forward and backward pass; returns the bytes that autograd kept in between, each memory counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(level.square().mean() for level in model(images))
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("stages", [ALL, (True, False, True, False)])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        lambda channels: nn.BatchNorm2d(channels, momentum=None),
        lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
        FrozenBatchNorm2d,
        nn.GroupNorm,
    ],
    ids=["batch norm", "cumulative", "no statistics", "frozen", "group norm"],
)
def test_same_gradients_and_statistics(norm: Any, stages: tuple[bool, ...]) -> None:
    plain = small_fpn(norm_layer=norm)
    model = copy.deepcopy(plain)
    model.bottom_up.checkpoint_stages = stages
    for seed in (1, 2):
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        kept, plain_kept = step(model, images), step(plain, images)
        assert kept < (0.9 if stages == ALL else 1) * plain_kept
    for (name, ours), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)
    for (name, ours), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, expected), name
    momenta = [[m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in (model, plain)]
    assert momenta[0] == momenta[1]


def test_statistics_move_once() -> None:
    """Of one step with one batch: mean · 0.9 + batch mean · 0.1."""
    model = FPN18(trunk={"checkpoint_stages": ALL}, out_channels=8)
    norm = model.bottom_up.layer1[0].bn1
    inputs: list[Tensor] = []
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    step(model, torch.randn(2, 3, 64, 64))
    assert len(inputs) == 2  # forward, and again in the backward pass
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs[0].mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_the_images_and_eval_mode(training: bool) -> None:
    plain = small_fpn().train(training)
    model = copy.deepcopy(plain)
    model.bottom_up.checkpoint_stages = ALL
    gradients = []
    for network in (model, plain):
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        step(network, images)
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_autocast() -> None:
    plain = small_fpn()
    model = copy.deepcopy(plain)
    model.bottom_up.checkpoint_stages = ALL
    images = torch.randn(2, 3, 64, 64)
    for network in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(level.float().square().mean() for level in network(images))
        loss.backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-2, atol=1e-3)


def test_an_error_in_the_recomputation_leaves_batch_norm_as_it_was() -> None:
    model = small_fpn(checkpoint_stages=ALL)
    norm = model.bottom_up.layer1[0].bn3
    loss = sum(level.mean() for level in model(torch.randn(2, 3, 64, 64)))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 1
    assert "num_batches_tracked" in norm.state_dict()


def test_inference_recomputes_nothing() -> None:
    model = small_fpn(checkpoint_stages=ALL).eval()
    calls: list[nn.Module] = []
    model.bottom_up.layer1[0].register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


def test_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"checkpoint_stages must be four booleans \(C2, C3, C4, C5\)"):
        small_fpn(checkpoint_stages=(True, True))

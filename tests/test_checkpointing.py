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
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

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


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.module(x)


def with_dropout(model: FPN) -> None:
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.relu = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))


def with_spectral_norm(model: FPN) -> None:
    nn.utils.parametrizations.spectral_norm(model.bottom_up.layer1[0].conv2)


def with_synchronised_norm(model: FPN) -> None:
    model.bottom_up = nn.SyncBatchNorm.convert_sync_batchnorm(model.bottom_up)


def with_a_wrapped_stage(model: FPN) -> None:
    model.bottom_up.layer2 = Wrapped(model.bottom_up.layer2)


def with_a_block_twice(model: FPN) -> None:
    model.bottom_up.layer1.append(model.bottom_up.layer1[1])


def with_a_compiled_stage(model: FPN) -> None:
    model.bottom_up.layer2 = torch.compile(model.bottom_up.layer2, backend="aot_eager")


def with_a_compiled_block(model: FPN) -> None:
    model.bottom_up.layer2[0] = torch.compile(model.bottom_up.layer2[0], backend="aot_eager")


def with_a_hooked_stage(model: FPN) -> None:
    model.bottom_up.layer2.register_forward_hook(lambda module, inputs, output: 2 * output)


def compared(plain: FPN, model: FPN, call: Any, backwards: int = 1) -> None:
    """A training step of each with the same random numbers: gradients, buffers, and where the generator then stands."""
    images, random = torch.randn(2, 3, 64, 64), []
    for network in (plain, call):
        torch.manual_seed(0)
        loss = sum(level.square().mean() for level in network(images))
        for time in range(backwards):
            loss.backward(retain_graph=time < backwards - 1)
        random.append(torch.rand(1))
    assert torch.equal(*random)
    for (name, ours), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, expected.grad) < 1e-4, name  # a compiler adds in another order
    for (name, ours), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize(
    ("change", "compiled"),
    [
        (with_dropout, None),
        (with_spectral_norm, None),
        (with_synchronised_norm, None),
        (with_a_wrapped_stage, None),
        (with_a_block_twice, None),
        (with_a_hooked_stage, None),
        (None, with_a_compiled_stage),
        (None, with_a_compiled_block),
    ],
)
def test_whatever_the_blocks_hold(change: Any, compiled: Any, backwards: int) -> None:
    if compiled is not None and backwards == 2:
        pytest.skip("torch.compile frees what it keeps after one backward pass")
    plain = small_fpn()
    if change is not None:
        change(plain)
    model = copy.deepcopy(plain)
    model.bottom_up.checkpoint_stages = ALL
    if compiled is not None:
        torch._dynamo.reset()
        compiled(model)
    compared(plain, model, model, backwards)


@pytest.mark.parametrize("change", [None, with_synchronised_norm, with_spectral_norm, with_a_wrapped_stage])
def test_under_a_compiler(change: Any) -> None:
    torch._dynamo.reset()
    plain = small_fpn()
    if change is not None:
        change(plain)
    model = copy.deepcopy(plain)
    model.bottom_up.checkpoint_stages = ALL
    compared(plain, model, torch.compile(model, backend="aot_eager"))


def test_the_report_of_what_is_computed_again() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = small_fpn(checkpoint_stages=(True, True, True, False))
    with_a_wrapped_stage(model)
    model.bottom_up.layer3 = checkpoint_wrapper(model.bottom_up.layer3)
    changes = model.bottom_up.checkpointing
    assert changes.replaced["layer1"] == "computed again block by block"
    assert "as a whole: it is tests.test_checkpointing.Wrapped" in changes.replaced["layer2"]
    assert "CheckpointWrapper" in changes.left["layer3"]
    assert "layer4" not in {**changes.replaced, **changes.left}
    with pytest.warns(UserWarning, match="a stage is not checkpointed: there is a .*CheckpointWrapper in it"):
        model(torch.randn(1, 3, 64, 64))


def test_transforms_and_exports_take_the_plain_stage() -> None:
    model = small_fpn(checkpoint_stages=ALL).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.func.grad(lambda x: model(x)[0].sum())(images).shape == images.shape
    torch.export.export(model, (images,), strict=False)

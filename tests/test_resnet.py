from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fpn import resnet
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import BasicBlock, Bottleneck, ResNet, ResNetClassifier, build
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def torchvision_maps(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a torchvision ResNet, and C2–C5, taken by hooks on the way."""
    maps: list[torch.Tensor] = []
    hooks = [
        getattr(model, f"layer{i}").register_forward_hook(lambda module, args, output: maps.append(output))
        for i in (1, 2, 3, 4)
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, maps


@pytest.mark.torchvision
@pytest.mark.parametrize("name", resnet.VARIANTS)
def test_variant_computes_what_torchvision_computes(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    theirs = randomise(getattr(torchvision.models, name)())
    state = theirs.state_dict()
    with torch.device("meta"):  # no second and third initialisation of 100 million weights
        classifier, trunk = build(ResNetClassifier, name), getattr(resnet, name)()
    assert list(classifier.state_dict()) == list(state)
    # The tensors themselves are shared, so the running statistics are too.
    classifier.load_state_dict(state, assign=True)
    trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")}, assign=True)
    statistics = {k: v for k, v in state.items() if "running" in k}
    before = {k: v.clone() for k, v in statistics.items()}

    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        for training in (False, True):
            moved = []
            outputs = []
            for model in (theirs, classifier, trunk):
                for key, value in statistics.items():
                    value.copy_(before[key])
                model.train(training)
                outputs.append(torchvision_maps(model, images) if model is theirs else model(images))
                moved.append({k: v.clone() for k, v in statistics.items()})
            (logits, maps), our_logits, our_maps = outputs
            assert relative_error(our_logits, logits) < 1e-5
            for ours, expected in zip(our_maps, maps, strict=True):
                assert relative_error(ours, expected) < 1e-5
            for key in statistics:
                assert torch.equal(moved[0][key], before[key]) != training
                assert relative_error(moved[1][key], moved[0][key]) < 1e-5
                assert relative_error(moved[2][key], moved[0][key]) < 1e-5


@pytest.mark.torchvision
@MODES
@pytest.mark.parametrize(
    "dilated", [(False, False, True), (False, True, True), (True, True, True), (True, False, True)]
)
def test_dilation_is_torchvisions(dilated: tuple[bool, bool, bool], training: bool) -> None:
    import torchvision

    theirs = randomise(torchvision.models.resnet50(replace_stride_with_dilation=list(dilated))).train(training)
    ours = build(ResNetClassifier, "resnet50", replace_stride_with_dilation=dilated).train(training)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-5
    trunk = resnet.resnet50(replace_stride_with_dilation=dilated)
    assert [tuple(c.shape[2:]) for c in trunk(images)] == [(-(-70 // s), -(-90 // s)) for s in trunk.strides]


@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FrozenBatchNorm2d, "torchvision.ops.FrozenBatchNorm2d"),
        (nn.GroupNorm, partial(nn.GroupNorm, 32)),
        (nn.SyncBatchNorm, nn.BatchNorm2d),  # one process: the same statistics
    ],
)
def test_norm_layers(ours: type[nn.Module], theirs: object) -> None:
    import torchvision

    if isinstance(theirs, str):
        theirs = torchvision.ops.FrozenBatchNorm2d
    reference = randomise(torchvision.models.resnet50(norm_layer=theirs)).eval()
    model = build(ResNetClassifier, "resnet50", norm_layer=ours).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(model(images), reference(images)) < 1e-5


@pytest.mark.torchvision
def test_stride_in_1x1_moves_the_stride_and_nothing_else() -> None:
    import torchvision

    theirs = randomise(torchvision.models.resnet50()).eval()
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    ours = build(ResNetClassifier, "resnet50", stride_in_1x1=True).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 75, 61)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-5


def test_resnet18_layer_table() -> None:
    """He et al. 2015, table 1, 18-layer column: output sizes at 224×224 and the parameters of each stage."""
    trunk = resnet.resnet18()
    images = torch.randn(1, 3, 224, 224)
    assert [tuple(c.shape) for c in trunk(images)] == [
        (1, 64, 56, 56),
        (1, 128, 28, 28),
        (1, 256, 14, 14),
        (1, 512, 7, 7),
    ]
    parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in trunk.named_children()}
    assert {name: count for name, count in parameters.items() if count} == {
        "conv1": 9_408,
        "bn1": 128,
        "layer1": 147_968,
        "layer2": 525_568,
        "layer3": 2_099_712,
        "layer4": 8_393_728,
    }
    assert sum(parameters.values()) == 11_176_512


@pytest.mark.parametrize("in_channels", [1, 4, 13])
def test_in_channels(in_channels: int) -> None:
    trunk = resnet.resnet18(in_channels=in_channels)
    assert trunk(torch.randn(2, in_channels, 32, 32))[-1].shape == (2, 512, 1, 1)
    with pytest.raises(ValueError, match=rf"Tensor\[N, {in_channels}, H, W\]"):
        trunk(torch.randn(2, in_channels + 1, 32, 32))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_zero_init_residual_starts_blocks_as_the_identity(block: type[BasicBlock] | type[Bottleneck]) -> None:
    trunk = ResNet(block, (1, 2, 1, 1), zero_init_residual=True)
    second = trunk.layer2[1]
    x = torch.rand(1, 128 * block.expansion, 9, 9)  # not negative, so that the ReLU changes nothing
    assert torch.equal(second.eval()(x), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNet(BasicBlock, (2, 2, 2, 2), groups=2),
        lambda: ResNet(BasicBlock, (2, 2, 2, 2), width_per_group=128),
        lambda: ResNet(BasicBlock, (2, 2, 2, 2), stride_in_1x1=True),
        lambda: ResNet(BasicBlock, (2, 2, 2, 2), replace_stride_with_dilation=(False, False, True)),
        lambda: ResNet(Bottleneck, (3, 4, 6)),
        lambda: ResNet(Bottleneck, (3, 4, 0, 3)),
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), replace_stride_with_dilation=(True,)),
        lambda: build(ResNet, "resnet51"),
    ],
)
def test_options_that_do_not_fit(make) -> None:
    with pytest.raises(ValueError, match=r"BasicBlock|layers|replace_stride|unknown ResNet"):
        make()


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(3, 32, 32), ValueError),
        (torch.zeros(1, 1, 3, 32, 32), ValueError),
        (torch.zeros(1, 1, 32, 32), ValueError),
        (torch.zeros(1, 3, 0, 32), ValueError),
        (torch.zeros(1, 3, 32, 0), ValueError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), TypeError),
        ([[1.0]], TypeError),
        (None, TypeError),
    ],
)
def test_bad_images(images: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="images must be"):
        resnet.resnet18()(images)


@MODES
def test_empty_batch_gives_empty_maps_and_leaves_the_statistics(training: bool) -> None:
    trunk = resnet.resnet18().train(training)
    before = {key: value.clone() for key, value in trunk.state_dict().items() if "running" in key}
    assert [tuple(c.shape) for c in trunk(torch.zeros(0, 3, 33, 65))] == [
        (0, 64, 9, 17),
        (0, 128, 5, 9),
        (0, 256, 3, 5),
        (0, 512, 2, 3),
    ]
    for key, value in before.items():
        assert torch.equal(trunk.state_dict()[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_batch_norm_is_batch_norm_in_eval_mode(norm: type[nn.BatchNorm2d], dtype: torch.dtype) -> None:
    layer = randomise(norm(7)).to(dtype).eval()
    frozen = FrozenBatchNorm2d.from_batch_norm(layer)
    x = torch.randn(3, 7, 5, 4, dtype=dtype)
    assert torch.equal(frozen.train()(x), layer(x))
    loaded = FrozenBatchNorm2d(7).to(dtype)
    loaded.load_state_dict(layer.state_dict())  # strict, with the counter that a frozen layer lacks
    assert torch.equal(loaded(x), layer(x))
    assert not list(frozen.parameters())
    back = norm(7)
    back.load_state_dict(frozen.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frozen_batch_norm_with_a_gradient(dtype: torch.dtype) -> None:
    """The other branch: the same values, the gradient of batch norm, x's dtype kept, and x itself not kept alive."""
    layer = randomise(nn.BatchNorm2d(7)).double().eval()
    frozen = FrozenBatchNorm2d.from_batch_norm(layer).to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(3, 7, 5, 4, dtype=torch.float64).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = frozen(x)
    assert y.dtype == dtype
    assert max(saved, default=0) < x.numel()
    grad = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    y.backward(grad)
    layer(wide).backward(grad.double())
    tolerance = 4 * torch.finfo(dtype).eps
    assert relative_error(y, layer(wide)) < tolerance
    assert relative_error(x.grad, wide.grad) < tolerance


def test_frozen_batch_norm_needs_statistics() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        FrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(3, track_running_stats=False))


def test_channels_last_is_kept_through_the_trunk() -> None:
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    trunk = resnet.resnet50().to(memory_format=torch.channels_last).eval()
    for c in trunk(images):
        assert c.is_contiguous(memory_format=torch.channels_last)

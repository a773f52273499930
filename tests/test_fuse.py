"""The fused model beside the model that it was made from."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpn import FPN, FPN18, FPN50
from fpn.inference import fused_conv
from fpn.inference.fused_conv import FusedConv2d
from fpn.norm import FrozenBatchNorm2d
from tests.reference.comparison import largest_relative_error, relative_error
from tests.reference.random_weights import randomise

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"trunk": {"norm_layer": FrozenBatchNorm2d}, "neck_norm_layer": FrozenBatchNorm2d, "smooth_top": True},
    "neck": {"neck_norm_layer": nn.BatchNorm2d, "upsample": "nearest", "smooth_top": True, "extra": "maxpool"},
    "sync": {"trunk": {"norm_layer": nn.SyncBatchNorm}, "neck_norm_layer": nn.SyncBatchNorm, "extra": "p6p7"},
    "partly frozen": {"trainable_layers": 2, "extra": "p6p7_on_p5"},
    "group norm in the neck": {"neck_norm_layer": nn.GroupNorm},
    "group norm in the trunk": {"trunk": {"norm_layer": nn.GroupNorm}},
}


def random_fpn(build: Any = FPN18, **options: Any) -> FPN:
    """In eval mode, with random norms and biases, so that nothing can be left out unseen."""
    torch.manual_seed(0)
    model: FPN = randomise(build(**options)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.1)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "running_var")]


@pytest.fixture(params=[True, False], ids=["one pass", "plain operators"])
def one_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN's operators with an addition and a ReLU in them are used where they work, or never."""
    if not request.param:
        monkeypatch.setattr(fused_conv, "one_pass_works", lambda dtype: False)
    return bool(request.param)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(1, 40), (97, 66)])
@pytest.mark.usefixtures("one_pass")
def test_same_outputs(options: str, size: tuple[int, int]) -> None:
    model = random_fpn(**OPTIONS[options])
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(images)
        for layout in (torch.contiguous_format, torch.channels_last):
            levels = model.fuse()(images.contiguous(memory_format=layout))
            assert largest_relative_error(levels, expected) < 1e-5
            assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)


@pytest.mark.usefixtures("one_pass")
def test_same_outputs_of_resnet50() -> None:
    model = random_fpn(FPN50, upsample="nearest", smooth_top=True)
    images = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        assert largest_relative_error(model.fuse()(images), model(images)) < 1e-4


@pytest.mark.parametrize(
    "trunk",
    [
        {"groups": 32, "width_per_group": 4},
        {"stride_in_1x1": True},
        {"replace_stride_with_dilation": (False, True, True)},
        {"in_channels": 1, "width_per_group": 128},
    ],
    ids=lambda trunk: next(iter(trunk)),
)
@pytest.mark.usefixtures("one_pass")
def test_same_outputs_of_other_bottlenecks(trunk: dict[str, Any]) -> None:
    from fpn.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    model = randomise(FPN(ResNet(Bottleneck, (1, 2, 1, 1), **trunk), out_channels=32)).eval()
    images = torch.randn(1, trunk.get("in_channels", 3), 70, 64)
    with torch.no_grad():
        assert largest_relative_error(model.fuse()(images), model(images)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (64, 96)])
@pytest.mark.usefixtures("one_pass")
def test_dtype_is_kept(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Fused, a model rounds less often than before: its error against float64 is no larger than of old."""
    model = random_fpn(neck_norm_layer=nn.BatchNorm2d, extra="p6p7").to(dtype)
    fused = model.fuse()
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    images = torch.randn(2, 3, *size, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        levels = fused(images)
        assert {level.dtype for level in levels} == {dtype}
        error = largest_relative_error(model(images), expected)
        assert error < 8 * torch.finfo(dtype).eps  # some twenty layers, each rounded
        assert largest_relative_error(levels, expected) < 1.2 * error + 1e-14


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_device_is_kept(options: str) -> None:
    model = random_fpn(**OPTIONS[options]).cuda()
    fused = model.fuse()
    assert {parameter.device.type for parameter in fused.parameters()} == {"cuda"}
    images = torch.randn(2, 3, 64, 96, device="cuda")
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        levels = fused(images)
        assert largest_relative_error(levels, model(images)) < 1e-4
    if options != "group norm in the neck":  # PyTorch's GroupNorm gives contiguous maps there
        assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)


@pytest.mark.usefixtures("one_pass")
def test_autocast() -> None:
    model = random_fpn(extra="maxpool")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            expected, levels = model(images), model.fuse()(images)
    assert [level.dtype for level in levels] == [level.dtype for level in expected]
    assert largest_relative_error(levels, exact) < 1.2 * largest_relative_error(expected, exact)


def test_empty_batch() -> None:
    assert [tuple(level.shape) for level in random_fpn().fuse()(torch.randn(0, 3, 40, 33))] == [
        (0, 256, 10, 9), (0, 256, 5, 5), (0, 256, 3, 3), (0, 256, 2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("options", ["plain", "frozen", "neck", "sync", "partly frozen"])
def test_no_batch_norm_is_left(options: str) -> None:
    model = random_fpn(**OPTIONS[options])
    assert norms(model)
    assert not norms(model.fuse())


@pytest.mark.torchvision
def test_torchvisions_frozen_batch_norm_is_folded() -> None:
    from torchvision.ops import FrozenBatchNorm2d as TheirFrozenBatchNorm2d

    model = random_fpn(trunk={"norm_layer": TheirFrozenBatchNorm2d})
    fused = model.fuse()
    assert not norms(fused)
    images = torch.randn(1, 3, 64, 64)
    assert largest_relative_error(fused(images), model(images)) < 1e-5


def test_batch_norm_without_statistics_or_scale() -> None:
    """Without running statistics there is nothing to fold; without scale and shift there is."""

    def layer(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, affine=channels == 64, track_running_stats=channels <= 128)

    model = random_fpn(trunk={"norm_layer": layer})
    fused = model.fuse()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert largest_relative_error(fused(images), model(images)) < 1e-5
    assert {norm.num_features for norm in norms(fused)} == {256, 512}


def test_a_block_of_another_class_stays() -> None:
    from fpn.resnet import BasicBlock

    class Scaled(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    model = random_fpn()
    model.bottom_up.layer2[1].__class__ = Scaled
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert largest_relative_error(model.fuse()(images), model(images)) < 1e-5


def test_the_model_stays_as_it_was_and_its_checkpoint_loads_into_a_twin() -> None:
    model = random_fpn(neck_norm_layer=nn.BatchNorm2d, trainable_layers=3)
    before = copy.deepcopy(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    images = torch.randn(1, 3, 64, 64)
    levels = model(images)
    fused = model.fuse()
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert isinstance(fused, FPN)
    assert (fused.out_channels, fused.strides) == (model.out_channels, model.strides)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin = FPN18(neck_norm_layer=nn.BatchNorm2d, trainable_layers=3).eval()
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twin(images), levels, strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict(before)


def test_fusing_twice_is_fusing_once() -> None:
    fused = random_fpn(neck_norm_layer=nn.BatchNorm2d).fuse()
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(fused.fuse()(images), fused(images), strict=True))


def test_training_mode_is_refused() -> None:
    model = FPN18()
    with pytest.raises(ValueError, match=r"the model is in training mode; call eval\(\) first"):
        model.fuse()
    model.eval().bottom_up.layer3[1].bn2.train()
    with pytest.raises(ValueError, match=r"bottom_up\.layer3\.1\.bn2 is in training mode"):
        model.fuse()


@pytest.mark.usefixtures("one_pass")
def test_gradient_of_the_images() -> None:
    """As saliency maps need it; the weights take none."""
    model = random_fpn().double()
    gradients = []
    for network in (model, model.fuse()):
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        sum(level.square().sum() for level in network(images)).backward()
        gradients.append(images.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-10


def test_gradient_of_weights_that_are_made_to_take_one() -> None:
    fused = random_fpn().fuse().requires_grad_()
    sum(level.mean() for level in fused(torch.randn(1, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_weights_and_images_of_different_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="type"):
        random_fpn().to(torch.bfloat16).fuse()(torch.randn(1, 3, 64, 64))


def test_images_are_not_overwritten() -> None:
    images = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    fused = random_fpn().fuse()
    levels = fused(images)
    again = fused(images)
    assert torch.equal(images, before)
    assert all(torch.equal(a, b) for a, b in zip(levels, again, strict=True))


def test_trunk_maps_are_not_overwritten_by_later_stages() -> None:
    """C2 to C5 are what the neck, and a user's hook, read after the stages above have run."""
    model = random_fpn()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert largest_relative_error(model.fuse().bottom_up(images), model.bottom_up(images)) < 1e-5


def test_any_trunk_gets_channels_last_and_a_fused_neck() -> None:
    timm = pytest.importorskip("timm")
    trunk = timm.create_model("mobilenetv3_small_050", features_only=True, pretrained=False, out_indices=(1, 2, 3))
    model = random_fpn(lambda: FPN(trunk, out_channels=32, norm_layer=nn.BatchNorm2d))
    fused = model.fuse()
    assert not norms(fused.lateral)
    assert not norms(fused.smooth)
    images = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        levels = fused(images)
        assert largest_relative_error(levels, model(images)) < 1e-5
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)


@pytest.mark.filterwarnings("ignore")  # that tracing is deprecated, and fixes the size
def test_torch_jit_trace() -> None:
    fused = random_fpn().fuse()
    traced = torch.jit.trace(fused, torch.randn(1, 3, 64, 64), check_trace=False)
    assert "mkldnn" not in str(traced.inlined_graph)


def test_packed_weights_follow_the_weights() -> None:
    """Through what changes them in place, replaces, copies and saves them, and from one image size to another."""
    model = random_fpn()
    fused = model.fuse()
    with torch.no_grad():
        for size in (64, 96, 65):
            images = torch.randn(2, 3, size, size)
            assert largest_relative_error(fused(images), model(images)) < 1e-5
        for parameter in (*model.parameters(), *model.buffers()):
            if parameter.is_floating_point():
                parameter.mul_(1.01)
        fused.load_state_dict(model.fuse().state_dict())
        expected = model(images)
        assert largest_relative_error(fused(images), expected) < 1e-5
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
            assert largest_relative_error(twin(images), expected) < 1e-5


def convolution(size: int = 3) -> tuple[FusedConv2d, Tensor]:
    """One that Winograd's algorithm computes with 3, and oneDNN with 1, and a map for it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 128, size, padding=size // 2).requires_grad_(False)
    return FusedConv2d(conv), torch.randn(1, 128, 16, 16)


def error_of(fused: FusedConv2d, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(fused(x), copy.deepcopy(fused.conv).double()(x.double()))


def changed_by_functional_call(fused: FusedConv2d, x: Tensor) -> float:
    errors = []
    for seed in range(4):  # each call's tensors are gone after it, and their addresses are used again
        torch.manual_seed(seed)
        weights = {name: torch.randn_like(value) for name, value in fused.state_dict().items()}
        with torch.no_grad():
            y = torch.func.functional_call(fused, weights, x)
            exact = torch.func.functional_call(
                fused.double(), {name: value.double() for name, value in weights.items()}, x.double()
            )
        fused.float()
        errors.append(relative_error(y, exact))
        del weights
    return max(errors)


def changed_by_assignment(fused: FusedConv2d, x: Tensor) -> float:
    errors = []
    for _ in range(4):
        state = {name: torch.randn_like(value) for name, value in fused.state_dict().items()}
        fused.load_state_dict(state, assign=True)
        del state
        errors.append(error_of(fused, x))
    return max(errors)


def changed_by_rounding(fused: FusedConv2d, x: Tensor) -> float:
    error_of(fused, x)
    return error_of(fused.bfloat16().float(), x)


def changed_as_inference_tensors(fused: FusedConv2d, x: Tensor) -> float:
    with torch.inference_mode():
        fused = copy.deepcopy(fused)
        error_of(fused, x)
        fused.load_state_dict({name: torch.randn_like(value) for name, value in fused.state_dict().items()})
        return error_of(fused, x)


def changed_in_place(fused: FusedConv2d, x: Tensor) -> float:
    error_of(fused, x)
    with torch.no_grad():
        fused.conv.weight.mul_(3)
    return error_of(fused, x)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        changed_by_functional_call,
        changed_by_assignment,
        changed_by_rounding,
        changed_as_inference_tensors,
        changed_in_place,
    ],
)
def test_prepared_weights_are_those_of_now(change: Callable[[FusedConv2d, Tensor], float], size: int) -> None:
    assert change(*convolution(size)) < 1e-5


@pytest.mark.parametrize("move", ["half", "meta"])
def test_prepared_weights_do_not_outlive_a_move(move: str) -> None:
    fused, x = convolution()
    error_of(fused, x)
    getattr(fused, move)() if move == "half" else fused.to(move)
    assert fused.prepared == {}


@pytest.mark.parametrize("size", [1, 3])
def test_forward_mode_fake_tensors_and_graphs_see_the_plain_operators(size: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fused_conv.one_pass_works.cache_clear()
    fused, x = convolution(size)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(x)).shape == x.shape
    tangent = torch.randn_like(x)
    _, derivative = torch.func.jvp(fused, (x,), (tangent,))
    bias = fused.conv.bias[:, None, None]
    assert relative_error(derivative, fused.conv(tangent) - bias) < 1e-5
    graph = make_fx(fused)(x)
    assert "convolution.default" in graph.code
    assert "mkldnn" not in graph.code
    assert error_of(fused, x) < 1e-5
    assert bool(fused.prepared) == fused_conv.one_pass_works(torch.float32), "the fast path is still there"


def test_folding_leaves_its_arguments() -> None:
    conv, norm = nn.Conv2d(4, 4, 1).eval(), nn.BatchNorm2d(4).eval()
    FusedConv2d(conv, norm)
    assert conv.weight.dtype == norm.weight.dtype == torch.float32


def test_what_computes_otherwise_or_is_watched_stays() -> None:
    """A subclass, a parametrized layer, and layers with hooks: in the neck, in a block and in the stem."""

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = random_fpn()
    seen: list[str] = []
    model.smooth[1].__class__ = Doubled
    nn.utils.parametrizations.weight_norm(model.smooth[2]).eval()
    for name in ("lateral.0", "bottom_up.layer3.1.conv2", "bottom_up.layer2.0.bn1", "bottom_up.layer1.0"):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    model.bottom_up.conv1.register_forward_pre_hook(lambda *args: seen.append("conv1"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        wanted = sorted(seen)
        seen.clear()
        assert largest_relative_error(model.fuse()(images), expected) < 1e-5
    assert sorted(seen) == wanted

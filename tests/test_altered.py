"""Fusing a pyramid that somebody has altered: what is recognised is fused, all else computes as before and is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from fpn import FPN
from fpn.inference.fused_conv import FusedConv2d
from fpn.resnet import BasicBlock, Bottleneck, ResNet
from tests.reference.comparison import largest_relative_error, relative_error
from tests.reference.random_weights import randomise
from tests.trust.altered import ActivatedNorm, Doubled, Halved, Keeping, doubling, shifting

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "Identity": nn.Identity,
    "LeakyReLU": partial(nn.LeakyReLU, 0.1),
    "rising LeakyReLU": partial(nn.LeakyReLU, -0.2),
    "ReLU6": nn.ReLU6,
    "Hardtanh": partial(nn.Hardtanh, -0.5, 2.0),
    "Hardswish": nn.Hardswish,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU, tanh": partial(nn.GELU, "tanh"),
    "Mish": nn.Mish,
    "PReLU": nn.PReLU,
    "ELU in place": partial(nn.ELU, inplace=True),
}
LAST = ("Mish", "PReLU", "ELU in place")  # that are applied after the fused convolution


def small_fpn(block: type[BasicBlock] | type[Bottleneck] = BasicBlock, **options: Any) -> FPN:
    torch.manual_seed(0)
    trunk = ResNet(block, (2, 1, 1, 1), **options.pop("trunk", {}))
    return randomise(FPN(trunk, out_channels=32, **options)).eval()


def error(model: FPN, fused: FPN) -> float:
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        return largest_relative_error(fused(images), model(images))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, block: type[BasicBlock] | type[Bottleneck]) -> None:
    model = small_fpn(block)
    for module in list(model.modules()):
        if hasattr(module, "relu"):
            module.relu = ACTIVATIONS[name]().eval()
    fused = model.fuse()
    assert error(model, fused) < 1e-5
    assert fused.fusion is not None
    assert {part.rpartition(".")[2] for part in fused.fusion.left} == ({"relu"} if name in LAST else set())
    assert not [part for part in fused.modules() if hasattr(part, "running_var")]
    images = torch.randn(1, 3, 64, 64).double().requires_grad_()
    gradients = [
        torch.autograd.grad(sum(y.square().mean() for y in network(images)), images)[0]
        for network in (model.double(), model.fuse())
    ]
    assert relative_error(gradients[1], gradients[0]) < 1e-9


def every_second_column(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=3)[..., ::2]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("added", [None, torch.Tensor.contiguous, channels_last, every_second_column])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_in_a_convolution(
    name: str, added: Callable[[torch.Tensor], torch.Tensor] | None, size: int, dtype: torch.dtype
) -> None:
    """By oneDNN, by Winograd's algorithm with 3, and with an addition before it, in any layout."""
    from fpn._activation import activation_of

    torch.manual_seed(0)
    activation = activation_of(ACTIVATIONS[name]())
    conv = nn.Conv2d(128, 128, size, padding=size // 2).to(dtype).requires_grad_(False)
    x, addend = torch.randn(2, 1, 128, 16, 16).to(dtype)
    addend = added(addend) if added else addend
    before = addend.clone()
    with torch.no_grad():
        expected = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=size // 2)
        expected = expected + addend if added else expected
        expected = expected if activation is None else ACTIVATIONS[name]()(expected)
        y = FusedConv2d(conv, None, activation)(x, addend if added else None)
    assert torch.equal(addend, before)
    # Sums of 128 or 1152 products; Winograd's transforms cost some bits more. Half precision is rounded once or twice.
    bound = {torch.float32: 5e-6, torch.float64: 1e-14, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert relative_error(y, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_takes_contiguous_maps(dtype: torch.dtype) -> None:
    """The input is the addend too, in the layout in which a module of another kind hands it on."""
    model = small_fpn()
    block, fused = (network.get_submodule("bottom_up.layer1.0") for network in (model, model.fuse()))
    x = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        assert relative_error(fused.to(dtype)(x.to(dtype)), block(x)) < {torch.float32: 5e-6}.get(dtype, 2**-6)


def replace_norms(make: Callable[[int], nn.Module]) -> Callable[[FPN], object]:
    def change(model: FPN) -> None:
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm) is nn.BatchNorm2d:
                    setattr(parent, name, make(norm.num_features))

    return change


def resnet_d(model: FPN) -> None:
    for block in model.modules():
        if isinstance(getattr(block, "downsample", None), nn.Sequential):
            conv, norm = block.downsample
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
                block.downsample = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv, norm)


def neck(*layers: nn.Module) -> Callable[[FPN], object]:
    def change(model: FPN) -> None:
        model.smooth[1] = nn.Sequential(*layers)
        model.lateral[1] = nn.Sequential(nn.Conv2d(256, 32, 1), *layers[1:])

    return change


def changed(name: str, change: Callable[[nn.Module], nn.Module]) -> Callable[[FPN], object]:
    return lambda model: model.set_submodule(name, change(model.get_submodule(name)))


def subclassed(name: str, kind: type[nn.Module]) -> Callable[[FPN], object]:
    return lambda model: setattr(model.get_submodule(name), "__class__", kind)


def with_a_forward_of_its_own(module: nn.Module) -> nn.Module:
    module.forward = partial(lambda forward, x: 0.5 * forward(x), module.forward)  # type: ignore[method-assign]
    return module


def hooked(name: str, hook: Callable[..., Any], *, before: bool = False) -> Callable[[FPN], object]:
    def change(model: FPN) -> None:
        module = model.get_submodule(name)
        (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)

    return change


def conv3x3() -> nn.Conv2d:
    return nn.Conv2d(32, 32, 3, padding=1)


# What is altered -> how, and a part that is then left with a word of the reason.
ALTERED: dict[str, tuple[Callable[[FPN], object], dict[str, str]]] = {
    "norm that computes more": (replace_norms(ActivatedNorm), {"bottom_up.layer1.0": "ActivatedNorm"}),
    "group norm": (replace_norms(partial(nn.GroupNorm, 4)), {"bottom_up.layer1.0": "GroupNorm"}),
    "no norm": (replace_norms(lambda channels: nn.Identity()), {}),
    "norm without bias": (
        replace_norms(lambda channels: randomise(nn.Sequential(nn.BatchNorm2d(channels)))[0]), {},
    ),
    "ResNet-D": (resnet_d, {}),
    "neck with ReLU": (neck(conv3x3(), nn.BatchNorm2d(32), nn.ReLU()), {}),
    "neck of one": (neck(conv3x3()), {}),
    "nested neck": (neck(conv3x3(), nn.Sequential(nn.BatchNorm2d(32), nn.SiLU()), nn.Conv2d(32, 32, 1)), {}),
    "neck with another activation": (neck(conv3x3(), nn.BatchNorm2d(32), nn.PReLU()), {"smooth.1.2": "PReLU"}),
    "another convolution": (subclassed("bottom_up.layer1.0.conv1", Doubled), {"bottom_up.layer1.0": "Doubled"}),
    "wrapped stage": (changed("bottom_up.layer2", Halved), {"bottom_up.layer2": "Halved"}),
    "wrapped block": (changed("bottom_up.layer1.1", Halved), {"bottom_up.layer1.1": "Halved"}),
    "wrapped lateral": (changed("lateral.2", Halved), {}),
    "stage's own forward": (
        changed("bottom_up.layer2", with_a_forward_of_its_own), {"bottom_up.layer2": "a forward of its own"},
    ),
    "trunk's own forward": (
        changed("bottom_up.conv1", with_a_forward_of_its_own), {"bottom_up.conv1": "a forward of its own"},
    ),
    "compiled stage": (
        changed("bottom_up.layer2", lambda stage: torch.compile(stage, backend="eager")),
        {"bottom_up.layer2": "OptimizedModule"},
    ),
    "pruned": (
        changed("bottom_up.layer1.0.conv1", lambda conv: prune.l1_unstructured(conv, "weight", 0.3)),
        {"bottom_up.layer1.0": "prune.remove"},
    ),
    "weight norm of old": (changed("smooth.1", weight_norm), {"smooth.1": "remove_weight_norm"}),
    "weight norm": (changed("smooth.1", parametrizations.weight_norm), {"smooth.1": "remove_parametrizations"}),
    "hook on a norm": (hooked("bottom_up.layer1.1.bn1", doubling), {"bottom_up.layer1.1": "bn1: it has hooks"}),
    "hook on a block": (hooked("bottom_up.layer1.1", shifting, before=True), {"bottom_up.layer1.1": "it has hooks"}),
    "hook on a stage": (hooked("bottom_up.layer2", doubling), {}),
    "hook on the trunk": (hooked("bottom_up", lambda *args: tuple(2 * c for c in args[2])), {}),
    "hook on a lateral": (hooked("lateral.1", doubling), {"lateral.1": "it has hooks"}),
    "block twice": (lambda model: model.bottom_up.layer1.append(model.bottom_up.layer1[1]), {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", ALTERED)
def test_what_was_altered_computes_as_before(case: str) -> None:
    change, left = ALTERED[case]
    model = small_fpn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        change(model)
    randomise(model).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    fused = model.fuse()
    assert error(model, fused) < 1e-5
    assert fused.fusion is not None
    for part, reason in left.items():
        assert reason in fused.fusion.left[part]
    if not left:
        assert fused.fusion.left == {}, "nothing is in the way"


@pytest.mark.parametrize("name", ["lateral.1", "smooth.2", "bottom_up.layer1", "bottom_up.layer1.1", "bottom_up"])
@pytest.mark.parametrize("hook", ["after", "before"])
def test_hooks_that_come_later_do_what_they_do_to_the_model(name: str, hook: str) -> None:
    def change(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        if output is None:
            return (inputs[0] + 0.1, *inputs[1:])
        return tuple(2 * c for c in output) if isinstance(output, tuple) else 2 * output

    model = small_fpn()
    fused = model.fuse()
    for network in (model, fused):
        module = network.get_submodule(name)
        module.register_forward_hook(change) if hook == "after" else module.register_forward_pre_hook(change)
    assert error(model, fused) < 1e-5


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_maps_that_somebody_has_seen_stay_as_they_are(block: type[BasicBlock] | type[Bottleneck]) -> None:
    """One module is watched at a time, so that the others may do what they do unwatched; and all of them are."""
    fused = small_fpn(block).fuse()
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.extend((x, x.clone()) for x in (*inputs, output) if isinstance(x, Tensor))

    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for module in fused.modules():
            handle = module.register_forward_hook(keep)
            fused(images)
            handle.remove()
        handle = nn.modules.module.register_module_forward_hook(keep)
        fused(images)
        handle.remove()
    assert len(seen) > 50
    assert all(torch.equal(kept, then) for kept, then in seen)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stage_does_not_write_into_what_it_is_given(number: int) -> None:
    fused = small_fpn().fuse()
    given = torch.randn(1, (64, 64, 128, 256)[number - 1], 12, 12).contiguous(memory_format=torch.channels_last)
    before = given.clone()
    with torch.no_grad():
        fused.bottom_up.get_submodule(f"layer{number}")(given)
        fused.bottom_up.get_submodule(f"layer{number}.0")(given)
    assert torch.equal(given, before)


def test_a_module_that_keeps_its_map_between_blocks() -> None:
    model = small_fpn()
    model.bottom_up.layer1.insert(1, Keeping().eval())
    fused = model.fuse()
    assert error(model, fused) < 1e-5
    ((kept, then),) = fused.bottom_up.layer1[1].seen
    assert torch.equal(kept, then)


def test_vmap_and_gradients_by_functions() -> None:
    fused = small_fpn().double().fuse()
    images = torch.randn(3, 2, 3, 64, 64).double()
    levels = torch.func.vmap(fused)(images)
    for index, one in enumerate(images):
        for level, expected in zip(levels, fused(one), strict=True):
            assert relative_error(level[index], expected) < 1e-12
    assert torch.func.grad(lambda x: fused(x)[0].sum())(images[0]).shape == images[0].shape


def test_scale_that_float16_cannot_hold_is_not_folded() -> None:
    model = small_fpn(norm_layer=nn.BatchNorm2d)
    model.smooth[1][0].weight.data.fill_(1.0)
    model.smooth[1][1].running_var.fill_(0.0)
    model.smooth[1][1].eps = 1e-12
    fused = model.half().fuse()
    assert fused.fusion is not None
    assert "more than torch.float16 can hold" in fused.fusion.left["smooth.1.1"]


def test_what_cannot_be_copied_is_named() -> None:
    import threading

    model = small_fpn()
    model.bottom_up.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"fuse\(\) works on a copy of the model, which cannot be copied: .*lock"):
        model.fuse()


def test_the_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = small_fpn()
    model.lateral[0].register_forward_hook(doubling)
    fused = model.fuse()
    assert model.fusion is None
    assert caplog.records[-1].levelname == "WARNING"
    assert "left lateral.0 as it was: it has hooks" in caplog.records[-1].message == str(fused.fusion)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_contiguous_weights_and_no_layout_of_ours(strict: bool) -> None:
    fused = small_fpn(Bottleneck).to(memory_format=torch.channels_last).fuse().to(memory_format=torch.channels_last)
    program = torch.export.export(fused, (torch.randn(1, 3, 64, 64),), strict=strict)
    for weight in program.state_dict.values():
        assert weight.stride() == torch.empty(weight.shape).stride()
    assert not [node for node in program.graph.nodes if "memory_format" in node.kwargs or "clone" in str(node.target)]
    assert not [node for node in program.graph.nodes if str(node.target).endswith("_.default")]

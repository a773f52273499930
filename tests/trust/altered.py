"""Models as people alter them: other activations, norms, wrappers, hooks, shared and computed weights, anywhere.

`python -m tests.trust.altered 0 5000` searches through the models of those numbers, and prints what was wrong.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fpn import FPN, resnet
from fpn._freezing import freeze
from fpn.inference.fuse import FusedBlock, FusedStage, copied
from fpn.inference.fused_conv import FusedConv2d
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import BasicBlock, Bottleneck, ResNet
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

Seen = list[tuple[Tensor, Tensor]]  # a map as a hook has got it, and a copy of it of that moment


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(x))


class ScaledBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Keeping(nn.Module):
    """Hands on what it gets, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x, x.detach().clone()))
        return x


class Halved(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, 0.5 * self.module(x))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, partial(nn.ReLU, inplace=True), nn.Identity, partial(nn.LeakyReLU, 0.1), partial(nn.LeakyReLU, -0.2),
    nn.SiLU, nn.GELU, partial(nn.GELU, "tanh"), nn.ReLU6, partial(nn.Hardtanh, -0.5, 2.0), nn.Hardswish, nn.Mish,
    nn.PReLU, partial(nn.ELU, inplace=True), nn.Softplus, nn.Sigmoid, Keeping,
    lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), lambda: nn.Sequential(nn.SiLU(inplace=True), Noise()),
)  # fmt: skip
NORMS: tuple[Callable[[int], nn.Module], ...] = (
    nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, ActivatedNorm, partial(nn.GroupNorm, 4), nn.InstanceNorm2d,
    partial(nn.InstanceNorm2d, affine=True, track_running_stats=True), partial(nn.BatchNorm2d, affine=False),
    partial(nn.BatchNorm2d, eps=0.1), partial(nn.BatchNorm2d, momentum=None), lambda channels: nn.Identity(),
    lambda channels: parametrizations.weight_norm(nn.Conv2d(channels, channels, 1)),
)  # fmt: skip


def modules_of(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module, of every module of those very classes."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in kinds
    ]


def change_activations(model: FPN, draw: random.Random) -> None:
    make = draw.choice(ACTIVATIONS)
    places = [(parent, name) for parent, name, _ in modules_of(model, nn.ReLU) if name == "relu"]
    for parent, name in places if draw.random() < 0.5 else draw.sample(places, min(2, len(places))):
        setattr(parent, name, make())


def change_norms(model: FPN, draw: random.Random) -> None:
    make = draw.choice(NORMS)
    places = modules_of(model, nn.BatchNorm2d)
    for parent, name, norm in draw.sample(places, min(draw.choice((1, 3, 99)), len(places))):
        setattr(parent, name, make(cast(Any, norm).num_features))


def change_a_convolution(model: FPN, draw: random.Random) -> None:
    places = modules_of(model, nn.Conv2d)
    parent, name, conv = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        conv.__class__ = Doubled
    elif kind == 1:
        prune.l1_unstructured(conv, "weight", 0.3)  # type: ignore[no-untyped-call]
    elif kind == 2:
        weight_norm(conv)
    elif kind == 3:
        spectral_norm(conv)
    elif kind == 4:
        parametrizations.weight_norm(conv)
    elif kind == 5:
        conv.forward = partial(lambda forward, x: 1.5 * forward(x), conv.forward)  # type: ignore[method-assign]
    elif kind == 6:
        cast(Any, conv).padding_mode = "reflect" if cast(Any, conv).kernel_size == (3, 3) else "zeros"
    else:
        setattr(parent, name, Halved(conv))


def change_a_block(model: FPN, draw: random.Random) -> None:
    trunk = cast(Any, model.bottom_up)
    stage = draw.choice((trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4))
    if not isinstance(stage, nn.Sequential):
        return
    index = draw.randrange(len(stage))
    kind = draw.randrange(5)
    if kind == 0 and type(stage[index]) is BasicBlock:
        stage[index].__class__ = ScaledBlock
    elif kind == 1:
        stage[index] = Halved(stage[index])
    elif kind == 2:
        stage.append(stage[-1] if len(stage) > 1 else Keeping())  # the same block twice
    elif kind == 3:
        stage[index] = nn.Sequential(stage[index], Keeping())
    else:
        stage.insert(index + 1, draw.choice((nn.Identity(), nn.Dropout2d(0.1), Keeping())))


def change_a_shortcut(model: FPN, draw: random.Random) -> None:
    blocks = [block for block in model.modules() if getattr(block, "downsample", None) is not None]
    if not blocks:
        return
    block = cast(Any, draw.choice(blocks))
    if type(block.downsample) is not nn.Sequential or len(block.downsample) != 2:
        block.downsample = nn.Sequential(block.downsample, draw.choice(ACTIVATIONS)())
        return
    conv, norm = block.downsample
    kind = draw.randrange(4)
    if kind == 0 and isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):  # ResNet-D
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        conv.stride = (1, 1)
        block.downsample = nn.Sequential(pool, conv, norm)
    elif kind == 1:
        block.downsample = nn.Sequential(nn.Sequential(conv), norm, draw.choice(ACTIVATIONS)())
    elif kind == 2:
        block.downsample = nn.Sequential(conv, norm, Keeping())
    else:
        block.downsample = Halved(block.downsample)


def change_the_neck(model: FPN, draw: random.Random) -> None:
    layers = model.lateral if draw.random() < 0.5 else model.smooth
    index = draw.randrange(len(layers))
    rest: list[nn.Module] = [layers[index]]
    for _ in range(draw.randrange(4)):
        kind = draw.randrange(4)
        if kind == 0:
            rest.append(draw.choice(ACTIVATIONS)())
        elif kind == 1:
            rest.append(draw.choice(NORMS)(model.out_channels))
        elif kind == 2:
            rest.append(nn.Conv2d(model.out_channels, model.out_channels, draw.choice((1, 3)), padding="same"))
        else:
            rest.append(nn.Sequential(draw.choice(ACTIVATIONS)(), nn.Identity()))
    layers[index] = nn.Sequential(*rest)


def change_a_stage(model: FPN, draw: random.Random) -> None:
    name = draw.choice(("layer1", "layer2", "layer3", "layer4"))
    stage = model.bottom_up.get_submodule(name)
    kind = draw.randrange(3)
    if kind == 0:
        setattr(model.bottom_up, name, Halved(stage))
    elif kind == 1:
        stage.forward = partial(lambda forward, x: 0.5 * forward(x), stage.forward)  # type: ignore[method-assign]
    else:
        setattr(model.bottom_up, name, nn.Sequential(stage, nn.Identity()))


def share_a_norm(model: FPN, draw: random.Random) -> None:
    *_, norm = draw.choice(modules_of(model, nn.BatchNorm2d) or [(model, "", model)])
    twins = [
        place
        for place in modules_of(model, nn.BatchNorm2d)
        if cast(Any, place[2]).num_features == cast(Any, norm).num_features
    ]
    if twins:
        setattr(*draw.choice(twins)[:2], norm)


def doubling(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return 2 * output if isinstance(output, Tensor) else None


def shifting(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return (inputs[0] + 0.1, *inputs[1:]) if inputs else None  # a parametrization has none


def hook_in(model: FPN, draw: random.Random) -> None:
    module = draw.choice(list(model.modules()))
    if draw.random() < 0.5:
        module.register_forward_hook(doubling)
    else:
        module.register_forward_pre_hook(shifting)


def look_on(model: nn.Module, draw: random.Random) -> Seen:
    """Hooks that keep what goes into some modules and comes out, and what they have kept."""
    seen: Seen = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.extend((x, x.clone()) for x in (inputs[0], output) if isinstance(x, Tensor))

    # Blocks and activations that have stayed write into what others of theirs have made, as they always did.
    if not any(getattr(module, "inplace", False) for module in model.modules()):
        places = [module for module in model.modules() if type(module) in (FusedBlock, FusedConv2d, FusedStage)]
        for module in draw.sample(places, min(3, len(places))):
            module.register_forward_hook(keep)
    return seen


ALTERATIONS: tuple[Callable[[FPN, random.Random], None], ...] = (
    change_activations, change_norms, change_a_convolution, change_a_block, change_a_shortcut, change_the_neck,
    change_a_stage, share_a_norm, hook_in,
)  # fmt: skip


def altered(draw: random.Random) -> FPN:
    """A small pyramid in training mode, altered up to four times."""
    torch.manual_seed(draw.randrange(2**31))
    block = draw.choice((BasicBlock, Bottleneck))
    layers = [draw.choice((1, 1, 2)) for _ in range(4)]
    large = draw.random() < 0.02  # as wide as Winograd's algorithm needs
    before = resnet.STAGE_CHANNELS
    resnet.STAGE_CHANNELS = (16, 128, 128, 128) if large else (8, 8, 16, 16)  # type: ignore[assignment]
    try:
        trunk = ResNet(block, layers, width_per_group=64)
    finally:
        resnet.STAGE_CHANNELS = before
    model = FPN(
        trunk,
        out_channels=128 if large else 8,
        smooth_top=draw.random() < 0.5,
        upsample=draw.choice(("nearest", "bilinear")),
        extra=draw.choice((None, "maxpool", "p6p7")),
        norm_layer=draw.choice((None, nn.BatchNorm2d)),
    )
    for _ in range(draw.randint(1, 4)):
        draw.choice(ALTERATIONS)(model, draw)
    return cast(FPN, randomise(model, draw.randrange(1000)))


def problems(draw: random.Random) -> list[str]:
    """What is wrong with fusing, freezing and checkpointing an altered model; empty where nothing is."""
    model = altered(draw)
    size = draw.choice(((64, 64), (96, 65)))
    images = torch.randn(2, 3, *size)
    found = checkpointing_problems(model, images) if draw.random() < 0.4 else []
    model.eval()
    with torch.no_grad():
        model(images)  # what computes its weight before each call has done so in eval mode
        expected = model(images)
        if draw.random() < 0.4:
            found += freezing_problems(copied(model), images, expected, draw)
        try:
            fused = model.fuse()
        except Exception as error:
            return [*found, f"fuse() raised {type(error).__name__}: {error}"]
        seen = look_on(fused, draw)
        given = images.clone(memory_format=draw.choice((torch.contiguous_format, torch.channels_last)))
        levels = fused(given)
    if off := differences("fused", levels, expected):
        # Where terms cancel, rounding alone may do that: P7 of a map of one cell may hang on one number near zero.
        wide = copied(model).double()
        with torch.no_grad():
            wrong = differences("", wide.fuse()(images.double()), wide(images.double()), 1e-11)
        if wrong or differences("", levels, expected, 1e-4):
            found += off
    if not torch.equal(given, images):
        found.append("the images were overwritten")
    if overwritten(seen) or (overwritten(kept_in(fused)) and not overwritten(kept_in(model))):
        found.append("a map that somebody has kept was overwritten")
    if draw.random() < 0.3:
        found += gradient_problems(copied(model).double(), images.double().requires_grad_())
    return found


def gradient_problems(model: FPN, images: Tensor) -> list[str]:
    """In float64: in float32 a rounding error may put a number on the other side of a ReLU's kink."""
    try:
        expected = torch.autograd.grad(sum(level.square().mean() for level in model(images)), images)
    except RuntimeError:
        return []  # that model has none
    gradient = torch.autograd.grad(sum(level.square().mean() for level in model.fuse()(images)), images)
    return differences("fused, gradient", gradient, expected, 1e-9)


def kept_in(model: nn.Module) -> Seen:
    return [pair for module in model.modules() if isinstance(module, Keeping) for pair in module.seen]


def overwritten(seen: Seen) -> bool:
    return not all(torch.equal(kept, then) for kept, then in seen)


def differences(what: str, levels: Any, expected: Any, tolerance: float = 1e-5) -> list[str]:
    errors = [relative_error(level, other) for level, other in zip(levels, expected, strict=True)]
    return [f"{what}: {max(errors):.1e} off"] if not all(error < tolerance for error in errors) else []


def freezing_problems(model: FPN, images: Tensor, expected: tuple[Tensor, ...], draw: random.Random) -> list[str]:
    trainable = draw.randint(0, 4)
    trunk = model.bottom_up
    changes = freeze(trunk, trainable)
    found = differences("frozen", model(images), expected)
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")[: 6 - trainable]
    if any(parameter.requires_grad for part in parts for parameter in trunk.get_submodule(part).parameters()):
        found.append("a frozen parameter takes a gradient")
    before = {name: value.clone() for name, value in trunk.named_buffers()}
    model.train()(images)
    for name, value in trunk.named_buffers():
        owner, _, word = name.rpartition(".")
        is_statistic = word in ("running_mean", "running_var", "num_batches_tracked")
        inside = name.startswith(tuple(f"{part}." for part in parts))
        if is_statistic and inside and owner not in changes.left and not torch.equal(value, before[name]):
            found.append(f"the frozen {name} moves")
    return found


def checkpointing_problems(model: FPN, images: Tensor) -> list[str]:
    results = []
    model.train()
    with torch.no_grad():
        model(images)
    for stages in ((False,) * 4, (True,) * 4):
        twin = copied(model)
        twin.bottom_up.checkpoint_stages = stages  # type: ignore[assignment]
        torch.manual_seed(0)
        try:
            sum(level.square().mean() for level in twin(images)).backward()
        except RuntimeError as error:
            if any(stages):
                return [f"checkpointed: {error}"]
            return []  # that model has no gradient
        after = torch.rand(1)  # the generator stands where it would
        gradients = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
        results.append((gradients | dict(twin.named_buffers()), after))
    (plain, generator), (ours, own_generator) = results
    found = [] if torch.equal(generator, own_generator) else ["checkpointed: the generator stands elsewhere"]
    if ours.keys() != plain.keys():
        return [*found, "checkpointed: other gradients are there"]
    wrong = [name for name in ours if not relative_error(ours[name], plain[name]) < 1e-4]
    return found + [f"checkpointed: {name} differs" for name in wrong[:2]]


def main() -> None:
    start, stop = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for number in range(start, stop):
        try:
            found = problems(random.Random(number))
        except Exception as error:
            counts[f"no model: {type(error).__name__}"] += 1
            print(number, "no model:", type(error).__name__, str(error)[:150], flush=True)
            continue
        counts["wrong" if found else "right"] += 1
        for problem in found:
            print(number, problem, flush=True)
        if number % 500 == 499:
            print(number + 1, dict(counts), flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()

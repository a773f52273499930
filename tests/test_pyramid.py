from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fpn
from fpn import FPN, FPN18, FPN34, FPN50, FPN101, FPN152, resnet
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

BUILDERS = [FPN18, FPN34, FPN50, FPN101, FPN152]
SIZES = [(1, 1), (1, 40), (33, 65), (64, 64), (95, 31), (97, 130)]
EXTRAS = {None: 0, "maxpool": 1, "p6p7": 2, "p6p7_on_p5": 2}


def obvious_pyramid(model: FPN, images: Tensor, upsample: str, smooth_top: bool, extra: str | None) -> list[Tensor]:
    """The pyramid written out level by level, in float64, from the model's weights."""
    model = model.double()
    c2, c3, c4, c5 = model.bottom_up(images.double())
    lateral5, lateral4, lateral3, lateral2 = model.lateral
    smooth5, smooth4, smooth3, smooth2 = model.smooth

    def conv(x: Tensor, layer: nn.Module, stride: int = 1) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=layer.weight.shape[-1] // 2)

    def up(x: Tensor, like: Tensor) -> Tensor:
        height, width = like.shape[2:]
        if upsample == "bilinear":
            return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        rows = torch.arange(height) * x.shape[2] // height
        columns = torch.arange(width) * x.shape[3] // width
        return x[:, :, rows][:, :, :, columns]

    m5 = conv(c5, lateral5)
    l4 = conv(c4, lateral4)
    m4 = l4 + up(m5, l4)
    l3 = conv(c3, lateral3)
    m3 = l3 + up(m4, l3)
    l2 = conv(c2, lateral2)
    m2 = l2 + up(m3, l2)
    p5 = conv(m5, smooth5) if smooth_top else m5
    levels = [conv(m2, smooth2), conv(m3, smooth3), conv(m4, smooth4), p5]
    if extra == "maxpool":
        levels.append(p5[:, :, ::2, ::2])
    elif extra is not None:
        p6 = conv(c5 if extra == "p6p7" else p5, model.extra.p6, stride=2)
        levels += [p6, conv(p6.clamp(min=0), model.extra.p7, stride=2)]
    return levels


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("smooth_top", [False, True])
@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
def test_forward_is_the_obvious_pyramid(upsample: str, smooth_top: bool, extra: str | None) -> None:
    torch.manual_seed(0)
    model = randomise(FPN18(out_channels=48, upsample=upsample, smooth_top=smooth_top, extra=extra)).eval()
    for parameter in model.parameters():  # biases start at zero, which would hide one left out
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 71, 90)
    with torch.no_grad():
        levels = model(images)
        expected = obvious_pyramid(model, images, upsample, smooth_top, extra)
    assert len(levels) == 4 + EXTRAS[extra]
    for ours, reference in zip(levels, expected, strict=True):
        assert relative_error(ours, reference) < 1e-5


@pytest.mark.torchvision
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("extra", ["maxpool", "p6p7", "p6p7_on_p5"])
def test_the_papers_options_are_torchvisions_pyramid(extra: str, norm: type[nn.Module] | None) -> None:
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    torch.manual_seed(0)
    ours = FPN18(out_channels=64, upsample="nearest", smooth_top=True, extra=extra, neck_norm_layer=norm)
    randomise(ours)
    blocks = {
        "maxpool": LastLevelMaxPool(),
        "p6p7": LastLevelP6P7(512, 64),
        "p6p7_on_p5": LastLevelP6P7(64, 64),
    }
    theirs = FeaturePyramidNetwork([64, 128, 256, 512], 64, blocks[extra], norm)
    renamed = {}
    for key, value in ours.state_dict().items():
        part, _, rest = key.partition(".")
        if part in ("lateral", "smooth"):
            index, _, name = rest.partition(".")
            name = name if norm else f"0.{name}"
            renamed[f"{'inner' if part == 'lateral' else 'layer'}_blocks.{3 - int(index)}.{name}"] = value
        elif part == "extra":
            renamed[f"extra_blocks.{rest}"] = value
    theirs.load_state_dict(renamed)
    ours.eval(), theirs.eval()
    images = torch.randn(1, 3, 101, 67)
    with torch.no_grad():
        maps = ours.bottom_up(images)
        expected = theirs(OrderedDict(enumerate(maps))).values()
        for level, reference in zip(ours(images), expected, strict=True):
            assert relative_error(level, reference) < 1e-6


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(FPN18, 11_176_512 + 1_770_240 + 246_784), (FPN101, 45_254_464)],
)
def test_parameters(build, parameters: int) -> None:
    assert sum(p.numel() for p in build().parameters()) == parameters


def test_fpn101_is_a_resnet_101() -> None:
    model = FPN101()
    assert [len(getattr(model.bottom_up, f"layer{i}")) for i in (1, 2, 3, 4)] == [3, 4, 23, 3]


@pytest.mark.parametrize("build", BUILDERS)
def test_contract(build) -> None:
    with torch.device("meta"):
        model = build()
        levels = model(torch.empty(2, 3, 800, 1333))
    assert model.out_channels == 256
    assert model.strides == (4, 8, 16, 32)
    assert [tuple(p.shape) for p in levels] == [(2, 256, -(-800 // s), -(-1333 // s)) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_any_size_and_batch(batch: int, size: tuple[int, int], extra: str | None) -> None:
    model = FPN18(out_channels=8, extra=extra).eval()
    levels = model(torch.randn(batch, 3, *size))
    assert len(model.strides) == len(levels)
    for level, stride in zip(levels, model.strides, strict=True):
        assert level.shape == (batch, 8, -(-size[0] // stride), -(-size[1] // stride))
        assert level.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_layout_are_kept(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = FPN18(extra="p6p7").eval().to(dtype=dtype, memory_format=layout)
    for level in model(torch.randn(1, 3, 96, 64, dtype=dtype).contiguous(memory_format=layout)):
        assert level.dtype == dtype
        assert level.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_parameter_takes_a_gradient(extra: str | None) -> None:
    model = FPN18(smooth_top=True, extra=extra)
    sum(level.square().mean() for level in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_state_dict_round_trip() -> None:
    images = torch.randn(1, 3, 64, 64)
    model = randomise(FPN18(extra="p6p7", neck_norm_layer=nn.GroupNorm)).eval()
    twin = FPN18(extra="p6p7", neck_norm_layer=nn.GroupNorm).eval()
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model(images), twin(images), strict=True))


def test_a_norm_layer_takes_the_place_of_the_biases() -> None:
    model = FPN18(neck_norm_layer=nn.BatchNorm2d, smooth_top=True)
    convolutions = [m for neck in (model.lateral, model.smooth) for m in neck.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 8
    assert all(conv.bias is None for conv in convolutions)


class ListTrunk(nn.Module):
    """Three maps of strides 2, 4, 8, announced or not, as a list or a dict."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict = as_dict
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 5), (5, 6), (6, 7)))

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor]:
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return {f"c{i}": m for i, m in enumerate(maps)} if self.as_dict else maps


@pytest.mark.parametrize("as_dict", [False, True])
def test_any_bottom_up_module(as_dict: bool) -> None:
    model = FPN(ListTrunk(as_dict), in_channels=(5, 6, 7), strides=(2, 4, 8), out_channels=16, extra="maxpool")
    assert model.strides == (2, 4, 8, 16)
    assert [tuple(p.shape) for p in model(torch.randn(1, 3, 32, 48))] == [
        (1, 16, 16, 24),
        (1, 16, 8, 12),
        (1, 16, 4, 6),
        (1, 16, 2, 3),
    ]


@pytest.mark.parametrize(("name", "indices"), [("resnet18", (1, 2, 3, 4)), ("mobilenetv3_small_050", (1, 2, 3))])
def test_timm_features_announce_themselves(name: str, indices: tuple[int, ...]) -> None:
    timm = pytest.importorskip("timm")
    trunk = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
    model = FPN(trunk, out_channels=32)
    assert model.in_channels == tuple(trunk.feature_info.channels())
    levels = model(torch.randn(2, 3, 70, 100))
    assert [p.shape[2] for p in levels] == [-(-70 // s) for s in model.strides]


@pytest.mark.torchvision
def test_torchvision_feature_extractor() -> None:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    theirs = randomise(torchvision.models.resnet18()).eval()
    extractor = create_feature_extractor(theirs, [f"layer{i}" for i in (1, 2, 3, 4)])
    model = FPN(extractor, in_channels=(64, 128, 256, 512), strides=(4, 8, 16, 32)).eval()
    ours = FPN18().eval()
    ours.bottom_up.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    ours.lateral.load_state_dict(model.lateral.state_dict())
    ours.smooth.load_state_dict(model.smooth.state_dict())
    images = torch.randn(1, 3, 75, 64)
    for a, b in zip(model(images), ours(images), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsample": "bicubic"}, "upsample must be one of"),
        ({"extra": "p6"}, "extra must be one of"),
        ({"trainable_layers": 6}, "trainable_layers must be 0 to 5"),
        ({"weights": "IMAGENET1K_V3"}, "no weights 'IMAGENET1K_V3' for resnet18"),
    ],
)
def test_unknown_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPN18(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "in_channels and strides must give"),
        ({"in_channels": (5, 6, 7)}, "in_channels and strides must give"),
        ({"in_channels": (5, 6, 7), "strides": (2, 4)}, "in_channels and strides must give"),
    ],
)
def test_channels_neither_announced_nor_given(arguments: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPN(ListTrunk(as_dict=False), **arguments)


def test_maps_that_are_not_those_announced() -> None:
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"maps of \(5, 6, 8\) channels; got \(5, 6, 7\)"):
        FPN(ListTrunk(as_dict=False), (5, 6, 8), (2, 4, 8))(images)
    with pytest.raises(ValueError, match=r"maps of \(5, 6\) channels; got \(5, 6, 7\)"):
        FPN(ListTrunk(as_dict=False), (5, 6), (2, 4))(images)
    with pytest.raises(TypeError, match="must return a sequence or a dict of feature maps"):
        FPN(nn.Conv2d(3, 5, 1), (5,), (1,))(images)


def test_bad_images_are_refused_by_the_trunk() -> None:
    with pytest.raises(TypeError, match=r"images must be floating point \(scaled and normalised\); got torch.uint8"):
        FPN18()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_public_names() -> None:
    assert {"FPN", "FPN18", "FPN34", "FPN50", "FPN101", "FPN152"} <= set(fpn.__all__)
    assert all(hasattr(fpn, name) for name in fpn.__all__)
    assert resnet.resnet50().feature_info[0] == {"num_chs": 256, "reduction": 4, "module": "layer1"}

"""Trunks of timm and of torchvision under our pyramids, built by those libraries' own constructors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fpn import FPN, SimpleFeaturePyramid
from fpn.detection import TorchvisionBackbone, torchvision_trunk
from tests.families import FAMILIES, SLICE
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

TABLE = Path(__file__).parents[1] / "docs" / "trunks.md"


def timm_trunk(family: str) -> Any:
    timm = pytest.importorskip("timm")
    name, options, _, _ = FAMILIES[family]
    return timm.create_model(name, features_only=True, pretrained=False, **options)


def check_pyramid(model: FPN, images: torch.Tensor) -> None:
    """Its levels have the strides that it says, the trunk gets a gradient, and the fused form computes the same."""
    fused = randomise(model).eval().fuse()
    levels = model(images)
    for level, stride in zip(levels, model.strides, strict=True):
        assert level.shape == (len(images), 32, -(-images.shape[2] // stride), -(-images.shape[3] // stride))
    sum(level.double().square().mean() for level in levels).backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.bottom_up.parameters())
    with torch.no_grad():
        for level, expected in zip(fused(images), levels, strict=True):
            assert expected.isfinite().all()
            assert relative_error(level, expected) < 1e-4


def families(chosen: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in chosen else [pytest.mark.trust]) for name in FAMILIES]


@pytest.mark.filterwarnings("ignore")  # timm's deprecations
@pytest.mark.parametrize("family", families(SLICE))
def test_timm_family(family: str) -> None:
    torch.manual_seed(0)
    trunk = timm_trunk(family)
    height, width = FAMILIES[family].size
    images = torch.rand(1, 3, height, width)
    model = FPN(trunk, out_channels=32)
    assert model.in_channels == tuple(trunk.feature_info.channels())
    with torch.no_grad():
        maps = trunk.eval()(images)
    axis = FAMILIES[family].layout.index("C")
    assert tuple(c.shape[axis] for c in maps) == model.in_channels
    check_pyramid(model, images)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("announced", [True, False])
def test_maps_with_their_channels_last(announced: bool) -> None:
    """The levels are those of the maps permuted by hand, whether the trunk or only their shapes tell the layout."""
    torch.manual_seed(0)
    trunk = timm_trunk("Swin").eval()
    model = FPN(trunk if announced else nn.Sequential(trunk), trunk.feature_info.channels(), (4, 8, 16, 32)).eval()
    assert model.map_layout == ("NHWC" if announced else None)
    images = torch.rand(2, 3, 96, 64)

    class Permuted(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [c.permute(0, 3, 1, 2) for c in trunk(x)]

    by_hand = FPN(Permuted(), trunk.feature_info.channels(), (4, 8, 16, 32)).eval()
    by_hand.lateral, by_hand.smooth = model.lateral, model.smooth
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(images), by_hand(images), strict=True))


def test_the_table_has_every_family() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == {family: member.name for family, member in FAMILIES.items()}
    assert len(rows) >= 16


# --- torchvision's, by name

SMALL = ("convnext_tiny", "swin_t", "mobilenet_v3_small", "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5")
LARGE = ("alexnet", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5")
LARGE += ("mobilenet_v2", "resnet18", "resnext50_32x4d", "squeezenet1_1", "swin_v2_t", "vgg11", "wide_resnet50_2")


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.trust) for name in LARGE)])
def test_torchvisions_trunk(name: str) -> None:
    """The maps are what the modules of torchvision's own model give; its checkpoint loads strictly but for the head."""
    import torchvision

    torch.manual_seed(0)
    theirs = randomise(torchvision.models.get_model(name)).eval()
    trunk = torchvision_trunk(name).eval()
    own = trunk.state_dict()
    trunk.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in own})
    seen: dict[str, torch.Tensor] = {}
    for info in trunk.feature_info:
        theirs.get_submodule(info["module"]).register_forward_hook(
            lambda _, __, output, key=info["module"]: seen.__setitem__(key, output.clone())
        )
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        if name == "inception_v3":  # its classifier takes no such size
            theirs(torch.rand(1, 3, 299, 299)), seen.clear()
            images = torch.rand(1, 3, 299, 299)
        theirs(images)
        maps = trunk(images)
    assert [info["reduction"] for info in trunk.feature_info] == [4, 8, 16, 32][: len(maps)]
    for info, c in zip(trunk.feature_info, maps, strict=True):
        assert torch.equal(c.relu(), seen[info["module"]].relu())  # a ReLU in place may have followed
        assert c.shape[trunk.output_fmt.index("C")] == info["num_chs"]
    levels = FPN(trunk, out_channels=32).eval()(images)
    assert [level.shape[2] for level in levels] == [c.shape[trunk.output_fmt.index("H")] for c in maps]


@pytest.mark.torchvision
def test_fewer_levels_hold_fewer_layers() -> None:
    trunk = torchvision_trunk("convnext_tiny", strides=(8, 16))
    assert [info["module"] for info in trunk.feature_info] == ["features.3", "features.5"]
    assert len(trunk.features) == 6
    with pytest.raises(ValueError, match=r"strides must be some of \[4, 8, 16, 32\], rising; got \(64,\)"):
        torchvision_trunk("convnext_tiny", strides=(64,))


@pytest.mark.torchvision
def test_images_are_rescaled_where_the_model_would() -> None:
    import torchvision

    options = {"transform_input": True, "init_weights": False, "aux_logits": False}
    theirs = randomise(torchvision.models.googlenet(**options)).eval()
    trunk = torchvision_trunk("googlenet", **options).eval()
    trunk.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in trunk.state_dict()})
    seen = []
    theirs.inception5b.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        images = torch.rand(1, 3, 96, 96)
        theirs(images)
        assert relative_error(trunk(images)[-1], seen[0]) < 1e-5


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["timm", "torchvision", "ViT"])
def test_in_a_detector(source: str) -> None:
    from torchvision.models.detection import FasterRCNN

    torch.manual_seed(0)
    pyramid: FPN | SimpleFeaturePyramid
    if source == "timm":
        timm = pytest.importorskip("timm")
        options = {"features_only": True, "pretrained": False}
        pyramid = FPN(timm.create_model("convnext_atto", **options), out_channels=32)
    elif source == "torchvision":
        pyramid = FPN(torchvision_trunk("mobilenet_v3_small"), out_channels=32)
    else:
        pyramid = SimpleFeaturePyramid(torchvision_trunk("vit_b_16", image_size=64), out_channels=32)
    few = {"box_batch_size_per_image": 8, "min_size": 64, "max_size": 64}
    detector = FasterRCNN(TorchvisionBackbone(pyramid), num_classes=2, **few)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    sum(detector([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())
    assert "boxes" in detector.eval()([torch.rand(3, 64, 64)])[0]

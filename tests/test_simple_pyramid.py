"""ViTDet's simple feature pyramid under the names and shapes of its published weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpn import SimpleFeaturePyramid
from fpn.detection import Detectron2Backbone, TorchvisionBackbone
from tests.reference.comparison import relative_error

# detectron2's SimpleFeaturePyramid over ViT-B, without "backbone.": 768 channels, 256 in the pyramid, layer norm.
PUBLISHED = {
    "simfp_2.0.weight": (768, 384, 2, 2),
    "simfp_2.0.bias": (384,),
    "simfp_2.1.weight": (384,),
    "simfp_2.1.bias": (384,),
    "simfp_2.3.weight": (384, 192, 2, 2),
    "simfp_2.3.bias": (192,),
    "simfp_3.0.weight": (768, 384, 2, 2),
    "simfp_3.0.bias": (384,),
}
CONVOLUTIONS = {(2, 4): 192, (3, 1): 384, (4, 0): 768, (5, 1): 768}  # level, place of the 1×1 -> its input
for (level, place), width in CONVOLUTIONS.items():
    for offset, shape in ((0, (256, width, 1, 1)), (1, (256, 256, 3, 3))):
        PUBLISHED[f"simfp_{level}.{place + offset}.weight"] = shape
        PUBLISHED |= {f"simfp_{level}.{place + offset}.norm.{leaf}": (256,) for leaf in ("weight", "bias")}


class Patches(nn.Module):
    """A trunk of one map of stride 16, in a form of its own."""

    def __init__(self, channels: int, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.proj = nn.Conv2d(3, channels, 16, 16)
        self.feature_info = [{"num_chs": channels, "reduction": 16, "module": "proj"}]

    def forward(self, images: Tensor) -> Any:
        c: Tensor = self.proj(images)
        return {"tensor": c, "list": [c], "dict": {"last_feat": c}, "NHWC": c.permute(0, 2, 3, 1)}[self.form]


def obvious_pyramid(state: dict[str, Tensor], c: Tensor) -> list[Tensor]:
    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        scale, shift = (state[f"{name}.{leaf}"][:, None, None] for leaf in ("weight", "bias"))
        return (x - mean) / (variance + 1e-6).sqrt() * scale + shift

    def deconv(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    def output(x: Tensor, level: int, place: int) -> Tensor:
        x = norm(F.conv2d(x, state[f"simfp_{level}.{place}.weight"]), f"simfp_{level}.{place}.norm")
        name = f"simfp_{level}.{place + 1}"
        return norm(F.conv2d(x, state[f"{name}.weight"], padding=1), f"{name}.norm")

    fine = deconv(F.gelu(norm(deconv(c, "simfp_2.0"), "simfp_2.1")), "simfp_2.3")
    p5 = output(F.max_pool2d(c, 2), 5, 1)
    levels = [output(fine, 2, 4), output(deconv(c, "simfp_3.0"), 3, 1), output(c, 4, 0), p5]
    return [*levels, p5[:, :, ::2, ::2]]


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = SimpleFeaturePyramid(Patches(768)).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if not key.startswith("net.")} == PUBLISHED


@pytest.mark.parametrize("form", ["tensor", "list", "dict", "NHWC"])
def test_forward_is_the_obvious_pyramid(form: str) -> None:
    torch.manual_seed(0)
    model = SimpleFeaturePyramid(Patches(32, form), out_channels=16, extra="maxpool").double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    levels = model(images)
    assert model.strides == (4, 8, 16, 32, 64)
    expected = obvious_pyramid(model.state_dict(), model.net.proj(images))
    for level, reference, stride in zip(levels, expected, model.strides, strict=True):
        assert level.shape == (2, 16, -(-64 // stride), -(-96 // stride))
        assert relative_error(level, reference) < 1e-12
    graph = torch.fx.symbolic_trace(SimpleFeaturePyramid(Patches(32)).eval())
    assert graph(torch.randn(1, 3, 64, 64))[0].shape == (1, 256, 16, 16)


def test_odd_maps_and_other_norms() -> None:
    model = SimpleFeaturePyramid(Patches(32), norm_layer=None, extra="p6p7_on_p5", scale_factors=(2, 1, 0.5))
    assert model.strides == (8, 16, 32, 64, 128)
    assert [tuple(p.shape[2:]) for p in model(torch.randn(1, 3, 16, 48))] == [(2, 6), (1, 3), (1, 2), (1, 1), (1, 1)]
    grouped = SimpleFeaturePyramid(Patches(128), norm_layer=nn.GroupNorm)
    sum(level.square().mean() for level in grouped(torch.randn(1, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in grouped.parameters())


def test_a_plain_vit_of_timms() -> None:
    timm = pytest.importorskip("timm")
    options = {"features_only": True, "pretrained": False, "out_indices": (-1,), "dynamic_img_size": True}
    model = SimpleFeaturePyramid(timm.create_model("vit_tiny_patch16_224", **options)).eval()
    images = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        levels, backbone = model(images), TorchvisionBackbone(model)
    assert [tuple(level.shape) for level in levels] == [(1, 256, 96 // s, 128 // s) for s in model.strides]
    assert backbone.names == ("0", "1", "2", "3", "pool")
    detectron2s = Detectron2Backbone(model)
    assert list(detectron2s.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    assert detectron2s.size_divisibility == 32
    with pytest.raises(ValueError, match="SimpleFeaturePyramid has no fused form"):
        backbone.fuse()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": "p6p7"}, "extra must be None"),
        ({"scale_factors": (1, 2)}, r"scale_factors must be some of 4, 2, 1 and 0\.5, falling"),
        ({"stride": 14}, "stride must be a power of two"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(Patches(32), **options)
    with pytest.raises(ValueError, match="in_channels and stride must give"):
        SimpleFeaturePyramid(nn.Identity())

"""Our pyramids in torchvision's detectors, put there by hand or by `accelerate`, and under detectron2's protocol."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import roi
from fpn import FPN, FPN18, SimpleFeaturePyramid
from fpn.demo.photo import DEFAULT_PHOTO
from fpn.detection import Detectron2Backbone, ShapeSpec, TorchvisionBackbone, accelerate, torchvision_state_dict
from fpn.inference.fused_conv import FusedConv2d
from fpn.levels import ExtraLevels
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import resnet18
from tests.reference.comparison import relative_error, unmatched
from tests.reference.random_weights import randomise

Detections = dict[str, Tensor]
Build = Callable[[], nn.Module]

RETINA: dict[str, Any] = {"trunk": {"returned_layers": (2, 3, 4)}, "extra": "p6p7"}

# --- adapters


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("0", "1", "2", "3", "pool")),
        ({"extra": "maxpool"}, ("0", "1", "2", "3", "pool")),
        (RETINA, ("0", "1", "2", "p6", "p7")),
    ],
)
def test_levels_by_torchvisions_names(options: dict[str, Any], names: tuple[str, ...]) -> None:
    fpn = FPN18(**options).eval()
    backbone = TorchvisionBackbone(fpn)
    assert backbone.out_channels == 256
    images = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        levels, expected = backbone(images), fpn(images)
    assert tuple(levels) == backbone.names == names
    for level, stride in zip(levels.values(), backbone.strides, strict=True):
        assert level.shape == (2, 256, -(-70 // stride), -(-100 // stride))
    assert all(torch.equal(a, b) for a, b in zip(levels.values(), expected, strict=False))


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])
@pytest.mark.parametrize("options", [{}, RETINA], ids=["P2-P6", "P3-P7"])
def test_adapter_in_torchvisions_detectors(name: str, options: dict[str, Any]) -> None:
    from torchvision.models import detection

    if options and name.endswith("RCNN"):
        pytest.skip("torchvision's R-CNNs pool from P2 to P5")
    torch.manual_seed(0)
    few = {"box_batch_size_per_image": 8, "box_detections_per_img": 4} if name.endswith("RCNN") else {}
    detector = getattr(detection, name)(TorchvisionBackbone(FPN18(**options)), num_classes=2, min_size=64, **few)
    losses = detector([torch.rand(3, 64, 90)], [target(64, 90)])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.backbone.fpn.bottom_up.parameters())
    with torch.inference_mode():
        (found,) = detector.eval()([torch.rand(3, 64, 90)])
    assert {"boxes", "scores", "labels"} <= set(found)


@pytest.mark.parametrize(
    ("options", "names", "divisibility"),
    [
        ({}, ("p2", "p3", "p4", "p5", "p6"), 32),
        ({"extra": "maxpool"}, ("p2", "p3", "p4", "p5", "p6"), 32),
        (RETINA, ("p3", "p4", "p5", "p6", "p7"), 32),
    ],
)
def test_detectron2s_protocol(options: dict[str, Any], names: tuple[str, ...], divisibility: int) -> None:
    backbone = Detectron2Backbone(FPN18(**options)).eval()
    assert backbone.size_divisibility == divisibility
    assert backbone.padding_constraints == {}
    levels, specs = backbone(torch.randn(1, 3, 64, 96)), backbone.output_shape()
    assert tuple(levels) == tuple(specs) == names
    for name, level in levels.items():
        assert specs[name] == ShapeSpec(channels=level.shape[1], stride=2 ** int(name[1:]))
        assert level.shape[2:] == (-(-64 // 2 ** int(name[1:])), -(-96 // 2 ** int(name[1:])))


def test_the_same_level_twice_has_no_name_in_detectron2() -> None:
    class Copy(ExtraLevels):
        strides = (1,)

        def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
            return [p5]

    with pytest.raises(ValueError, match=r"different powers of two; got \(4, 8, 16, 32, 32\)"):
        Detectron2Backbone(FPN(resnet18(), extra=Copy))


@pytest.mark.parametrize("adapter", [TorchvisionBackbone, Detectron2Backbone])
def test_adapters_take_an_fpn(adapter: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"fpn must be an fpn\.FPN or an fpn\.SimpleFeaturePyramid; got ResNet"):
        adapter(resnet18())


# --- accelerate


def trunk(norm: str = "frozen", **options: Any) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d as TheirFrozenBatchNorm2d

    layers = {"frozen": TheirFrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 32)}
    options = {"backbone_name": "resnet18", "weights": None, "norm_layer": layers[norm]} | options
    backbone: nn.Module = resnet_fpn_backbone(**options)
    return backbone


def rcnn(name: str, norm: str = "frozen", **options: Any) -> nn.Module:
    from torchvision.models import detection

    detector: nn.Module = getattr(detection, name)(
        trunk(norm), num_classes=3, min_size=96, box_score_thresh=0, **options
    )
    return detector


def one_stage(name: str, p6_from: int) -> nn.Module:
    from torchvision.models import detection
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = trunk(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(p6_from, 256))
    detector: nn.Module = getattr(detection, name)(backbone, num_classes=3, min_size=96, score_thresh=0)
    return detector


def faster_rcnn_v2() -> nn.Module:
    """ResNet-50, batch norm in the trunk, in the neck and in the head."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    options = {"num_classes": 3, "min_size": 96, "box_score_thresh": 0, "rpn_post_nms_top_n_test": 200}
    detector: nn.Module = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **options)
    return detector


def keypoint_rcnn() -> nn.Module:
    """With a small head: its own eight convolutions would take most of the time here."""
    from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

    head = {"keypoint_head": KeypointRCNNHeads(256, (32,)), "keypoint_predictor": KeypointRCNNPredictor(32, 17)}
    return rcnn("KeypointRCNN", box_detections_per_img=20, **head)


DETECTORS: dict[str, Build] = {
    "FasterRCNN": partial(rcnn, "FasterRCNN"),
    "FasterRCNN, batch norm": partial(rcnn, "FasterRCNN", "batch"),
    "FasterRCNN, group norm": partial(rcnn, "FasterRCNN", "group"),
    "MaskRCNN": partial(rcnn, "MaskRCNN", box_detections_per_img=20),
    "KeypointRCNN": keypoint_rcnn,
    "RetinaNet, P6 from P5": partial(one_stage, "RetinaNet", 256),
    "RetinaNet, P6 from C5": partial(one_stage, "RetinaNet", 512),
    "FCOS": partial(one_stage, "FCOS", 256),
    "FasterRCNN v2": faster_rcnn_v2,
}


def random_detector(name: str) -> nn.Module:
    """In eval mode. Its scores are spread as a trained one's, not all about 1 / classes, or their order is chance."""
    torch.manual_seed(0)
    detector = randomise(DETECTORS[name]()).eval()
    for part, layer in detector.named_modules():
        if part.endswith((".cls_score", ".cls_logits")):
            nn.init.normal_(layer.weight, std=0.2)
            nn.init.zeros_(layer.bias)
    return detector


def target(height: int, width: int) -> dict[str, Tensor]:
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.4, 0.1, 0.9, 0.6]]) * torch.tensor([width, height, width, height])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    keypoints = torch.tensor([width / 2, height / 2, 1.0]).expand(2, 17, 3)
    return {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": keypoints}


@cache
def photos() -> list[Tensor]:
    """The package's own photo, and scikit-learn's where there is scikit-learn, at a quarter of their size."""
    arrays = [np.asarray(Image.open(DEFAULT_PHOTO).convert("RGB"))]
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        pass
    else:
        arrays += load_sample_images().images
    return [torch.from_numpy(array[::4, ::4].copy()).permute(2, 0, 1) / 255 for array in arrays]


def output_of(detector: nn.Module, images: list[Tensor]) -> list[Detections]:
    with torch.inference_mode():
        found: list[Detections] = detector(images)
    return found


@pytest.mark.torchvision
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", DETECTORS)
def test_detections_on_photos_are_the_originals(name: str, fuse: bool) -> None:
    detector = random_detector(name)
    original = copy.deepcopy(detector)
    assert accelerate(detector, fuse=fuse) is detector
    assert not detector.training
    for found, expected in zip(output_of(detector, photos()), output_of(original, photos()), strict=True):
        assert len(found["boxes"]) == len(expected["boxes"]) >= 20
        assert expected["scores"].std() > 10 * 1e-4
        assert unmatched(found, expected) == unmatched(expected, found) == 0
        for more in ("masks", "keypoints"):
            if more in expected:
                assert relative_error(found[more], expected[more]) < 1e-3


@pytest.mark.torchvision
def test_the_comparison_tells_a_wrong_epsilon() -> None:
    """The figures of the test above, of a model that is a little off."""
    detector = random_detector("FasterRCNN")
    expected = output_of(detector, photos()[:1])[0]
    accelerate(detector)
    for norm in detector.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.eps = 1e-3
    assert unmatched(output_of(detector, photos()[:1])[0], expected) > len(expected["boxes"]) / 2


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["FasterRCNN", "FasterRCNN, batch norm", "MaskRCNN", "RetinaNet, P6 from P5", "FCOS"])
def test_training_goes_on(name: str) -> None:
    """The losses, the gradients and, through an optimizer made before, the step are the original's.

    The tolerances are float32's through fifty layers, forth and back.
    """
    detector = random_detector(name).train()
    original = copy.deepcopy(detector)
    losses, optimizers = [], [torch.optim.SGD(model.parameters(), lr=0.01) for model in (original, detector)]
    accelerate(detector)
    assert all(module.training for module in detector.modules())
    image = photos()[0]
    for model, optimizer in zip((original, detector), optimizers, strict=True):
        torch.manual_seed(1)  # of the samples that the losses take
        losses.append(model([image], [target(*image.shape[1:])]))
        sum(losses[-1].values()).backward()
        optimizer.step()
    for loss, value in losses[0].items():
        torch.testing.assert_close(losses[1][loss], value, rtol=1e-4, atol=1e-6)
    for (part, theirs), ours in zip(original.named_parameters(), by_old_names(detector, original), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), part
        if theirs.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-3, part
        assert relative_error(ours, theirs) < 1e-3, part  # a bias that was 0 is a multiple of its gradient
    state = torchvision_state_dict(detector)
    for key, value in original.named_buffers():  # the statistics of batch norm too
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def by_old_names(detector: nn.Module, original: nn.Module) -> list[nn.Parameter]:
    """The parameters of an accelerated detector in the original's order: an export gives detached twins of them."""
    own = {parameter.data_ptr(): parameter for parameter in detector.parameters()}
    state = torchvision_state_dict(detector)
    return [own[state[name].data_ptr()] for name, _ in original.named_parameters()]


@pytest.mark.torchvision
@pytest.mark.parametrize("name", DETECTORS)
def test_parameters_are_the_very_same(name: str) -> None:
    detector = random_detector(name).double().to(memory_format=torch.channels_last)
    parameters, state = list(detector.parameters()), detector.state_dict()
    wanted = [parameter.requires_grad for parameter in parameters]
    accelerate(detector)
    assert {id(parameter) for parameter in detector.parameters()} == {id(parameter) for parameter in parameters}
    assert [parameter.requires_grad for parameter in parameters] == wanted
    back = torchvision_state_dict(detector)
    assert back.keys() == state.keys()
    assert all(back[key].data_ptr() == value.data_ptr() for key, value in state.items())
    twin = random_detector(name).double()
    twin.load_state_dict(back)


@pytest.mark.torchvision
def test_epsilon_is_each_norms_own() -> None:
    """torchvision sets it to 0 in the detectors that it trained so."""
    from torchvision.ops import FrozenBatchNorm2d as TheirFrozenBatchNorm2d

    detector = random_detector("FasterRCNN")
    theirs = [norm for norm in detector.modules() if isinstance(norm, TheirFrozenBatchNorm2d)]
    for norm in theirs[1:]:
        norm.eps = 0.0
    accelerate(detector)
    ours = [norm for norm in detector.modules() if isinstance(norm, FrozenBatchNorm2d)]
    assert [norm.eps for norm in ours] == [norm.eps for norm in theirs] == [1e-5] + [0.0] * 19


@pytest.mark.torchvision
def test_report(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    detector = accelerate(random_detector("MaskRCNN"))
    report = detector.acceleration
    assert list(report.replaced) == ["backbone", "roi_heads.box_roi_pool", "roi_heads.mask_roi_pool"]
    assert report.left == {}
    first, second, _ = str(report).splitlines()
    assert first == "replaced backbone: fpn.FPN, levels 0, 1, 2, 3, pool"
    assert second.startswith("replaced roi_heads.box_roi_pool: roi.MultiScaleRoIAlign(featmap_names=")
    assert (caplog.records[-1].levelname, caplog.records[-1].message) == ("INFO", str(report))
    assert isinstance(detector.roi_heads.mask_roi_pool, roi.MultiScaleRoIAlign)


@pytest.mark.torchvision
def test_an_accelerated_detector_can_be_fused_later() -> None:
    detector = accelerate(random_detector("FasterRCNN"))
    expected = output_of(detector, photos()[:1])[0]
    assert str(accelerate(detector).acceleration) == "there was nothing to replace"
    accelerate(detector, fuse=True)
    assert str(detector.acceleration).splitlines() == [
        "replaced backbone: fused fpn.FPN, levels 0, 1, 2, 3, pool",
        "replaced rpn.head: RPNHead, its convolutions fused",
        "replaced roi_heads.box_head: FusedTwoMLPHead",
    ]
    assert unmatched(output_of(detector, photos()[:1])[0], expected) == 0
    assert any(isinstance(module, FusedConv2d) for module in detector.modules())
    with pytest.raises(ValueError, match=r"backbone\.body\.conv1 is fused.*Save the state dict before"):
        torchvision_state_dict(detector)


@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("hooked", "left"),
    [
        ("backbone", "backbone"),
        ("backbone.fpn", "backbone"),
        ("backbone.fpn.layer_blocks", "backbone"),
        ("backbone.fpn.layer_blocks.1", "backbone.fpn.layer_blocks.1"),
        ("backbone.fpn.inner_blocks.3.0", "backbone.fpn.inner_blocks.3"),
        ("backbone.body.layer2.1", "backbone.body.layer2.1"),
    ],
)
def test_a_hook_in_an_accelerated_detector_survives_fusing(hooked: str, left: str) -> None:
    detector = accelerate(random_detector("FasterRCNN"))
    calls: list[str] = []
    detector.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(hooked))
    expected = output_of(detector, photos()[:1])[0]
    seen = len(calls)
    report = accelerate(detector, fuse=True).acceleration
    assert {name: "hook" in why for name, why in report.left.items()} == {left: True}
    assert unmatched(output_of(detector, photos()[:1])[0], expected) == 0
    assert len(calls) == 2 * seen


@pytest.mark.torchvision
def test_a_simple_pyramid_is_not_fused() -> None:
    from torchvision.models.detection import FasterRCNN

    detector = FasterRCNN(TorchvisionBackbone(SimpleFeaturePyramid(nn.Conv2d(3, 8, 16, 16), 8, 16)), 2).eval()
    report = accelerate(detector, fuse=True).acceleration
    assert report.left == {"backbone": "SimpleFeaturePyramid has no fused form"}
    assert "roi_heads.box_head" in report.replaced


@pytest.mark.torchvision
@pytest.mark.parametrize("size", [(7, 7), (5, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_box_head(layout: torch.memory_format, size: tuple[int, int]) -> None:
    """The same sums in another order."""
    from torchvision.models.detection.faster_rcnn import TwoMLPHead

    from fpn.detection.box_head import FusedTwoMLPHead

    head = TwoMLPHead(32 * size[0] * size[1], 64).double()
    rois = torch.randn(9, 32, *size, dtype=torch.float64).contiguous(memory_format=layout)
    torch.testing.assert_close(FusedTwoMLPHead(head, *size)(rois), head(rois), rtol=1e-12, atol=1e-12)


@pytest.mark.torchvision
@pytest.mark.parametrize("edit", ["subclass", "hook", "layer"])
def test_a_box_head_of_anothers_is_left(edit: str) -> None:
    detector: Any = rcnn("FasterRCNN").eval()
    head = detector.roi_heads.box_head
    if edit == "subclass":
        subclass(head)
    elif edit == "hook":
        head.register_forward_pre_hook(print)
    else:
        head.fc7 = nn.Identity()
    accelerate(detector, fuse=True)
    assert detector.roi_heads.box_head is head
    assert list(detector.acceleration.replaced) == ["backbone", "roi_heads.box_roi_pool", "rpn.head"]


def conv_heads() -> dict[str, Callable[[], nn.Module]]:
    from torchvision.models.detection import fcos, retinanet
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.models.detection.rpn import RPNHead

    norm = nn.BatchNorm2d
    return {
        "RPN": partial(RPNHead, 128, 3, conv_depth=2),
        "mask": partial(MaskRCNNHeads, 128, [128, 160], 1),
        "mask, dilated": partial(MaskRCNNHeads, 128, [128], 2, norm_layer=norm),
        "keypoint": partial(KeypointRCNNHeads, 128, (128, 128)),
        "box": partial(FastRCNNConvFCHead, (128, 13, 17), [128, 128], [64], norm_layer=norm),
        "RetinaNet class": partial(retinanet.RetinaNetClassificationHead, 128, 9, 21, norm_layer=norm),
        "RetinaNet box": partial(retinanet.RetinaNetRegressionHead, 128, 9),
        "FCOS class": partial(fcos.FCOSClassificationHead, 128, 1, 21, num_convs=2),
        "FCOS box": partial(fcos.FCOSRegressionHead, 128, 1, num_convs=2),
    }


@pytest.mark.torchvision
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["RPN", "mask", "mask, dilated", "keypoint", "box", "RetinaNet class", "RetinaNet box", "FCOS class", "FCOS box"],
)
def test_fused_conv_heads(name: str, dtype: torch.dtype) -> None:
    from torchvision.ops import Conv2dNormActivation

    from fpn.detection.heads import fuse_conv_heads

    torch.manual_seed(0)
    head: nn.Module = randomise(conv_heads()[name]()).to(dtype)
    assert fuse_conv_heads(nn.ModuleList([head])) == ({}, {"0": "it is in training mode"})
    state = {key: value.clone() for key, value in head.eval().state_dict().items()}
    replacements, left = fuse_conv_heads(nn.ModuleList([head]))
    (fused,) = replacements.values()
    assert left == {}
    maps = torch.randn(2, 128, 13, 17, dtype=dtype)
    argument = [maps, maps[:, :, ::2, ::2]] if type(head).__module__.endswith(("rpn", "retinanet", "fcos")) else maps
    with torch.inference_mode():
        outputs, expected = (flattened(module(argument)) for module in (fused, head))
    for output, wanted in zip(outputs, expected, strict=True):
        assert relative_error(output, wanted) < (1e-5 if dtype == torch.float32 else 1e-13)
    assert not any(isinstance(layer, Conv2dNormActivation) for layer in fused.modules())
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())
    (again,) = fuse_conv_heads(nn.ModuleList([fused]))[0].values()
    assert repr(again) == repr(fused)


def flattened(outputs: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples."""
    return [outputs] if isinstance(outputs, Tensor) else [part for output in outputs for part in flattened(output)]


@pytest.mark.torchvision
def test_a_conv_head_of_anothers_is_left() -> None:
    edits: dict[str, Callable[[Any], object]] = {
        "Changed, not torchvision's": subclass,
        "cls_logits: it has hooks": lambda head: head.cls_logits.register_forward_hook(print),
    }
    for reason, edit in edits.items():
        head = conv_heads()["RPN"]().eval()
        edit(head)
        model = accelerate(nn.ModuleDict({"head": head}), fuse=True)
        assert model.head is head
        assert reason in model.acceleration.left["head"]


@pytest.mark.torchvision
def test_a_fused_head_has_no_way_back_to_torchvisions_names() -> None:
    model = accelerate(nn.ModuleDict({"head": conv_heads()["RPN"]().eval()}), fuse=True)
    assert list(model.acceleration.replaced) == ["head"]
    with pytest.raises(ValueError, match=r"head\.conv\.0 is fused"):
        torchvision_state_dict(model)


@pytest.mark.torchvision
def test_a_head_by_itself_is_no_detector() -> None:
    head = conv_heads()["RPN"]().eval()
    assert str(accelerate(head, fuse=True).acceleration) == "there was nothing to replace"


def mobile_net() -> nn.Module:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    detector: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    return detector


def ssd() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    detector: nn.Module = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    return detector


def edited(edit: Callable[[Any], object]) -> Build:
    def build() -> nn.Module:
        detector = rcnn("FasterRCNN")
        edit(detector)
        return detector

    return build


def of_trunk(**options: Any) -> Build:
    def build() -> nn.Module:
        from torchvision.models.detection import RetinaNet

        detector: nn.Module = RetinaNet(trunk(**options), num_classes=2)
        return detector

    return build


def subclass(module: nn.Module) -> None:
    class Changed(type(module)):  # type: ignore[misc]
        pass

    module.__class__ = Changed


def rename_a_level(detector: Any) -> None:
    detector.backbone.body.return_layers = {"layer1": "0", "layer2": "one", "layer3": "2", "layer4": "3"}


def change_padding(detector: Any) -> None:
    detector.backbone.body.layer3[1].conv2.padding_mode = "reflect"


def drop_a_layer(detector: Any) -> None:
    del detector.backbone.body.layer3[0].downsample


def replace_smoothing(detector: Any) -> None:
    detector.backbone.fpn.layer_blocks[1] = nn.Identity()


# What is left -> a word of the reason.
LEFT: dict[str, tuple[Build, dict[str, str]]] = {
    "another trunk": (mobile_net, {"backbone": "no ResNet with layer1 to layer4: it has 0, 1, 2, 3, 4, …"}),
    "no pyramid": (ssd, {"backbone": "SSDLiteFeatureExtractorMobileNet, not torchvision's BackboneWithFPN"}),
    "three stages": (of_trunk(returned_layers=[1, 2, 3]), {"backbone": "its trunk is no ResNet with layer1 to layer4"}),
    "a block": (edited(lambda d: subclass(d.backbone.body.layer2[1])), {"backbone": "body.layer2.1 is tests."}),
    "the first block": (edited(lambda d: subclass(d.backbone.body.layer1[0])), {"backbone": "body.layer1.0 is tests."}),
    "the pyramid": (edited(lambda d: subclass(d.backbone.fpn)), {"backbone": "fpn is tests."}),
    "the backbone": (edited(lambda d: subclass(d.backbone)), {"backbone": "it is tests."}),
    "extra levels": (edited(lambda d: subclass(d.backbone.fpn.extra_blocks)), {"backbone": "fpn.extra_blocks is "}),
    "a convolution": (edited(change_padding), {"backbone": "body.layer3.1.conv2 is Conv2d(256, 256"}),
    "a layer": (edited(drop_a_layer), {"backbone": "body.layer3.0 has the layers conv1, bn1, relu, conv2, bn2, not"}),
    "smoothing": (edited(replace_smoothing), {"backbone": "fpn.layer_blocks.1 is torch.nn.modules.linear.Identity"}),
    "names": (edited(rename_a_level), {"backbone": "its levels are not called 0, 1, … but 0, one, 2, 3"}),
    "a hook": (
        edited(lambda d: d.backbone.body.layer4.register_forward_hook(print)),
        {"backbone": "body.layer4: it has hooks"},
    ),
    "a forward": (
        edited(lambda d: setattr(d.backbone.body.conv1, "forward", abs)),
        {"backbone": "body.conv1: it has a forward of its own"},
    ),
    "a pooler": (
        edited(lambda d: subclass(d.roi_heads.box_roi_pool)),
        {"roi_heads.box_roi_pool": "not torchvision.ops.poolers.MultiScaleRoIAlign"},
    ),
}  # fmt: skip


@pytest.mark.torchvision
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_torchvisions_is_left(case: str, fuse: bool, caplog: pytest.LogCaptureFixture) -> None:
    build, reasons = LEFT[case]
    detector: Any = build().eval()
    before = {name: detector.get_submodule(name) for name in reasons}
    parts = {name: list(module.modules()) for name, module in before.items()}
    report = accelerate(detector, fuse=fuse).acceleration
    assert report.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.left[name]
        assert f"left {name} as it was: " in str(report)
        assert detector.get_submodule(name) is before[name]
        assert list(before[name].modules()) == parts[name]
    assert caplog.records[-1].levelname == "WARNING"


@pytest.mark.torchvision
def test_a_pooler_beside_our_backbone_is_replaced() -> None:
    from torchvision.models.detection import FasterRCNN

    torch.manual_seed(0)
    detector = FasterRCNN(TorchvisionBackbone(FPN18()), num_classes=3, min_size=96, box_score_thresh=0).eval()
    expected = output_of(detector, photos()[:1])[0]
    assert list(accelerate(detector).acceleration.replaced) == ["roi_heads.box_roi_pool"]
    assert unmatched(output_of(detector, photos()[:1])[0], expected) == 0


@pytest.mark.torchvision
def test_a_module_that_is_there_twice_is_replaced_twice() -> None:
    detector: Any = random_detector("MaskRCNN")
    detector.roi_heads.mask_roi_pool = detector.roi_heads.box_roi_pool
    accelerate(detector)
    assert detector.roi_heads.mask_roi_pool is detector.roi_heads.box_roi_pool
    assert len(detector.acceleration.replaced) == 3


@pytest.mark.torchvision
def test_training_mode_is_not_fused() -> None:
    detector: Any = random_detector("FasterRCNN")
    detector.backbone.body.layer4.train()
    backbone = detector.backbone
    with pytest.raises(ValueError, match=r"fuse\(\) needs eval mode"):
        accelerate(detector, fuse=True)
    assert detector.backbone is backbone
    assert not isinstance(detector.roi_heads.box_roi_pool, roi.MultiScaleRoIAlign)


def test_accelerate_takes_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a detector, an nn\.Module; got str"):
        accelerate("fasterrcnn_resnet50_fpn")  # type: ignore[type-var]


@pytest.mark.torchvision
def test_a_module_that_holds_no_detector_stays() -> None:
    assert str(accelerate(nn.Sequential(nn.Linear(2, 2))).acceleration) == "there was nothing to replace"
    assert str(accelerate(trunk()).acceleration) == "there was nothing to replace"  # it holds none, it is one


def test_accelerate_needs_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fpn.detection.conversion", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision"):
        accelerate(nn.Linear(2, 2))
